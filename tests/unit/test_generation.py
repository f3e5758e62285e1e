"""launch/generate.py: answers, shares and pictures from runs and exported folders."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from data_samples import CHATML, fast_tokenizer
from routed_models import as_exported, trained
from safetensors.torch import load_file, save_file
from tokenizers import processors

from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import read_router_config, update_router_config
from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.cli import convert
from megaskip.cli.generate import main as generate
from megaskip.cli.generate import parse
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import CheckpointError, ConfigError, DataError
from megaskip.export.folder import export_folder
from megaskip.generation.conversation import Conversation, prompt_ids
from megaskip.generation.job import load_alone
from megaskip.generation.prompts import read_prompts, typed_prompts
from megaskip.parallel.inference import InferenceModel
from megaskip.routing import PREFIX

pytestmark = pytest.mark.usefixtures("warm_python")

ROOT = Path(__file__).parents[2]
BASE = ROOT / "megaskip/demo/backbone"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo with random token routers, as routers and as an exported folder."""
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


def test_routers_are_not_attached_to_other_weights_of_the_same_shape(
    exported: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    assert load_alone(str(exported / "run"), "auto", str(other))
    tensors = load_file(other / "model.safetensors")
    moved = {name: tensor + 0.1 for name, tensor in tensors.items()}
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="belongs to another base model: weights is"):
        load_alone(str(exported / "run"), "auto", str(other))


TEMPLATE = "{% for message in messages %}Q: {{ message['content'] }} A:{% endfor %}"


def own_tokenizer(root: Path) -> Path:
    """Let the run of `root` have been given a chat template and a tokenizer with a further token;
    return the tokenizer's folder."""
    tokenizer = load_tokenizer(BASE)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(root / "other")
    (root / "own.jinja").write_text(TEMPLATE)
    model = {"model": "demo", "tokenizer": str(root / "other"), "trust_remote_code": False}
    config = {"model": model, "data": {"data": ["demo"], "chat_template": str(root / "own.jinja")}}
    (root / "run").mkdir(exist_ok=True)
    (root / "run/run.json").write_text(json.dumps({"config": config}))
    report = {"config": config, "steps": 1, "versions": {}}
    (root / "run/report.json").write_text(json.dumps(report))
    return root / "other"


def test_a_run_is_asked_with_the_tokenizer_and_template_it_was_trained_with(tmp_path: Path) -> None:
    other = own_tokenizer(tmp_path)
    found = other_tokenizer(None, tmp_path / "run", BASE)
    assert len(found) == len(load_tokenizer(BASE)) + 1
    assert found.chat_template == TEMPLATE
    assert other_tokenizer(None, tmp_path, BASE) is None
    named = other_tokenizer(str(other), tmp_path / "run", BASE)
    assert (len(named), named.chat_template) == (len(found), load_tokenizer(BASE).chat_template)


def test_a_run_whose_template_is_gone_is_one_message(tmp_path: Path) -> None:
    own_tokenizer(tmp_path)
    (tmp_path / "own.jinja").unlink()
    with pytest.raises(ConfigError, match="own.jinja.*--tokenizer"):
        other_tokenizer(None, tmp_path / "run", BASE)


