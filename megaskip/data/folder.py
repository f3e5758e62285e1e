"""Which files of a folder or a pattern are read, and why others are not. Reads none of them."""

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaskip.data.card import Subset, choose_subset, subsets_of
from megaskip.data.readers import is_readable, is_saved_dataset, kind_of, known_kinds
from megaskip.errors import DataError

HIDDEN = "hidden"
METADATA = "describes the data"
UNKNOWN = "not a kind of file that is read"
LINK = "a link to a folder, or to nothing"
COPY = "a compressed copy of a file beside it"
TRAINING = "kept for training"

# The words by which the datasets library tells splits in a folder, and those of held_out.
_TRAINING_WORDS = {"train", "training"}
_HELD_OUT_WORDS = {
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "held": "held-out",
    "heldout": "held-out",
    "holdout": "held-out",
}
_WORDS = re.compile(r"[-._ 0-9]+")
_METADATA = {
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
}
_ABOUT = {"readme", "license", "licence", "notice", "changelog", "requirements"}
"""Names, without their suffix, of texts that accompany data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A file, or a whole folder, that is not read."""

    name: str
    """Below the folder that was given."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What is read of a folder or a pattern, and what is not."""

    files: tuple[Path, ...] = ()
    """In reading order: files, and folders of Dataset.save_to_disk."""
    left_out: tuple[LeftOut, ...] = ()


def choose_in_folder(folder: Path, *, held_out: bool) -> Choice:
    """Return what is read of a folder: its training split, or for held-out data the others.

    Splits are told by the names of files and of folders below it; files without such a name are
    of the training split, and are held-out data where no file has one. Raises DataError when
    nothing is left to read.
    """
    if is_saved_dataset(folder):
        return Choice(files=(folder,))
    subsets = subsets_of(folder)
    subset = choose_subset(folder, subsets) if subsets else None
    return _choose(folder, [folder], subset=subset, held_out=held_out)


def choose_in_subset(path: Path, *, held_out: bool) -> Choice | None:
    """Return what is read of a subset that the README.md of the folder above `path` declares under
    its name; None where there is no such subset."""
    for subset in subsets_of(path.parent) if path.parent.is_dir() else []:
        if subset.name == path.name:
            return _choose(path.parent, [path.parent], subset=subset, held_out=held_out)
    return None


def choose_by_pattern(pattern: str, *, held_out: bool) -> Choice | None:
    """Return what is read of the files that fit a pattern such as data/*.jsonl; None where no file
    fits. A pattern that names a split reads it, whatever it is. Raises DataError when nothing that
    fits can be read."""
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        return None
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    by_split = not any(_split_of(part) is not None for part in parts[fixed:])
    return _choose(Path(*parts[:fixed]), paths, by_split=by_split, held_out=held_out)


def summarise(left_out: Sequence[LeftOut], *, shown: int = 3) -> str:
    """Return what is left out as one line: for each reason the first names and how many more."""
    by_reason: dict[str, list[str]] = {}
    for item in left_out:
        by_reason.setdefault(item.reason, []).append(item.name)
    return "; ".join(
        f"{reason}: {', '.join(names[:shown])}"
        + (f" and {len(names) - shown:,} more" if len(names) > shown else "")
        for reason, names in by_reason.items()
    )


def _choose(
    root: Path,
    paths: Iterable[Path],
    *,
    subset: Subset | None = None,
    by_split: bool = True,
    held_out: bool,
) -> Choice:
    """Return what is read of files and folders that are below `root`; raises DataError when that is
    nothing."""
    reasons: dict[Path, str] = {}
    for path in paths:
        reasons |= dict(_walk(path)) if path.is_dir() else {path: _reason(path)}
    for path in [path for path, reason in reasons.items() if not reason]:
        uncompressed = path.with_suffix("")
        if kind_of(path.name) != path.suffix.lower() and reasons.get(uncompressed) == "":
            reasons[path] = COPY
    if by_split:
        readable = [path for path, reason in reasons.items() if not reason]
        reasons |= _other_split(root, readable, subset, held_out=held_out)
    left_out = tuple(
        LeftOut(name=str(path.relative_to(root)), reason=reasons[path])
        for path in sorted(reasons)
        if reasons[path]
    )
    files = tuple(sorted(path for path, reason in reasons.items() if not reason))
    if files:
        return Choice(files=files, left_out=left_out)
    raise DataError(
        f"{root}: there is nothing to {'evaluate' if held_out else 'train'} on"
        f"{f' ({summarise(left_out)})' if left_out else ''}; expected files that end in "
        f"{known_kinds()}. To read a file that is left out, give its own path"
    )


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield what is in a folder at any depth, and why it is not read; "" where it may be. A folder
    of Dataset.save_to_disk, and one that is left out, counts as one file."""
    if is_saved_dataset(folder):
        yield folder, ""
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from None
    for path in entries:
        is_plain_folder = path.is_dir() and not path.is_symlink()
        if is_plain_folder and not _is_hidden(path):
            yield from _walk(path)
        else:
            yield path, _reason(path)


def _reason(path: Path) -> str:
    """Return why a file or folder is not read, whatever its split; "" where it may be."""
    if _is_hidden(path):
        return HIDDEN
    if not path.is_file():
        return LINK
    if path.name in _METADATA or path.name.lower().split(".")[0] in _ABOUT:
        return METADATA
    return "" if is_readable(path) else UNKNOWN


def _is_hidden(path: Path) -> bool:
    """Return whether a name is one of editors', version control's or another tool's own files."""
    return path.name.startswith((".", "__")) or path.name == "_temporary"


def _other_split(
    root: Path, paths: Sequence[Path], subset: Subset | None, *, held_out: bool
) -> dict[Path, str]:
    """Return the files that are not of the wanted split or subset, and the reason.

    A split is told by what the README.md says, else by the names of the file and its folders.
    """
    outside = {path for path in paths if subset is not None and path not in subset.split_of}
    splits = {}
    for path in paths:
        names = path.relative_to(root).parts
        if subset is not None and path not in outside:
            names = (subset.split_of[path],)
        splits[path] = next(filter(None, map(_split_of, names)), None)
    reasons = dict.fromkeys(outside, f"not of the subset {subset.name}") if subset else {}
    inside = [path for path in paths if path not in outside]
    if not held_out:
        reasons |= {path: f"{splits[path]} split" for path in inside if splits[path]}
    elif any(splits[path] for path in inside):
        reasons |= {path: TRAINING for path in inside if not splits[path]}
    return reasons


def _split_of(name: str) -> str | None:
    """Return the held-out split that the name of a file or folder tells, if it does."""
    words = _WORDS.split(name.lower())
    if _TRAINING_WORDS & set(words):
        return None
    return next((_HELD_OUT_WORDS[word] for word in words if word in _HELD_OUT_WORDS), None)
