"""Comparisons of ways to skip: what they cost, what they lose."""