def test_export_and_generation_take_the_tokenizer_of_the_run(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tokenizer(tmp_path)
    shutil.copytree(exported / "run/routers", tmp_path / "run/routers")
    convert.main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "exported")])
    written = load_tokenizer(tmp_path / "exported")
    assert written.chat_template == TEMPLATE
    assert "<new>" in written.get_vocab()
    (tmp_path / "prompts.txt").write_text("Hi\n")
    asked: list[str] = []
    encode = Conversation._encode

    def spy(self: Conversation) -> torch.Tensor:
        ids = encode(self)
        asked.append(self.tokenizer.decode(ids[0]))
        return ids

    monkeypatch.setattr(Conversation, "_encode", spy)
    for name in ("run", "exported"):
        prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens", "1"]
        generate(["--model", str(tmp_path / name), *prompts])
    assert len(asked) == 2
    assert all("Q: Hi A:" in text for text in asked)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "/nowhere"], "/nowhere: no such folder"),
        (["--model", str(BASE), "--max_new_tokens", "0"], "at least 1"),
    ],
)
def test_wrong_input_is_one_message(flags: list[str], says: str) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--output", "/nowhere/a.jsonl"], "--output /nowhere/a.jsonl: .* /nowhere"),
        (["--output", "/"], "--output /: .*is a folder"),
        (["--num_beams", "0"], "--num_beams 0 must be at least 1"),
        (["--temperature", "1", "--top_p", "90"], r"--top_p 90 .*\(0, 1\]"),
        (["--temperature", "1", "--top_p", "0"], "--top_p 0 "),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top_p", "0.9"], "--top_p 0.9 .* --temperature"),
        (["--num_beams", "2", "--picture", "what"], "--picture .* --num_beams 1"),
    ],
)
def test_flags_that_cannot_work_are_refused_at_once(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(["--model", "demo", *flags])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": ["hi"]}', "message 1 .*role and content"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}', "message 2 "),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 "),
        ('{"messages": []}', "no message"),
        ('{"prompts": "hi"}', "a field prompt or messages"),
        ("{", "not valid JSON"),
        ('{"prompt": "a\\ud83d"}', r"'\\ud83d' is half of a character"),
    ],
)
def test_a_malformed_prompt_is_found_before_a_model_is_loaded(
    line: str, says: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "Hi"}}\n\n{line}\n')
    with pytest.raises(DataError, match=f"prompts.jsonl, line 3: .*{says}"):
        generate(["--model", "/nowhere", "--prompts", str(prompts)])
    prompts.write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        generate(["--model", "/nowhere", "--prompts", str(prompts)])


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_byte_order_mark_is_no_part_of_a_prompt(suffix: str, tmp_path: Path) -> None:
    line = '{"prompt": "Hi"}' if suffix == "jsonl" else "Hi"
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(f"\ufeff{line}\r\n\ufeff{line}\r\n".encode())
    assert read_prompts(path) == [[{"role": "user", "content": "Hi"}]] * 2


def test_prompt_begins_as_the_tokenizer_begins_and_ends_without_an_end_token() -> None:
    tokenizer = fast_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <pad> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2), ("<pad>", 3)]
    )
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "hello"}])[0].tolist()
    assert tokenizer.decode(ids) == "<s><pad>hello"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ({"rag": CHATML, "tool_use": CHATML}, r"\(rag, tool_use\) .* --chat_template FILE"),
        ("{{ messages[5].content }}", "rejects 'hello' after 0 messages"),
        ("{{ messages[0].content.index('z') }}", "rejects 'hello' after 0 messages"),
    ],
)
def test_template_that_cannot_be_used_is_one_sentence(template: Any, says: str) -> None:
    tokenizer = fast_tokenizer(template)
    with pytest.raises(DataError, match=says):
        prompt_ids(tokenizer, [{"role": "user", "content": "hello"}])


def test_each_answer_is_written_when_it_is_made(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("Hi\nAgain\nNo more\n")
    out.write_text("an older answer\n")
    encode, asked = Conversation._encode, 0

    def third_fails(self: Conversation) -> torch.Tensor:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt
        return encode(self)

    monkeypatch.setattr(Conversation, "_encode", third_fails)
    flags = ["--prompts", str(prompts), "--output", str(out), "--max_new_tokens", "1"]
    with pytest.raises(KeyboardInterrupt):
        generate(["--model", str(exported / "exported"), *flags])
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["messages"][0]["content"] for answer in answers] == ["Hi", "Again"]


def test_a_calibrated_capacity_is_chosen_and_another_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    routers = tmp_path / "routers"
    shutil.copytree(exported / "run/routers", routers)
    config = read_router_config(routers)[0]
    table = ((0.1, 0.999), (0.9, 0.001))
    update_router_config(routers, dataclasses.replace(config, calibrated=table))
    folder = export_folder(routers, BASE, tmp_path / "exported").folder
    assert (
        "calibrated for | 0.1, 0.9: `model.set_capacity(0.1)`" in (folder / "README.md").read_text()
    )
    (tmp_path / "prompts.txt").write_text("Reverse: a b\n")
    shares = {}
    for capacity in ("0.1", "0.9"):
        out = tmp_path / f"{capacity}.jsonl"
        flags = ["--model", str(folder), "--capacity", capacity, "--max_new_tokens", "2"]
        prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(out)]
        generate([*flags, *prompts, "--dtype", "float32"])
        shares[capacity] = json.loads(out.read_text())["capacity"]
    assert shares["0.1"] < 0.5 < shares["0.9"]
    with pytest.raises(ConfigError, match=r"capacity 0\.5 is not calibrated"):
        generate(["--model", str(folder), "--capacity", "0.5", *prompts])


