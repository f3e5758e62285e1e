"""Profiles of the fuzz tests: a minute by default, an hour with --hypothesis-profile long."""

from hypothesis import settings

# How many inputs each test tries is in outcome.fuzzed, which asks for the profile's name.
settings.register_profile("long", derandomize=False)
