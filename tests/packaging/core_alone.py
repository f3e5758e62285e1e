"""Hides libraries from a process, as if they were not installed: run before what test_wheel.py
runs. Arguments: the folder of the installed wheel, a JSON file with the names to hide."""

import json
import sys
from pathlib import Path
from typing import Any

site, hidden = sys.argv[1], frozenset(json.loads(Path(sys.argv[2]).read_text()))


class Without:
    """A finder of modules and of distributions that does not find what is hidden."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in hidden:
            return None
        return self._finder.find_spec(name, *args, **kwargs)

    def find_distributions(self, *args: Any, **kwargs: Any) -> Any:
        find = getattr(self._finder, "find_distributions", lambda *args, **kwargs: ())
        for found in find(*args, **kwargs):
            if found.name.lower().replace("-", "_") not in hidden:
                yield found

    def invalidate_caches(self) -> None:
        if hasattr(self._finder, "invalidate_caches"):
            self._finder.invalidate_caches()


sys.path.insert(0, site)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import megaskip  # noqa: E402

assert Path(megaskip.__file__).is_relative_to(site), megaskip.__file__
