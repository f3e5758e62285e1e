"""Does it pay? Quality by lm-eval, beside what was skipped for it and beside the unrouted base.

Promise: the same requests, prompts and decisions for any number of processes and any batch size.
"""

from megaskip.evaluation.evaluate import EvalSettings, evaluate_model, quick_table
from megaskip.evaluation.report import EvalReport, Outcome, TaskOutcome

__all__ = ["EvalReport", "EvalSettings", "Outcome", "TaskOutcome", "evaluate_model", "quick_table"]
