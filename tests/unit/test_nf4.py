"""A base in 4 bit: the weights that transformers makes, the gradients of a frozen model, the bytes
that were planned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from tiny_run import alone, rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from megaskip.arch.stage import DecoderStage, LayerRange, layer_ranges
from megaskip.arch.task_loss import TaskLoss
from megaskip.cli.convert import main as convert
from megaskip.cli.train import main as train
from megaskip.config import ModelConfig, RunConfig, parse_run_config
from megaskip.data import collate
from megaskip.errors import CheckpointError, ConfigError, UnsupportedModelError
from megaskip.export import decisions as decisions_module
from megaskip.parallel.build import build_engine
from megaskip.parallel.estimate import estimate
from megaskip.parallel.live_bytes import LiveBytes
from megaskip.parallel.loading.quantised import (
    bytes_of_packed,
    is_quantised,
    quantised,
    require_quantised,
)
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.stage_weights import load_stage
from megaskip.parallel.loading.whole import load_whole
from megaskip.parallel.measure import bytes_by_kind

pytestmark = pytest.mark.usefixtures("warm_python")

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the [4bit] extra is not installed")
CPU = torch.device("cpu")
IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose rows are whole blocks of 64, but for those of down_proj."""
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    tiny_model("llama", **sizes).save_pretrained(path)
    return path


class BytesInMemory(LiveBytes):
    """Counts no tensors without values."""

    def _note(self, tensor: torch.Tensor, *, counts: bool) -> None:
        super()._note(tensor, counts=counts and not tensor.is_meta)


def source_of(folder: Path, **settings: Any) -> ModelSource:
    return resolve_source(ModelConfig(model=str(folder), base_dtype="nf4", **settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_weights_are_those_of_transformers(folder: Path, dtype: str) -> None:
    source = source_of(folder, dtype=dtype)
    model: Any = load_whole(source, CPU).eval()
    layer = model.model.layers[0]
    assert is_quantised(layer.self_attn.q_proj.weight) and is_quantised(layer.mlp.up_proj.weight)
    assert not is_quantised(layer.mlp.down_proj.weight) and not is_quantised(model.lm_head.weight)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=source.dtype,
        llm_int8_skip_modules=["lm_head", "down_proj"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=source.dtype, quantization_config=settings
    ).eval()
    for module in theirs.modules():
        module.support_avx512bf16_for_cpu = False
    assert torch.equal(model(IDS).logits, theirs(IDS).logits)


def test_weights_are_packed_one_by_one_as_they_are_read(tmp_path: Path) -> None:
    """Loading holds what is packed and copies of a single weight, on a stage as in one process."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32}
    model = tiny_model("llama", **sizes).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    source, depth = source_of(tmp_path), source_of(tmp_path).text_config.num_hidden_layers
    largest = model.model.layers[0].mlp.up_proj.weight.nbytes
    for stop in (depth, depth // 2):
        layers = LayerRange(first=0, stop=stop, depth=depth)

        def cut(whole: Any, own: LayerRange = layers) -> Any:
            return whole if own.stop == depth else DecoderStage(whole, own, chunk_tokens=64)

        with BytesInMemory() as live:
            loaded = load_stage(source, layers, cut, CPU)
        assert sum(map(is_quantised, loaded.parameters())) == 7 * stop
        held = sum(p.nbytes + bytes_of_packed(p) for p in loaded.parameters())
        assert live.peak <= held + 3 * largest
        assert 3 * largest < sum(p.nbytes for p in model.model.layers[:stop].parameters()) / 4


@torch.no_grad()
def test_stages_hold_the_weights_of_the_whole(folder: Path) -> None:
    source = source_of(folder)
    whole = TaskLoss(load_whole(source, CPU).eval(), chunk_tokens=64)
    positions = torch.arange(IDS.shape[1])[None]
    hidden = IDS
    for layers in layer_ranges((3,), source.text_config.num_hidden_layers):
        stage = load_stage(
            source, layers, lambda m, own=layers: DecoderStage(m, own, chunk_tokens=64), CPU
        )
        assert stage.dtype == torch.float32
        hidden = stage(hidden, None, positions)
    assert torch.equal(hidden, whole.hidden_states(IDS, None, positions))


def test_routers_learn_after_passes_without_gradient_and_bytes_are_those_planned(
    folder: Path,
) -> None:
    """On CPUs that multiply bfloat16, bitsandbytes packs weights in such a pass."""
    config = parse_run_config(["--model", str(folder), "--base_dtype", "nf4"])
    batch = collate(rows(4), pad_token_id=0, prompt_tokens=32)
    with alone() as topology:
        source = source_of(folder)
        engine = build_engine(config, topology, source, None)
        engine.evaluate([batch, None], routed=False)
        engine.train_step([batch], 1e-2)
        gradients = [p.grad for p in engine.parameters.values()]
        assert all(g is not None and float(g.abs().max()) > 0 for g in gradients)
        measured = bytes_by_kind(engine)["backbone"]
    planned = estimate(config, source, world_size=1, ds_content=None)
    assert planned.weights == pytest.approx(measured, rel=0.15)
    plain = estimate(
        RunConfig(), resolve_source(ModelConfig(model=str(folder))), world_size=1, ds_content=None
    )
    assert planned.weights < 0.5 * plain.weights


def test_numbers_that_are_not_finite_or_others_are_refused() -> None:
    like = bitsandbytes.nn.Params4bit(torch.empty(4, 64, device="meta"), quant_type="nf4")
    stored = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    packed = quantised(stored, like, CPU, torch.float32)
    require_quantised("w", stored, packed)
    for other in (stored.roll(1), stored.index_fill(1, torch.tensor([63]), float("nan"))):
        with pytest.raises(CheckpointError, match="w in 4 bit is not what is stored"):
            require_quantised("w", other, packed)


def test_a_run_is_exported_on_its_16_bit_base_and_decisions_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions_module, "_TEXTS", 3)
    flags = ["--max_steps", "2", "--max_samples", "48", "--held_out", "4", "--seq_length", "64"]
    flags += ["--calibration_rows", "8", "--no-progress", "--no-tensorboard", "--dtype", "float32"]
    flags += ["--cache_dir", str(tmp_path / "tokens"), "--micro_batch_size", "2"]
    run = tmp_path / "run"
    train(["--base_dtype", "nf4", "--output_dir", str(run), *flags])
    convert(["--run", str(run), "--output", str(tmp_path / "exported"), "--verify"])
    said = " ".join(capsys.readouterr().out.split())
    assert "fresh process, fp32: logits differ by at most" in said
    assert "of 12 decisions on 3 texts are those of the 16-bit base" in said
    _, described = decisions_module._texts(tmp_path)
    assert "no tokenizer is here" in described


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ds_config", "zero3.json"], "nf4 does not go with ZeRO-3"),
        (["--train", "full"], "nf4 is for a frozen base: .*; leave --train full out"),
    ],
)
def test_what_4_bit_does_not_do_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config(["--base_dtype", "nf4", *more])


def test_a_model_without_whole_blocks_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no linear layer that --base_dtype nf4"):
        load_whole(source_of(tmp_path), CPU)
