"""What vLLM is not to run as something else is refused, with the reason and what to change."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from served_models import routed_folder, served, static_folder

from megaskip.errors import ConfigError, UnsupportedModelError


@pytest.mark.parametrize("trusted", [False, True], ids=["as it is", "with --trust-remote-code"])
def test_without_the_plugin_neither_way_runs_the_folder(trusted: bool, tmp_path: Path) -> None:
    folder = routed_folder(tmp_path, "llama", granularity="attn_sequence")
    command = [sys.executable, str(Path(__file__).with_name("without_plugin.py")), str(folder)]
    done = subprocess.run(
        [*command, "trusted"][: len(command) + trusted],
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    expected = "pip install megaskip[vllm]" if trusted else "custom code"
    assert expected in done.stdout + done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"runner": "pooling"}, "--runner pooling: routed models generate text"),
        ({"enable_lora": True}, "--enable-lora does not go with routed models"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding does not go with routed models",
        ),
        ({"tensor_parallel_size": 2}, "routed models were run on one alone"),
    ],
    ids=["pooling", "lora", "speculative", "tensor parallel"],
)
def test_settings_that_routed_models_do_not_go_with(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = routed_folder(tmp_path, "llama", granularity="attn_sequence")
    with pytest.raises(Exception, match=message), served(folder, **options):
        pass


def test_routers_that_decide_per_token_are_refused(tmp_path: Path) -> None:
    folder = routed_folder(tmp_path, "llama", granularity="attn_token")
    message = "granularity attn_token: vLLM runs routers that decide"
    with pytest.raises(ConfigError, match=message), served(folder):
        pass


def test_attention_backends_that_keep_a_plan_are_refused(tmp_path: Path) -> None:
    from megaskip.serving.vllm import routed

    folder = routed_folder(tmp_path, "llama", granularity="attn_sequence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed, "REBUILT", ("FLASH_ATTN",))
        message = "CPU_ATTN: .* take one of FLASH_ATTN"
        with pytest.raises(UnsupportedModelError, match=message), served(folder):
            pass


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    folder = routed_folder(tmp_path, "llama", granularity="attn_sequence")
    content = json.loads((folder / "config.json").read_text())
    content["routing"]["adapter"] = "adapter"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="megaskip convert --merge"), served(folder):
        pass


@pytest.mark.parametrize(
    "kind, file, message",
    [
        ("routed", "skip_routers.safetensors", "tensors of routers are missing"),
        ("static", "compensation.safetensors", "tensors of compensations are missing"),
    ],
)
def test_a_folder_that_lost_tensors_is_refused(
    kind: str, file: str, message: str, tmp_path: Path
) -> None:
    if kind == "routed":
        folder = routed_folder(tmp_path, "llama", granularity="attn_sequence")
    else:
        folder = static_folder(tmp_path, "llama", maps="low_rank")
    tensors = load_file(folder / file)
    del tensors[min(tensors)]
    save_file(tensors, folder / file)
    with pytest.raises(ValueError, match=message), served(folder):
        pass
