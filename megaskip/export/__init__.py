"""Trained routers to what others can load, and published routers in.

Promise: what cannot be represented is refused, and what was assumed is said.
"""
