"""Wrong input ends at once with one clear message and a non-zero status on every rank."""

import json
import shutil
from pathlib import Path

import pytest
from families import tiny_model
from spawn import train

RESUME = ("--resume", "auto", "--max_steps", "4", "--micro_batch_size", "2")
DEMO = Path(__file__).parents[2] / "megaskip/demo"


def refused(tmp_path: Path, *flags: str, says: str, ranks: int = 2) -> str:
    """Run with `flags`; every rank must end with status 2, and rank 0 with one error line block."""
    done = train(tmp_path / "log", "--max_steps", "2", *flags, ranks=ranks, timeout=120)
    assert [p.returncode for p in done.processes] == [2] * ranks, done.tails()
    text = done.text(0)
    assert says in text, text
    for rank in range(ranks):
        assert "Traceback" not in done.text(rank), done.text(rank)
        assert done.text(rank).count("error: ") == 1, done.text(rank)
    return text


def rows(path: Path, count: int = 12) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}", "completion": str(i)}) + "\n" for i in range(count)
        )
    )
    return path


def test_missing_data_file(tmp_path: Path) -> None:
    refused(tmp_path, "--data", str(tmp_path / "none.jsonl"), says="none.jsonl")


def test_bad_json_names_file_and_line(tmp_path: Path) -> None:
    file = rows(tmp_path / "bad.jsonl")
    lines = file.read_text().splitlines()
    lines[6] = '{"prompt": "Say 6", "completion": '
    file.write_text("\n".join(lines) + "\n")
    text = refused(tmp_path, "--data", str(file), says="bad.jsonl")
    assert "line 7" in text


def test_unknown_granularity_suggests_the_nearest(tmp_path: Path) -> None:
    refused(tmp_path, "--granularity", "attn_sequnce", says="did you mean 'attn_sequence'?")


def test_capacity_outside_its_range(tmp_path: Path) -> None:
    refused(tmp_path, "--capacity", "1.5", says="--capacity")


def test_layer_out_of_range(tmp_path: Path) -> None:
    refused(tmp_path, "--layers", "6-12", says="layers")


def test_batch_size_in_the_deepspeed_json_conflicts(tmp_path: Path) -> None:
    content = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 3}}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    text = refused(
        tmp_path,
        *("--ds_config", str(tmp_path / "ds.json"), "--micro_batch_size", "2"),
        says="train_micro_batch_size_per_gpu to 8",
    )
    assert "--micro_batch_size is 2" in text


def test_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO / "backbone", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    refused(
        tmp_path,
        *("--model", str(model), "--data", str(tmp_path / "chat.jsonl")),
        says="--chat_template",
    )


def trained(tmp_path: Path) -> list[str]:
    """Return the flags of a short run that has been made."""
    flags = ["--data", str(rows(tmp_path / "rows.jsonl")), "--output_dir", str(tmp_path / "run")]
    flags += ["--held_out", "0", "--calibration_rows", "0"]
    done = train(tmp_path / "first", *flags, "--max_steps", "2", ranks=1)
    assert done.processes[0].returncode == 0, done.tails()
    return flags


def test_corrupted_checkpoint(tmp_path: Path) -> None:
    flags = trained(tmp_path)
    weights = tmp_path / "run/step_000002/routers.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    refused(tmp_path, *flags, *RESUME, says="is damaged")


def test_other_routers_on_resume(tmp_path: Path) -> None:
    flags = trained(tmp_path)
    before = (tmp_path / "run/run.json").read_text()
    other = ("--granularity", "attn_token")
    refused(tmp_path, *flags, *RESUME, *other, says="--granularity differs from the run", ranks=1)
    assert (tmp_path / "run/run.json").read_text() == before


def test_model_with_a_shard_that_is_cut_off(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO / "backbone", model)
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(tmp_path, "--model", str(model), says=f"{shard.name} is damaged", ranks=1)


def test_wrong_base_model_on_resume(tmp_path: Path) -> None:
    flags = trained(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(DEMO / "backbone", other)
    weights = tiny_model("llama", vocab_size=1536, num_hidden_layers=8)
    weights.save_pretrained(other)
    refused(
        tmp_path,
        *(*flags, *RESUME, "--model", str(other)),
        says="belongs to another base model",
    )


def test_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused(tmp_path, "--output_dir", str(tmp_path / "file/run"), says="cannot write there")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_in_the_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".write_test").symlink_to("/dev/full")
    refused(tmp_path, "--output_dir", str(folder), says="No space left on device")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--granularity", "expert_token"), "needs a mixture of experts"),
        (("--lora_rank", "2", "--lora_targets", "mlp_proj"), "no linear layer of the decoder"),
        (("--sequence_parallel_size", "3"), "does not divide the 2 rank(s) of this job"),
        (
            ("--base_dtype", "nf4", "--ds_config", "ds_configs/zero3.json"),
            "does not go with ZeRO-3",
        ),
    ],
    ids=["experts of a dense model", "adapters of nothing", "sequence", "4 bit under ZeRO-3"],
)
def test_what_a_model_or_its_ranks_cannot_do(
    flags: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    data = str(rows(tmp_path / "rows.jsonl"))
    refused(tmp_path, "--data", data, "--output_dir", str(tmp_path / "run"), *flags, says=says)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = refused(
        tmp_path,
        *("--capacity", "1.5", "--micro_batch_size", "0", "--capacty", "0.5"),
        says="did you mean '--capacity'?",
        ranks=1,
    )
    assert "--capacity 1.5" in text
    assert "--micro_batch_size 0" in text
    assert "unexpected" not in text


@pytest.mark.parametrize("family", ["minimax"])
def test_family_that_cannot_be_routed_is_refused_with_numbers(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model(family, vocab_size=1536).save_pretrained(model)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / "backbone" / name, model / name)
    refused(
        tmp_path,
        *("--model", str(model), "--data", str(rows(tmp_path / "rows.jsonl"))),
        says="is not the identity",
        ranks=1,
    )


def test_port_zero_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    data = str(rows(tmp_path / "rows.jsonl"))
    done = train(
        tmp_path / "log",
        *("--data", data, "--output_dir", str(tmp_path / "run")),
        environment={"MASTER_PORT": "0"},
        timeout=60,
    )
    assert [p.returncode for p in done.processes] == [2, 2], done.tails()
    assert "--standalone" in done.text(0)
