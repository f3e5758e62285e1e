"""Text from routed models, and what of the model ran for it. Knows no command line.

Promise: what a sequence decided on its first prompt holds for the whole conversation.
"""
