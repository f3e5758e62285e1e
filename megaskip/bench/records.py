"""The folder of a report: one file for each part, so that what is measured outlives any crash."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaskip.bench.setup import Row
from megaskip.checkpoint.atomic import read_json, write_json
from megaskip.errors import ConfigError

DONE, FAILED, LEFT_OUT = "done", "failed", "left out"
_ABOUT = "about.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What came of a part."""

    name: str
    status: str
    """DONE, FAILED (there may be rows) or LEFT_OUT."""
    seconds: float = 0.0
    """That it took."""
    reason: str = ""
    """Why it failed or was left out."""
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a report in `folder`/parts."""

    folder: Path

    def open(self, about: dict[str, Any]) -> None:
        """Make the folder, or go on in it; raises ConfigError when it is another machine's."""
        file = self.folder / "parts" / _ABOUT
        if file.exists():
            known = read_json(file)
            differences = [
                f"{name} {known.get(name)} there, {value} here"
                for name, value in about.items()
                if known.get(name) != value
            ]
            if differences:
                raise ConfigError(
                    f"--output {self.folder} has a report of something else "
                    f"({'; '.join(differences)}); name another folder"
                )
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output {self.folder}: cannot be made ({error.strerror}); name another folder"
            ) from None
        write_json(file, about)

    def read(self, name: str) -> Record | None:
        """Return the record of a part, None when there is none."""
        file = self._file(name)
        return Record(**read_json(file)) if file.exists() else None

    def write(self, record: Record) -> None:
        """Write a record, whole or not at all."""
        write_json(self._file(record.name), asdict(record))

    @property
    def log(self) -> Path:
        """Return the file that has what the parts' processes print."""
        return self.folder / "parts" / "log.txt"

    def _file(self, name: str) -> Path:
        return self.folder / "parts" / f"{name}.json"
