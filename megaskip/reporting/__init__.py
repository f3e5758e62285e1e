"""What a run shows: header, progress, metrics, pictures, closing table.

Promise: every number is measured, and names its unit.
"""
