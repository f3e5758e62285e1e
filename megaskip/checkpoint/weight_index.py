"""Which file of a model's folder holds which tensor. The one reader of weight indexes."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.header import require_no_pointer
from megaskip.config.value_types import shown
from megaskip.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor that an index lists.

    Raises CheckpointError when the index is damaged, or names a file outside its folder.
    """
    require_no_pointer(index)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} is damaged: expected names and their files in weight_map")
    for file in sorted(set(weight_map.values())):
        require_inside(index.parent, file, named_by=f"{index} names")
    return weight_map


def require_inside(folder: Path, file: str, *, named_by: str) -> None:
    """Raise CheckpointError when a weight file lies outside of its folder: by its name, or because
    it is a link. Links of the hub's cache lead to the blobs beside its snapshots."""
    steps = {*PurePosixPath(file).parts, *PureWindowsPath(file).parts}
    is_absolute = PurePosixPath(file).is_absolute() or bool(PureWindowsPath(file).anchor)
    if not file or "\0" in file or is_absolute or ".." in steps:
        raise CheckpointError(
            f"{named_by} {shown(file)}, which is not a file inside {folder}; a model's weights "
            "must lie in its folder"
        )
    try:
        home, target = folder.resolve(), (folder / file).resolve()
        target.exists()  # a name may be longer than the system allows
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a link to itself
        why = getattr(error, "strerror", None) or "a link that leads nowhere"
        raise CheckpointError(f"{named_by} {shown(file)}, which cannot be read: {why}") from None
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{folder / file} is a link to {target}, outside of the model's folder; copy the file "
            "into the folder, or name the folder that holds it"
        )
