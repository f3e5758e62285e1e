"""Errors that a user can act on. Each message says what was found, what is needed and what to
change."""


class MegaskipError(Exception):
    """Base of every error that is the user's to mend; entry points print it without a traceback."""


class ConfigError(MegaskipError):
    """A flag, a configuration file or a combination of them that cannot work. Holds every problem
    found."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n  ".join(problems))


class DataError(MegaskipError):
    """A data set that cannot be read or has nothing to learn from; names file, line and field."""


class UnsupportedModelError(MegaskipError):
    """A model on which skipping is not the identity, or whose layers cannot be found."""


class CheckpointError(MegaskipError):
    """A checkpoint or router folder that is missing, damaged, or belongs to another base model."""


class RankError(MegaskipError):
    """A rank that died, hangs or disagrees with the others; names it."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error for a message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
