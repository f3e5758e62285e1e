"""A model is resolved once, its source never changes, and its weights go where they are used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, tiny_model

from megaskip.checkpoint.stored_weights import read_stored_weights, weight_map_of
from megaskip.config import ModelConfig
from megaskip.errors import CheckpointError, ConfigError
from megaskip.parallel.inference import Placement, load_for_inference
from megaskip.parallel.loading import skeleton, whole
from megaskip.parallel.loading import source as source_module
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.weight_check import check_weights

CPU = torch.device("cpu")


def stored(family: str, folder: Path) -> ModelSource:
    tiny_model(family).save_pretrained(folder, max_shard_size="40KB")
    return resolve_source(ModelConfig(model=str(folder), dtype="bfloat16"))


def test_what_is_built_does_not_change_the_config_that_all_share(tmp_path: Path) -> None:
    source = stored("llama", tmp_path)
    before = source.hf_config.to_dict()
    skeleton.skeleton(source)
    skeleton.build_model(source, torch.float32)
    whole.load_whole(source, CPU)
    assert source.hf_config.to_dict() == before


def test_config_json_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored("llama", tmp_path)
    read = source_module.AutoConfig.from_pretrained
    folders = []

    def counted(folder: Any, **options: Any) -> Any:
        folders.append(folder)
        return read(folder, **options)

    monkeypatch.setattr(source_module.AutoConfig, "from_pretrained", counted)
    load_for_inference(str(tmp_path), Placement.on(CPU))
    assert folders == [tmp_path]


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config.json in this folder"):
        resolve_source(ModelConfig(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(ConfigError, match="cannot read its config.json"):
        resolve_source(ModelConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model.safetensors", "give the folder that holds config.json and the weights as safet"),
        ("a.gguf", "a.gguf: GGUF is not read; give the Hugging Face folder"),
        ("run.json", "it holds routers: give their base model here, .* --init_routers"),
        ("checkpoint-8/config.json", "did you mean .*checkpoint-8?"),
    ],
)
def test_a_folder_without_config_json_says_what_to_give(
    file: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=f"no config.json in this folder; {says}"):
        resolve_source(ModelConfig(model=str(tmp_path)))


def test_a_name_that_is_no_folder_says_what_a_name_looks_like(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    for name, says in ((str(tmp_path / "a.gguf"), "a file; a.gguf: GGUF"), ("lama", "OWNER/NAME")):
        with pytest.raises(ConfigError, match=says):
            resolve_source(ModelConfig(model=name))


def test_what_is_no_causal_language_model_is_named(tmp_path: Path) -> None:
    for config, says in (
        (transformers.T5Config(), "an encoder with a decoder .model_type t5."),
        (transformers.LlavaConfig(), "one for text and other media .model_type llava."),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=f"decoder-only language models, and it is {says}"):
            skeleton.skeleton(resolve_source(ModelConfig(model=str(tmp_path))))
    (tmp_path / "config.json").write_text('{"model_type": "megaskip_llama"}')
    with pytest.raises(ConfigError, match="megaskip exported it: give its base model"):
        resolve_source(ModelConfig(model=str(tmp_path)))
    config = transformers.LlamaConfig(**COMMON)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="files are of LlamaForSequenceClassification, and"):
        check_weights(resolve_source(ModelConfig(model=str(tmp_path))))


def test_weights_are_read_right_onto_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    assert whole.read_onto(gpu) == {"device_map": {"": gpu}}
    assert whole.read_onto(CPU) == whole.read_onto(None) == {}
    monkeypatch.setattr(whole, "is_accelerate_available", lambda: False)
    assert whole.read_onto(gpu) == {}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_a_device_map_changes_no_weight_and_no_buffer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stored(family, tmp_path)
    plain = whole.load_whole(source, CPU)
    monkeypatch.setattr(whole, "read_onto", lambda device: {"device_map": {"": device}})
    mapped = whole.load_whole(source, CPU)
    for ours, theirs in ((mapped, plain), (plain, mapped)):
        tensors = {**dict(theirs.named_buffers()), **theirs.state_dict()}
        for name, tensor in {**dict(ours.named_buffers()), **ours.state_dict()}.items():
            assert tensor.dtype == tensors[name].dtype, name
            assert torch.equal(tensor, tensors[name]), name


def test_every_tensor_has_a_file_with_an_index_and_without(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    single, shards = weight_map_of(tmp_path / "single"), weight_map_of(tmp_path / "shards")
    assert single.keys() == shards.keys() == model.state_dict().keys()
    assert set(single.values()) == {"model.safetensors"}
    assert len(set(shards.values())) > 2
    assert weight_map_of(tmp_path) == {}


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_a_damaged_index_is_named(content: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    for read in (weight_map_of, read_stored_weights):
        with pytest.raises(CheckpointError, match="is damaged: expected names and their files"):
            read(tmp_path)
