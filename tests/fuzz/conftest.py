"""Profiles of the fuzz tests: a minute by default, an hour with --hypothesis-profile long."""

from pathlib import Path

import pytest
from hypothesis import settings
from outcome import LONG

# How many inputs each test tries is in outcome.fuzzed, which asks for the profile's name.
settings.register_profile(LONG, derandomize=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let a test of the long profile take as long as it does; single inputs still may not hang."""
    if settings.get_current_profile_name() == LONG:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.timeout(0))
