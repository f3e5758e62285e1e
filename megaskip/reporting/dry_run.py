from typing import Any


def print_dry_run(*a: Any) -> None: ...
