"""A training run: the job, its loop, its folder."""
