"""The wheel of the core attaches, loads, generates and converts without the libraries of extras.

The wheel is built and unpacked for real; the libraries that its core does not require are hidden
from the process that uses it, as in an environment in which they are not installed.
"""

import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "./source"]
    # A copy, because setuptools writes into the folder that it builds from.
    copied = ["megaskip", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
    (folder / "source").mkdir()
    for name in copied:
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder / "source")], check=True)
    subprocess.run([*pip, *build], check=True, cwd=folder, timeout=120)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)],
        check=True,
        timeout=120,
    )
    return folder / "site"


def required(names: list[str]) -> set[str]:
    """Return the distributions that these and what they require consist of, without extras."""
    done: set[str] = set()
    while names:
        name = names.pop().lower().replace("_", "-")
        if name in done:
            continue
        done.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)
    return done


def hidden(site: Path) -> list[str]:
    """Return the importable names of all that is installed here and not required by the core."""
    (core,) = metadata.distributions(path=[str(site)])
    lines = [Requirement(line) for line in core.requires or ()]
    needed = required(
        [r.name for r in lines if r.marker is None or r.marker.evaluate({"extra": ""})]
    )
    return sorted(
        name
        for name, owners in metadata.packages_distributions().items()
        if name != "megaskip" and not {owner.lower().replace("_", "-") for owner in owners} & needed
    )


def run_in_core(site: Path, folder: Path, body: str) -> str:
    """Run Python code in a process that sees the core alone; return what it printed."""
    names = hidden(site)
    assert {"deepspeed", "datasets", "lm_eval", "matplotlib", "tensorboard"} <= set(names)
    (folder / "hidden.json").write_text(json.dumps(names))
    code = (Path(__file__).parent / "core_alone.py").read_text() + body
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(site), str(folder / "hidden.json")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_core_attaches_loads_generates_and_converts(site: Path, tmp_path: Path) -> None:
    printed = run_in_core(
        site,
        tmp_path,
        """
import torch
from transformers import AutoModelForCausalLM

import megaskip
from megaskip.checkpoint.base import describe_folder

backbone = Path(megaskip.__file__).parent / "demo" / "backbone"
model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
routers = megaskip.attach_routers(model, megaskip.RouterConfig(capacity=0.5))
for parameter in routers.parameters():
    torch.nn.init.normal_(parameter)
megaskip.save_routers("routers", routers, base=describe_folder(backbone))
megaskip.load_routers(AutoModelForCausalLM.from_pretrained(backbone), "routers")
megaskip.convert("routers", "exported", verify=True)
loaded = megaskip.load_for_inference("exported", dtype="float32")
ids = torch.arange(5, 25)[None]
# Random routers may end a text at once.
greedy = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
print(loaded.model.generate(ids, **greedy)[0].tolist())
alone = AutoModelForCausalLM.from_pretrained(
    "exported", trust_remote_code=True, dtype=torch.float32
)
print(alone.generate(ids, **greedy)[0].tolist())
""",
    )
    package, alone = printed.splitlines()[-2:]
    assert package == alone
    assert len(json.loads(package)) == 24


def test_what_needs_an_extra_says_which(site: Path, tmp_path: Path) -> None:
    printed = run_in_core(
        site,
        tmp_path,
        """
import importlib

import megaskip
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import MegaskipError

try:
    load_tokenizer(Path(megaskip.__file__).parent / "demo" / "backbone")
except MegaskipError as error:
    print(error)
for module in (
    "megaskip.parallel.zero3",
    "megaskip.evaluation.evaluate",
    "megaskip.reporting.heatmap",
):
    try:
        importlib.import_module(module)
    except MegaskipError as error:
        print(error)
""",
    )
    assert printed.splitlines() == [
        "sentencepiece is not installed, which tokenizer.model needs: pip install megaskip[train]",
        "deepspeed is not installed, which this needs: pip install megaskip[train]",
        "lm_eval is not installed, which this needs: pip install megaskip[eval]",
        "matplotlib is not installed, which this needs: pip install megaskip[report]",
    ]


def test_the_wheel_holds_the_package_and_its_data_only(site: Path) -> None:
    (wheel,) = site.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megaskip"}
    assert "megaskip/demo/backbone/model.safetensors" in names
    assert "megaskip/demo/instruct.jsonl" in names
    assert "megaskip/py.typed" in names
    assert "megaskip/evaluation/tasks/demo_answers.yaml" in names
