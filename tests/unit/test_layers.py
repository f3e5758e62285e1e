"""Imports point down the layers, and importing the package touches nothing."""

import ast
import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megaskip"
LEVEL = {
    "errors": 0,
    "extras": 0,
    "labels": 0,
    "log": 0,
    "progress": 0,
    "_version": 0,
    "config": 1,
    "routing": 2,
    "arch": 3,
    "data": 3,
    "inference": 3,
    "parallel": 4,
    "checkpoint": 4,
    "measures": 4,
    "bench": 5,
    "calibration": 5,
    "export": 5,
    "doctor": 5,
    "generation": 5,
    "inspection": 5,
    "reporting": 5,
    "runs": 5,
    "serving": 5,
    "evaluation": 5,
    "study": 5,
    "training": 5,
    "api": 6,
    "cli": 6,
    "integrations": 6,
}
THIRD_PARTY = {"transformers": 3, "datasets": 3, "deepspeed": 4, "torch.distributed": 4, "torch": 2}
OWNERS = {"deepspeed": {"parallel"}, "lm_eval": {"evaluation", "cli"}, "vllm": {"serving"}}


def imports_of(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def part_of(file: Path) -> str:
    if file.name == "__main__.py":  # entry points, like those of cli
        return "cli"
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]


def test_every_part_has_a_level() -> None:
    assert {part_of(file) for file in modules()} <= LEVEL.keys()


def test_imports_point_down_the_layers() -> None:
    upward = []
    for file in modules():
        for name in imports_of(file):
            if name.startswith("megaskip."):
                part = name.split(".")[1]
                if LEVEL[part] > LEVEL[part_of(file)]:
                    upward.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not upward


def test_no_two_parts_import_each_other() -> None:
    """Also not in a longer circle: every part can be read after those that it imports."""
    needs: dict[str, set[str]] = {part: set() for part in LEVEL}
    for file in modules():
        inner = (name.split(".")[1] for name in imports_of(file) if name.startswith("megaskip."))
        needs[part_of(file)] |= set(inner) - {part_of(file)}
    while ready := [part for part, needed in needs.items() if not needed & needs.keys()]:
        for part in ready:
            del needs[part]
    assert not needs


def test_package_faces_hand_on_names_and_nothing_else() -> None:
    """But the package's own face, which hands them on when they are asked for."""
    for file in PACKAGE.glob("*/**/__init__.py"):
        for node in ast.parse(file.read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert is_docstring or is_list or isinstance(node, ast.ImportFrom), (file, node.lineno)


def test_libraries_are_imported_where_they_belong() -> None:
    misplaced = []
    for file in modules():
        part = part_of(file)
        for name in imports_of(file):
            for library, level in THIRD_PARTY.items():
                if (name == library or name.startswith(f"{library}.")) and LEVEL[part] < level:
                    misplaced.append(f"{file.relative_to(PACKAGE)} imports {name}")
            if name.split(".")[0] in OWNERS and part not in OWNERS[name.split(".")[0]]:
                misplaced.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not misplaced


def test_only_evaluation_needs_lm_eval() -> None:
    """Whoever imports megaskip.evaluation needs its extra; comparisons, for one, do not."""
    users = {
        part_of(file)
        for file in modules()
        if any(f"{name}.".startswith("megaskip.evaluation.") for name in imports_of(file))
    }
    assert users <= OWNERS["lm_eval"], "put what others need into megaskip/measures"


def test_library_code_names_commands_and_not_files_of_the_repository() -> None:
    """An installed package has no tools/ and no launch/ beside it; megaskip COMMAND is everywhere.
    In cli/ they stand where a launcher such as torchrun starts a file."""
    for file in modules():
        if part_of(file) != "cli":
            assert not re.search(r"\b(tools|launch)/\w+\.(py|sh)", file.read_text()), file


def test_importing_the_package_touches_no_device_environment_or_process_group(
    tmp_path: Path,
) -> None:
    code = (
        "import os; before = dict(os.environ); from megaskip import *; import torch;"
        "assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items());"
        "assert not torch.distributed.is_initialized(); assert not torch.cuda.is_initialized();"
        "import sys; assert 'deepspeed' not in sys.modules; assert 'lm_eval' not in sys.modules"
    )
    # Where it is not set, torch sets it once transformers is imported.
    set_before = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=120, env=set_before
    )


def test_torch_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, megaskip.cli.main, megaskip.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=120)


def test_the_public_api_is_what_is_documented() -> None:
    import megaskip

    assert set(megaskip.__all__) == {
        "RouterConfig",
        "RouterSet",
        "__version__",
        "attach_routers",
        "calibrate",
        "convert",
        "detach_routers",
        "export_static",
        "load_for_inference",
        "load_routers",
        "route_tune",
        "save_routers",
    }
    for name in set(megaskip.__all__) - {"__version__"}:
        assert getattr(megaskip, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'attach_router'"):
        megaskip.attach_router  # noqa: B018


def test_plain_pytest_collects_the_distributed_tests(pytestconfig: pytest.Config) -> None:
    """pytest skips folders called dist by default, and tests that nobody runs cannot fail."""
    skipped = pytestconfig.getini("norecursedirs")
    folders = [path for path in (PACKAGE.parent / "tests").rglob("*") if path.is_dir()]
    tested = [folder for folder in folders if list(folder.glob("test_*.py"))]
    assert any(folder.name == "dist" for folder in tested)
    for folder in tested:
        assert not any(fnmatch.fnmatch(folder.name, pattern) for pattern in skipped), folder
