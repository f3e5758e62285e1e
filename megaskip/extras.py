"""Libraries that only some commands need, and which of the package's extras installs them."""

import contextlib
from collections.abc import Iterator

from megaskip.errors import MegaskipError


class MissingExtraError(MegaskipError, ImportError):
    """A library of an optional extra is not installed; says what to install."""

    def __init__(self, library: str, extra: str, user: str = "this") -> None:
        """`user` is what needs the library."""
        super().__init__(
            f"{library} is not installed, which {user} needs: pip install megaskip[{extra}]"
        )


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Hold a context of imports that only `pip install megaskip[name]` provides.

    Raises MissingExtraError, which names the library and the extra, when one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or str(error)).split(".")[0]
        raise MissingExtraError(library, name) from error
