"""Options that exports share: a repository of the hub that gets the folder, too."""

from collections.abc import Iterator
from dataclasses import dataclass

from megaskip.config.options import Checked, option


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTarget(Checked):
    """The folder on the hub."""

    push_to_hub: str | None = option(None, metavar="NAME")
    """Send the folder to this repository of the hub, too, as NAME or ORGANISATION/NAME: a new one,
    which is private, or a new commit. Base weights go along, but for --mode adapter. That it can
    be sent is checked before the work."""
    hub_public: bool = False
    """Make a new repository of --push_to_hub public."""

    def _problems(self) -> Iterator[str]:
        if self.hub_public and self.push_to_hub is None:
            yield "--hub_public says how --push_to_hub makes a repository: add it"
