"""The weights of a base model in an exported folder: linked or copied, never decoded.

Shards keep their bytes; those that lose tensors are written anew without them.
"""

import errno
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megaskip.checkpoint.atomic import write_json
from megaskip.checkpoint.stored_weights import weight_map_of
from megaskip.checkpoint.weight_index import INDEX, SINGLE
from megaskip.errors import CheckpointError
from megaskip.export.shards import bytes_of, copy_without

RENAMED_SINGLE = "base.safetensors"
"""transformers takes a model.safetensors for the whole model, whatever an index says."""


@dataclass(kw_only=True)
class BaseWeights:
    """What became of the base's weights."""

    linked: int = 0
    """Bytes shared with the base by hard links."""
    removed: int = 0
    """Bytes of tensors that were left out."""
    notes: list[str] = field(default_factory=list)


def put_base_weights(
    folder: Path,
    base: Path,
    weight_map: Mapping[str, str],
    *,
    link: bool = True,
    without: Collection[str] = (),
    rewritten: Collection[str] = (),
    beside: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> BaseWeights:
    """Put the shards of `base` into `folder`, with an index where there are several files.

    `weight_map` has the file of each of the base's tensors; those in `without` are left out, and
    files that are to be `rewritten` are copied, not linked. `beside` has the file, in `folder`
    already, of each tensor that is added. Shards are hard links with `link`, where the file system
    allows it; `progress` is told the bytes of each that is done.
    Raises CheckpointError when a shard is missing or cut off.
    """
    beside = beside or {}
    done, total = BaseWeights(), 0
    names_in = {SINGLE: RENAMED_SINGLE} if beside else {}
    for file in sorted(set(weight_map.values())):
        shard, target = base / file, folder / names_in.get(file, file)
        if not shard.is_file():
            raise CheckpointError(f"--base {base}: its index names {file}, which is not there")
        names = {name for name, holder in weight_map.items() if holder == file}
        size, lost = bytes_of(shard, names), bytes_of(shard, names & set(without))
        if lost:
            copy_without(shard, target, without)
        elif link and file not in rewritten:
            _link_or_copy(shard, target, done)
        else:
            shutil.copyfile(shard, target)
        total += size - lost
        done.removed += lost
        progress(shard.stat().st_size)
    if beside or (base / INDEX).is_file():
        total += sum(bytes_of(folder / file, beside) for file in set(beside.values()))
        stays = {n: names_in.get(f, f) for n, f in weight_map.items() if n not in without}
        _write_index(folder / INDEX, {**stays, **beside}, total)
    return done


def _write_index(file: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    metadata = {"total_size": total_size}
    write_json(file, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def require_safetensors(base: Path) -> dict[str, str]:
    """Return the file name of each stored tensor of a base; raises CheckpointError without any."""
    weight_map = weight_map_of(base)
    if not weight_map:
        raise CheckpointError(
            f"--base {base} holds no safetensors ({SINGLE} or {INDEX}); load it with transformers "
            "and save_pretrained it once"
        )
    return weight_map


def _link_or_copy(source: Path, target: Path, done: BaseWeights) -> None:
    source = source.resolve()  # the hub's cache holds links to its blobs
    try:
        os.link(source, target)
        done.linked += source.stat().st_size
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        note = f"copied, for {error.strerror} when linking across folders"
        done.notes += [] if note in done.notes else [note]
    shutil.copyfile(source, target)
