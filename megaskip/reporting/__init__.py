"""What one sees of a run: header, progress, metrics, pictures, closing table.

Promise: every number is measured, and names its unit.
"""
