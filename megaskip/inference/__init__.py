"""Generation with routed models.

Promise: a sequence's decision is made once, on its prompt, and travels with its cache.
"""
