"""Wrong input ends at once with one clear message and a non-zero status on every rank."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import tiny_model
from spawn import Ranks, start, train

RESUME = ("--resume", "auto", "--max_steps", "4", "--micro_batch_size", "2")
DEMO = Path(__file__).parents[2] / "megaskip/demo"


CASES: dict[str, tuple[str, list[str]]] = {
    "a data file that is missing": ("--data {}/none.jsonl", ["none.jsonl"]),
    "bad JSON": ("--data {}/bad.jsonl", ["bad.jsonl", "line 7"]),
    "an unknown granularity": (
        "--granularity attn_sequnce",
        ["did you mean 'attn_sequence'?"],
    ),
    "a capacity outside its range": ("--capacity 1.5", ["--capacity"]),
    "layers out of range": ("--layers 6-12", ["layers"]),
    "a batch size in the DeepSpeed JSON": (
        "--ds_config {}/ds.json --micro_batch_size 2",
        ["train_micro_batch_size_per_gpu to 8", "--micro_batch_size is 2"],
    ),
    "a tokenizer without a chat template": (
        "--model {}/model --data {}/chat.jsonl",
        ["--chat_template"],
    ),
    "a run folder that cannot be made": ("--output_dir {}/file/run", ["cannot write there"]),
    "experts of a dense model": (
        "--data {}/rows.jsonl --granularity expert_token",
        ["needs a mixture of experts"],
    ),
    "adapters of nothing": (
        "--data {}/rows.jsonl --lora_rank 2 --lora_targets mlp_proj",
        ["no linear layer of the decoder"],
    ),
    "ranks that a sequence does not divide": (
        "--data {}/rows.jsonl --sequence_parallel_size 3",
        ["does not divide the 2 rank(s) of this job"],
    ),
    "4 bit under ZeRO-3": (
        "--data {}/rows.jsonl --base_dtype nf4 --ds_config ds_configs/zero3.json",
        ["does not go with ZeRO-3"],
    ),
}
"""By what is wrong: the flags of a run, where {} stands for `wrong_files`, and what is said."""


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files that are wrong, each in one way, and of rows that are not."""
    folder = tmp_path_factory.mktemp("wrong")
    lines = rows(folder / "rows.jsonl").read_text().splitlines()
    lines[6] = '{"prompt": "Say 6", "completion": '
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    content = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 3}}
    (folder / "ds.json").write_text(json.dumps(content))
    model = folder / "model"
    shutil.copytree(DEMO / "backbone", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    (folder / "file").write_text("not a folder")
    return folder


@pytest.fixture(scope="module")
def wrong_runs(wrong_files: Path) -> Iterator[dict[str, Ranks]]:
    """Start the runs of all cases at once: ranks leave the first of them seconds to speak."""
    started = {}
    for number, (name, (flags, _)) in enumerate(CASES.items()):
        own = ["--max_steps", "2", "--output_dir", str(wrong_files / f"run{number}")]
        words = [word.replace("{}", str(wrong_files)) for word in flags.split()]
        started[name] = start(["launch/train.py", *own, *words], 2, wrong_files / f"log{number}")
    yield started
    for ranks in started.values():
        ranks.kill()


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_ends_every_rank_with_one_message(
    name: str, wrong_runs: dict[str, Ranks]
) -> None:
    wrong_runs[name].wait(120)
    text = one_message(wrong_runs[name])
    assert all(words in text for words in CASES[name][1]), text


def one_message(done: Ranks) -> str:
    """Return what the first rank printed, once every rank has ended with status 2 and one line of
    error."""
    assert [p.returncode for p in done.processes] == [2] * len(done.processes), done.tails()
    for rank in range(len(done.processes)):
        assert "Traceback" not in done.text(rank), done.text(rank)
        assert done.text(rank).count("error: ") == 1, done.text(rank)
    return done.text(0)


def refused(tmp_path: Path, *flags: str, says: str, ranks: int = 2) -> str:
    """Run with `flags`, which must end as `one_message` has it; return what the first rank said."""
    text = one_message(
        train(tmp_path / "log", "--max_steps", "2", *flags, ranks=ranks, timeout=120)
    )
    assert says in text, text
    return text


def rows(path: Path, count: int = 12) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}", "completion": str(i)}) + "\n" for i in range(count)
        )
    )
    return path


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_in_the_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".write_test").symlink_to("/dev/full")
    refused(tmp_path, "--output_dir", str(folder), says="No space left on device")


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
