"""Does it pay? Quality beside what was skipped for it, beside the unrouted base and what else one
could do.

Promise: the same requests, prompts and decisions for any number of processes and any batch size;
differences are paired by document and come with their intervals.
"""

from megaskip.evaluation.evaluate import EvalSettings, evaluate_model, quick_table
from megaskip.evaluation.report import EvalReport, Outcome, TaskOutcome

__all__ = ["EvalReport", "EvalSettings", "Outcome", "TaskOutcome", "evaluate_model", "quick_table"]
