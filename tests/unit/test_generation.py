"""launch/generate.py: answers, shares and pictures from runs and exported folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.base import describe_folder
from megaskip.export.folder import export_folder

ROOT = Path(__file__).parents[2]
BASE = ROOT / "megaskip/demo/backbone"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo with random token routers, as routers and as an exported folder."""
    import transformers

    root = tmp_path_factory.mktemp("generation")
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    routers = attach_routers(model, RouterConfig(granularity="attn_token"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_routers(root / "run/routers", routers, base=describe_folder(BASE))
    export_folder(root / "run/routers", BASE, root / "exported")
    return root


def run(*flags: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/generate.py"), "--max_new_tokens", "5", *flags]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120)


def test_prompts_of_a_file_are_answered_alike_from_run_and_export(
    exported: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Reverse: a b"}, {"messages": [{"role": "user", "content": "Hi"}]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = []
    for name in ("run", "exported"):
        out = tmp_path / f"{name}.jsonl"
        done = run(
            *("--model", str(exported / name), "--prompts", str(prompts), "--dtype", "float32"),
            *("--output", str(out), "--picture", str(tmp_path / name)),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("of the routed units; by layer 3:") == 2
        answers.append([json.loads(line) for line in out.read_text().splitlines()])
        for suffix in (".png", ".html", "-2.png", "-2.html"):
            assert (tmp_path / f"{name}{suffix}").stat().st_size > 1000
    assert answers[0] == answers[1]
    assert 0 < answers[0][0]["capacity"] < 1


def test_typed_turns_share_a_conversation_until_new(exported: Path) -> None:
    done = run("--model", str(exported / "exported"), typed="Hi\nAgain\n/new\nHi\n/quit\nno\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of the routed units") == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "/nowhere"], "neither config.json"),
        (["--model", str(BASE)], "without routers"),
        (["--model", str(BASE), "--max_new_tokens", "0"], "at least 1"),
    ],
)
def test_wrong_input_is_one_message(flags: list[str], says: str) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
