"""What evaluations and comparisons count: costs of texts, errors of metrics, paired differences.

Promise: numbers only; no tasks, no files and no optional library.
"""
