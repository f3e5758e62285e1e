"""Evaluation with lm-eval: pairing, counting, pooling, few-shot examples, wrong input."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import tiny_model
from routed_models import randomise, whole_ids
from torch.utils.flop_counter import FlopCounterMode

from megaskip import RouterConfig, attach_routers
from megaskip.arch import find_decoder
from megaskip.cli.evaluate import parse
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError, DataError
from megaskip.evaluation import EvalReport, evaluate_model, quick_table
from megaskip.evaluation.evaluate import EvalSettings, evaluate_lm
from megaskip.evaluation.lm import MegaskipLM
from megaskip.evaluation.task_manager import load_tasks
from megaskip.inference.dropped import drop_sublayers
from megaskip.inference.executor import InferenceExecutor
from megaskip.measures.costs import CostModel
from megaskip.measures.paired import difference, standard_error
from megaskip.parallel.inference import Placement, load_for_inference

pytestmark = pytest.mark.usefixtures("warm_python")

ROOT = Path(__file__).parents[2]
BASE = ROOT / "megaskip/demo/backbone"
TOKENIZER = load_tokenizer(BASE)
DEMO = ["demo_choice", "demo_answers", "demo_text"]


def demo(
    granularity: str | None = "attn_sequence", *, learned: bool = True, kv: str = "keep"
) -> Any:
    """Return the demo backbone in float32, with routers that decide by what they read."""
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    model.requires_grad_(False)  # torch folds matrix products differently for weights that learn
    if granularity is not None:
        routers = attach_routers(model, RouterConfig(granularity=granularity), verify=False)
        routers.executor = InferenceExecutor(unit=routers.config.unit, kv=kv)
        if learned:
            randomise(routers)
    return model


def run(model: Any, tasks: list[str] = DEMO, **settings: Any) -> EvalReport:
    return evaluate_model(
        model, TOKENIZER, tasks, **{"limit": 10, "apply_chat_template": True, **settings}
    )


def predictions(report: EvalReport) -> dict[str, list[Any]]:
    """Return choices, texts and what was skipped: all that a reader of the table would see."""
    found: dict[str, list[Any]] = {}
    for name, task in report.outcome.items():
        for document in task.documents:
            metrics = {k: v for k, v in document.metrics.items() if name != "demo_text"}
            answers = document.answers if name == "demo_answers" else None
            found.setdefault(name, []).append((document.index, metrics, answers, document.cost))
    return found


def test_the_demo_is_far_above_chance_on_the_bundled_tasks() -> None:
    report = run(demo(None), limit=40)
    assert report.outcome["demo_choice"].metrics["acc,none"].value > 0.6
    assert report.outcome["demo_answers"].metrics["exact_match,none"].value > 0.6
    assert report.outcome["demo_text"].metrics["bits_per_byte,none"].value < 3
    assert report.dense is None
    assert report.skip_ratio() is None


def test_a_model_that_keeps_everything_differs_by_exactly_nothing() -> None:
    report = run(demo(learned=False))
    assert report.skip_ratio() == 0
    for name, task in report.outcome.items():
        assert (task.cost.flop_ratio, task.cost.kv_ratio) == (1, 1)
        for metric in task.metrics:
            gap = report.difference(name, metric)
            assert gap is not None
            assert (gap.value, gap.low, gap.high) == (0, 0, 0)


def test_the_dense_answers_are_those_of_the_base_without_routers() -> None:
    routed, base = run(demo()), run(demo(None))
    assert routed.dense is not None
    for name in DEMO:
        ours = [document.answers for document in routed.dense[name].documents]
        assert ours == [document.answers for document in base.outcome[name].documents]
    assert any(
        a.answers != b.answers
        for name in DEMO
        for a, b in zip(routed.outcome[name].documents, routed.dense[name].documents, strict=True)
    )


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_batch_size_changes_neither_predictions_nor_what_is_skipped(granularity: str) -> None:
    model = demo(granularity)
    alone, together = run(model, batch_size=1), run(model, batch_size=7)
    assert predictions(alone) == predictions(together)
    assert 0 < (alone.skip_ratio() or 0) < 1


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_the_skip_ratio_is_the_one_counted_in_the_model(granularity: str) -> None:
    model = demo(granularity)
    routers, counted = model.skip_routers, [0.0, 0.0]

    def count(module: Any, args: Any, output: Any) -> None:
        if granularity == "attn_sequence" and output[0].shape[1] == 1:
            return  # a sequence has decided at its prefill
        if routers.state.overrides:
            return  # the passes at the start that compare masks
        counts = routers.counts()
        counted[0] += float(counts.kept.sum())
        counted[1] += float(counts.units.sum())

    handle = model.get_decoder().register_forward_hook(count)
    report = run(model, batch_size=1, paired=False)
    handle.remove()
    assert report.skip_ratio() == pytest.approx(1 - counted[0] / counted[1], abs=1e-12)


def test_only_the_context_decides_about_an_answer() -> None:
    model = demo()
    asked: list[torch.Tensor] = []
    model.skip_routers.set_batch, plain = (
        lambda real, prompt: (asked.append(prompt.sum(1)), plain(real, prompt)),
        model.skip_routers.set_batch,
    )
    lm = MegaskipLM(model, TOKENIZER, batch_size=4)
    context, answers = [1, 20, 30, 40, 50], [[60], [60, 70], [60, 70, 80, 90]]
    lm._loglikelihood_tokens([(("q", "a"), context, answer) for answer in answers])
    assert torch.cat(asked).tolist() == [5, 5, 5]
    asked.clear()
    lm._loglikelihood_tokens([(("", "a"), [1], [20] * 50), (None, [1], [20] * 9)])
    assert torch.cat(asked).tolist() == [32, 9]  # --prompt_tokens, or all there is


def test_scores_are_those_of_the_model_one_text_at_a_time() -> None:
    model = demo()
    lm = MegaskipLM(model, TOKENIZER, batch_size=3)
    requests = [(("q", "a"), [1, *range(9, 14 + n)], [40, 50 + n][: 1 + n % 2]) for n in range(5)]
    requests.append((("q", "b"), requests[0][1], [77]))  # shares a row
    for (_, context, answer), (found, _) in zip(
        requests, lm._loglikelihood_tokens(requests), strict=True
    ):
        ids = torch.tensor([[*context, *answer][:-1]])
        prompt = torch.arange(ids.shape[1])[None] < len(context)
        model.skip_routers.set_batch(torch.ones_like(prompt), prompt)
        with torch.no_grad():
            scores = model(ids).logits[0, len(context) - 1 :].log_softmax(-1)
        own = sum(float(scores[place, token]) for place, token in enumerate(answer))
        assert found == pytest.approx(own, abs=1e-4)


def test_fewshot_examples_depend_on_the_document_alone() -> None:
    few = {}
    for limit in (4, 9):
        task = load_tasks(["demo_choice"], num_fewshot=3, limit=limit)["demo_choice"]
        task.build_all_requests(limit=limit)
        few[limit] = {one.doc_id: one.args[0] for one in task.instances}
    assert few[4].items() <= few[9].items()
    rows = [
        json.loads(line) for line in (ROOT / "megaskip/evaluation/tasks/demo_choice.jsonl").open()
    ]
    for index in (0, 8):
        # The published rule: Random(1234 + index); one more is drawn, should it be the question.
        drawn = random.Random(1234 + index).sample(rows, 4)
        wanted = [row for row in drawn if row != rows[index]][:3]
        texts = [row["prompt"] + row["choices"][row["gold"]] for row in wanted]
        assert few[9][index] == "\n".join([*texts, rows[index]["prompt"]])


def test_dropped_tokens_cost_neither_flops_nor_memory() -> None:
    kept, dropped = (
        run(demo("attn_token", kv=kv), ["demo_answers"], paired=False).outcome["demo_answers"].cost
        for kv in ("keep", "drop")
    )
    assert (kept.flop_ratio, kept.kv_ratio) == (1, 1)
    assert dropped.flop_ratio < 1
    # 4 of 8 layers are routed.
    assert dropped.kv_ratio == pytest.approx(1 - 0.5 * (dropped.skip_ratio or 0))


def test_a_window_is_over_the_text_of_which_a_share_is_kept() -> None:
    model = tiny_model("mistral", sliding_window=4)
    routers = attach_routers(model, RouterConfig(granularity="attn_token", layers="2-4"))
    routers.executor = InferenceExecutor(unit="token", kv="drop")
    cost = CostModel(model, routers).price(16, 1, [8.0] * 3, [16.0] * 3)
    assert (cost.dense_kv, cost.kv) == (6 * 4, 3 * 4 + 3 * 2)
    short = CostModel(model, routers).price(2, 1, [1.0] * 3, [2.0] * 3)
    assert (short.dense_kv, short.kv) == (6 * 2, 3 * 2 + 3 * 1)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "block_sequence"])
def test_what_skips_costs_its_compensation(granularity: str) -> None:
    maps = {"compensation": "low_rank", "compensation_rank": 4}
    prices = []
    for settings in ({}, maps):
        model = tiny_model()
        routers = attach_routers(model, RouterConfig(granularity=granularity, **settings))
        routers.executor = InferenceExecutor(unit=routers.config.unit)
        prices.append(CostModel(model, routers).price(16, 1, [4.0] * 3, [16.0] * 3))
    plain, compensated = prices
    # Of 3 layers, 12 of 16 tokens go through two matrices of 32 x 4.
    assert compensated.flops - plain.flops == 3 * 12 * 2 * (2 * 32 * 4)
    assert (plain.dense_flops, plain.kv) == (compensated.dense_flops, compensated.kv)


@pytest.mark.parametrize("targets", [("attn",), ("mlp",), ("attn", "mlp")])
def test_a_dropped_sublayer_costs_the_map_in_its_place(targets: tuple[str, ...]) -> None:
    prices, counted = [], []
    for maps in (None, {"kind": "low_rank", "rank": 4, targets[0]: [2, 3]}):
        model = tiny_model()
        drop_sublayers(find_decoder(model), dict.fromkeys(targets, [2, 3]), maps)
        prices.append(CostModel(model, None).price(16, 16, [], []))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(whole_ids(1, 16))
        counted.append(counter.get_total_flops())
    assert prices[1].flops - prices[0].flops == counted[1] - counted[0] == 2 * 16 * 2 * (2 * 32 * 4)
    assert prices[1].kv_ratio == (4 / 6 if "attn" in targets else 1)


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens"])
def test_the_length_of_an_answer_is_read_by_every_name(name: str) -> None:
    lm = MegaskipLM(demo(None), TOKENIZER, max_length=64)
    options = {"until": ["\n"], "do_sample": False, name: 4}
    asked = [SimpleNamespace(args=("Say it.", options), task_name="demo_answers", doc_id=0)]
    assert len(lm.generate_until(asked)) == 1
    options[name] = 64
    with pytest.raises(ConfigError, match="may have 64 tokens"):
        lm.generate_until(asked)


def test_an_earlier_reports_dense_answers_are_reused() -> None:
    model = demo()
    first = run(model, ["demo_choice"])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    again = run(model, ["demo_choice"], dense=first.dense)
    assert again.difference("demo_choice", "acc,none") == first.difference(
        "demo_choice", "acc,none"
    )
    assert len(calls) <= 5  # 10 documents x 4 choices in batches of 8, once


def test_what_was_overridden_before_is_overridden_again() -> None:
    model = demo()
    with model.skip_routers.override({model.skip_routers.layers[0]: 0.0}):
        report = run(model, ["demo_text"], limit=2)
        assert model.skip_routers.state.overrides == {model.skip_routers.layers[0]: 0.0}
    assert (report.skip_ratio() or 0) >= 1 / len(model.skip_routers.layers)


def test_intervals_of_means_and_of_other_metrics() -> None:
    ours, theirs = [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]
    gap = difference(ours, theirs, None)
    assert gap.value == 0
    assert gap.high == pytest.approx(1.96 * (2 / 3) ** 0.5 / 2, rel=1e-3)
    assert standard_error(ours, None) == pytest.approx(0.25)
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(200)]
    drawn = standard_error(values, lambda some: sum(some) / len(some))
    assert drawn == pytest.approx(standard_error(values, None), rel=0.1)
    shifted = difference([v + 1 for v in values], values, lambda some: sum(some) / len(some))
    assert (shifted.low, shifted.high) == (pytest.approx(1), pytest.approx(1))


def test_the_table_of_the_demo_tasks() -> None:
    lines = quick_table(demo(), TOKENIZER, limit=2)
    assert [line.split()[0] for line in lines if line.startswith("demo")] == DEMO
    assert "difference" in lines[1]


# -- wrong input


def choice_task(folder: Path, gold: int) -> None:
    (folder / "mine.jsonl").write_text(
        json.dumps({"query": "a", "choices": ["b", "c"], "gold": 0})
        + "\n"
        + json.dumps({"query": "a", "choices": ["b", "c"], "gold": gold})
        + "\n"
    )
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/mine.jsonl}}}}\n"
        "doc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    )


@pytest.mark.parametrize("gold", [2, -1])
def test_an_answer_that_is_no_choice_names_the_document(tmp_path: Path, gold: int) -> None:
    choice_task(tmp_path, gold)
    with pytest.raises(DataError, match=f"task mine, document 1: its answer is {gold}"):
        load_tasks(["mine"], include_path=str(tmp_path))
    assert "mine" in load_tasks(["mine"], include_path=str(tmp_path), limit=1)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    choice_task(tmp_path, 0)
    (tmp_path / "mine.jsonl").unlink()
    with pytest.raises(DataError, match=r"mine\.jsonl"):
        load_tasks(["mine"], include_path=str(tmp_path))
    with pytest.raises(DataError, match="--data_dir DIR"):
        load_tasks(["local_copa"])
    with pytest.raises(DataError, match=r"there is no copa\.jsonl"):
        load_tasks(["local_copa"], data_dir=str(tmp_path))


def test_local_files_with_a_wrong_row_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "copa.jsonl").write_text('{"query": "a", "choices": ["b", "c"]}\n')
    with pytest.raises(DataError, match=r"copa\.jsonl, line 1: lacks gold"):
        load_tasks(["local_copa"], data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gold": None}, "gold is None, expected the number of a choice"),
        ({"gold": 0.5}, "gold is 0.5"),
        ({"choices": None}, "choices is None, expected a list of texts"),
        ({"choices": "ab"}, "choices is 'ab'"),
        ({"choices": ["a", ""]}, r"choices is \['a', ''\]"),
        ({"choices": [1, 2]}, r"choices is \[1, 2\]"),
        ({"query": ""}, "query is '', expected a text"),
    ],
)
def test_values_of_the_wrong_kind_are_named(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    row = {"query": "a", "choices": ["b", "c"], "gold": 0}
    (tmp_path / "copa.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | change))
    with pytest.raises(DataError, match=f"line 2: {says}"):
        load_tasks(["local_copa"], data_dir=str(tmp_path))


def test_a_line_ends_where_it_is_broken_not_at_any_separator(tmp_path: Path) -> None:
    row = {"query": "a\u2028b", "choices": ["b", "c"], "gold": 0}
    (tmp_path / "copa.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    load_tasks(["local_copa"], data_dir=str(tmp_path))


def test_a_chat_format_needs_a_template() -> None:
    bare = load_tokenizer(BASE)
    bare.chat_template = None
    lm = MegaskipLM(demo(None), bare)
    settings = EvalSettings(tasks=("demo_choice",), limit=2, apply_chat_template=True)
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        evaluate_lm(lm, load_tasks(["demo_choice"], limit=2), settings)


def test_files_of_blimp_take_turns(tmp_path: Path) -> None:
    for name in "ab":
        rows = [{"sentence_good": f"{name}{n}", "sentence_bad": "x"} for n in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_tasks(["local_blimp"], data_dir=str(tmp_path))["local_blimp"]
    good = [task.doc_to_choice(document)[0] for _, document in task.doc_iterator()]
    assert good == ["a0", "b0", "a1", "b1"]


def test_beam_search_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"query": "a", "answer": "b"}\n')
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/mine.jsonl}}}}\n"
        "doc_to_text: query\ndoc_to_target: answer\ngeneration_kwargs: {num_beams: 2}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    with pytest.raises(ConfigError, match="num_beams 2"):
        load_tasks(["mine"], include_path=str(tmp_path))


def test_more_examples_than_documents_are_refused() -> None:
    with pytest.raises(ConfigError, match="240 documents"):
        load_tasks(["demo_choice"], num_fewshot=240)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--output", "/nowhere/out.json"], "there is no folder /nowhere"),
        (["--pipeline_stages", "2", "--ds_config", "x"], "choose one"),
        (["--chat_template", "x.jinja"], "is used with --apply_chat_template"),
        (["--limit", "0", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--max_length", "0"], "--max_length 0 must be at least 2"),
        (["--output", str(ROOT)], "is a folder; name a .json file"),
        (["--output", "/proc/out.json"], "/proc/out.json: cannot write there"),
        (["--tasks", " , "], "names no task"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], says: str, tmp_path: Path) -> None:
    usual = ["--model", "demo", "--tasks", "demo", "--output", str(tmp_path / "out.json")]
    with pytest.raises(ConfigError, match=says):
        parse([*usual, *flags])


@pytest.mark.parametrize(("task", "length"), [("demo_answers", 8), ("demo_choice", 1)])
def test_texts_too_short_for_an_answer_are_refused(task: str, length: int) -> None:
    lm = MegaskipLM(demo(None), TOKENIZER, max_length=length)
    found = load_tasks([task], limit=2)
    with pytest.raises(ConfigError, match=f"--max_length {length}"):
        evaluate_lm(lm, found, EvalSettings(tasks=(task,), limit=2))


def test_records_hold_what_metrics_of_many_kinds_hold_and_one_document_has_no_interval() -> None:
    report = run(demo(), ["demo_choice"], limit=1)
    (document,) = report.outcome["demo_choice"].documents
    document.metrics.update({"f1,none": (1, np.int64(2)), "brier_score,none": np.ones((1, 2))})
    (record,) = report._task_json("demo_choice", True)["records"]
    found = json.loads(json.dumps(record))["metrics"]
    assert (found["f1,none"], found["brier_score,none"]) == ([1, 2], [[1.0, 1.0]])
    assert report.difference("demo_choice", "acc,none") is None
    assert len(report.lines()) > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("/nowhere", "no such folder; give"), (str(ROOT / "tests"), r"neither config\.json")],
)
def test_a_folder_that_is_no_model_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_for_inference(name, Placement.on(torch.device("cpu")))


def test_an_unknown_task_ends_with_one_message_and_a_suggestion(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/evaluate.py"), "--model", "demo"]
    command += ["--tasks", "demo_choise", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'demo_choice'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_lm_evals_own_command_line_has_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megaskip.evaluation", "--model", "megaskip"]
    command += ["--model_args", f"pretrained={BASE},dtype=float32", "--tasks", "demo_choice"]
    command += ["--include_path", str(ROOT / "megaskip/evaluation/tasks"), "--limit", "10"]
    command += ["--apply_chat_template", "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    ours = run(demo(None), ["demo_choice"]).outcome["demo_choice"].metrics["acc,none"].value
    assert found["results"]["demo_choice"]["acc,none"] == ours