def conversation_with(loaded: InferenceModel, tokenizer: Any, options: Any) -> Conversation:
    return Conversation(
        model=loaded.model, routers=loaded.routers, tokenizer=tokenizer, options=options
    )


def test_a_prompt_that_the_template_rejects_and_an_empty_one_are_named(exported: Path) -> None:
    loaded = load_alone(str(exported / "exported"), "float32", None)
    tokenizer = load_tokenizer(loaded.folder)
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    options = parse(["--model", "x"])
    conversation = conversation_with(loaded, tokenizer, options)
    with pytest.raises(DataError, match="rejects 'Hi' after 0 messages .*only one turn"):
        conversation.answer([{"role": "user", "content": "Hi"}])
    bare = fast_tokenizer(None, bos=False)
    raw = conversation_with(loaded, bare, parse(["--model", "x", "--raw"]))
    with pytest.raises(DataError, match="a prompt is empty"):
        raw.answer([{"role": "user", "content": ""}])


def test_a_prompt_with_a_token_beyond_the_embedding_is_one_line(exported: Path) -> None:
    loaded = load_alone(str(exported / "exported"), "float32", None)
    tokenizer = load_tokenizer(loaded.folder)
    tokenizer.add_tokens(["@@odd"])
    conversation = conversation_with(loaded, tokenizer, parse(["--model", "x"]))
    with pytest.raises(DataError, match="a prompt: token 1536 is beyond the model's vocabulary"):
        conversation.answer([{"role": "user", "content": "Hi @@odd"}])


def test_a_static_cache_for_a_model_that_drops_keys_is_refused() -> None:
    model = as_exported(*trained("llama", "attn_token"), kv="drop")
    routers, options = model.get_submodule(PREFIX), parse(["--model", "x", "--static"])
    with pytest.raises(ConfigError, match="--static does not go with a folder of --kv drop"):
        Conversation(model=model, routers=routers, tokenizer=None, options=options)


def test_answers_do_not_take_the_place_of_prompts(tmp_path: Path) -> None:
    file = str(tmp_path / "prompts.jsonl")
    with pytest.raises(ConfigError, match="is the file of --prompts"):
        parse(["--model", "x", "--prompts", file, "--output", file])


def test_static_turns_are_those_of_a_cache_that_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With routers attached, over two turns: the first prompt decides for both."""
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    routers = attach_routers(model, RouterConfig(granularity="block_sequence", layers="4"))
    for number, router in enumerate(routers.parameters()):
        torch.nn.init.normal_(router, generator=torch.Generator().manual_seed(number))
    save_routers(tmp_path / "routers", routers, base=describe_folder(BASE))
    loaded = load_alone(str(tmp_path / "routers"), "float32", None)
    answers = []
    for flags in ([], ["--static"]):
        options = parse(["--model", "x", "--max_new_tokens", "6", *flags])
        conversation = conversation_with(loaded, load_tokenizer(loaded.folder), options)
        for text in ("Reverse: a b", "Again"):
            answers.append(conversation.answer([{"role": "user", "content": text}]))
    assert answers[2:] == answers[:2]
    assert 0 < answers[0]["capacity"] < 1
    with pytest.raises(ConfigError, match="--static is for one token"):
        parse(["--model", "x", "--static", "--num_beams", "2"])


def test_a_model_without_routers_answers_and_says_that_nothing_is_decided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("Reverse: a b\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens", "4"]
    output = tmp_path / "answers.jsonl"
    generate(["--model", "demo", *prompts, "--output", str(output)])
    assert "[demo, dense: the same layers run for every text]" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["messages"][1]["content"] and row.keys() == {"messages"}
    for flag, value in (("--capacity", "0.5"), ("--picture", "w"), ("--base", "demo")):
        with pytest.raises(ConfigError, match=f"{flag} is for routers, and --model demo has none"):
            generate(["--model", "demo", *prompts, flag, value])


def test_input_that_ends_without_a_prompt_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(DataError, match="standard input holds no prompt"):
        list(typed_prompts())
