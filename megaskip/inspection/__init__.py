"""What rows of data become, for a reader: a summary, single rows as text, all rows as JSON lines.

Promise: everything shown comes from `megaskip.data`, with which training reads the same rows.
"""
