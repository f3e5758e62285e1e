"""Thresholds: what skipping costs, where a capacity is met."""
