"""Does it pay? Quality at what was skipped, beside what one could do instead.

Promise: differences are paired by document, and come with their intervals.
"""
