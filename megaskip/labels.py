"""What a label says besides the token that comes next."""

IGNORED = -100
"""Label of a token without loss, as torch and transformers have it."""
