"""Data are tokenised once, whole or not at all, split without leaks, streamed in the same order."""

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import CHATML, MARKED, fast_tokenizer, questions, slow_tokenizer, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megaskip.config import DataConfig
from megaskip.data import PackedRow, Row, StreamingRows, TokenizedData, build_dataset
from megaskip.data.corpus import Job, tokenise_all
from megaskip.data.dataset import for_vocabulary
from megaskip.data.tokenize import SampleTokenizer, Tokenised
from megaskip.data.vocabulary import padding_token
from megaskip.errors import DataError

CHATML_WITHOUT_END = CHATML.replace("<|im_end|>\n{% endfor", "{% endfor")
"""An empty answer leaves nothing to learn."""
TOKENISE = "megaskip.data.dataset.tokenise_all"


@pytest.fixture(name="config")
def make_config(tmp_path: Path) -> DataConfig:
    path = write_lines(tmp_path / "qa.jsonl", questions(40))
    return DataConfig(
        data=(path,), held_out=4, seq_length=64, cache_dir=str(tmp_path / "cache"), seed=1
    )


def changed(config: DataConfig, **values: Any) -> DataConfig:
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return DataConfig(**{**fields, **values})


def count(data: TokenizedData) -> int:
    return sum(1 for _ in data.train)


def ids(rows: Iterable[Row | PackedRow]) -> list[list[int]]:
    return [segment.input_ids.tolist() for row in rows for segment in row.segments]


def test_every_sample_is_in_training_or_held_out_and_never_in_both(config: DataConfig) -> None:
    data = build_dataset(config, fast_tokenizer())
    train, held_out = ids(data.train), ids(data.held_out)
    assert (len(train), len(held_out)) == (36, 4)
    assert len({tuple(row) for row in train + held_out}) == 40


def test_held_out_is_at_most_a_fifth(config: DataConfig) -> None:
    assert len(build_dataset(changed(config, held_out=100), fast_tokenizer()).held_out) == 8
    assert len(build_dataset(changed(config, held_out=0), fast_tokenizer()).held_out) == 0


def test_copies_of_held_out_rows_leave_the_training_rows(
    config: DataConfig, tmp_path: Path
) -> None:
    write_lines(tmp_path / "qa.jsonl", questions(30) + questions(30))
    data = build_dataset(config, fast_tokenizer())
    train, held_out = ids(data.train), ids(data.held_out)
    assert len(held_out) == 4 and data.stats.duplicates_of_held_out == 4 and len(train) == 52
    assert not any(row in train for row in held_out)


def test_runs_with_other_seeds_hold_the_same_rows_out(config: DataConfig) -> None:
    one, other = (build_dataset(changed(config, seed=seed), fast_tokenizer()) for seed in (1, 2))
    assert ids(one.held_out) == ids(other.held_out)
    assert ids(one.train) == ids(other.train)  # shuffled by the seed as they are read


def test_own_eval_data_are_taken_whole_and_leave_the_training_data_alone(
    config: DataConfig, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "eval.jsonl", questions(10, start=100))
    data = build_dataset(changed(config, eval_data=(path,)), fast_tokenizer())
    assert (count(data), len(data.held_out)) == (40, 10)
    assert [row.segments[0].source for row in data.held_out] == [1] * 10
    with pytest.raises(DataError, match="held-out data take no weight"):
        build_dataset(changed(config, eval_data=(path + ":2",)), fast_tokenizer())


def test_held_out_rows_that_are_trained_on_are_a_warning(
    config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "eval.jsonl", questions(10, start=35))
    build_dataset(changed(config, eval_data=(path,)), fast_tokenizer())
    assert "5 of 10 held-out rows are trained on, too" in caplog.text
    caplog.clear()
    build_dataset(config, fast_tokenizer())  # carved off: none
    assert "trained on, too" not in caplog.text


def test_stats_add_up(config: DataConfig, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello world " * 200)
    data = build_dataset(changed(config, data=(*config.data, f"{text}:2")), fast_tokenizer())
    rows = [row.segments[0] for part in (data.train, data.held_out) for row in part]
    one, two = data.stats.sources
    assert (one.samples, one.rows, two.samples) == (40, 40, 1)
    assert data.stats.total.rows == 40 + two.rows
    assert data.stats.train_rows == count(data)
    assert data.stats.train_tokens == sum(len(row) for row in data.train)
    assert one.tokens == sum(len(row) for row in rows if row.source == 0)
    assert 0 < one.supervised_fraction < 1 and len(data.stats.lines()) == 3


MIXED = [
    *questions(30),
    *({**row, "id": 1} for row in questions(10)),
    {"question": "what", "answer": ""},
    {"question": "hello " * 80, "answer": "fine"},
]
"""Rows that are used, repeated, without an answer and with one beyond 64 tokens."""


@pytest.fixture
def mixed(config: DataConfig, tmp_path: Path) -> DataConfig:
    """Return a config whose data are a folder with all sorts of losses."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_lines(folder / "train.jsonl", MIXED)
    write_lines(folder / "test.jsonl", questions(9))
    return changed(config, data=(f"{folder}:0.5",), held_out=3)


def test_all_that_is_lost_is_said_by_every_run_on_the_data(
    mixed: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    build_dataset(mixed, fast_tokenizer(CHATML_WITHOUT_END))
    for _ in range(2):  # the second run reads the cache
        caplog.clear()
        with caplog.at_level("INFO", logger="megaskip"):
            stats = build_dataset(mixed, fast_tokenizer(CHATML_WITHOUT_END)).stats
        name = mixed.data[0].removesuffix(":0.5")
        counts, result = stats.lines()
        assert counts.startswith(
            f"data {name}: 42 rows read, 40 used, 2 dropped (1: all that would be learnt lies "
            "beyond --seq_length; 1: no text or assistant turn to learn); "
        )
        assert re.search(r"rows an epoch .*, 3 held out, .* 10 with the same tokens", result)
        assert stats.not_drawn > 0 and "not drawn for weights below 1" in result
        assert [record.message for record in caplog.records][-2:] == [
            f"data {name}: columns that nothing reads: id 24% of the rows",
            f"data {name}: files left out: test split: test.jsonl",
        ]


@pytest.mark.parametrize(("read", "said"), [(None, "the whole stream"), (5, "the first 6 rows")])
def test_a_stream_says_what_was_lost_once_when_it_is_read_or_left(
    mixed: DataConfig, caplog: pytest.LogCaptureFixture, read: int | None, said: str
) -> None:
    streamed = changed(
        mixed, streaming=True, held_out=0, data=(mixed.data[0].removesuffix(":0.5"),)
    )
    with caplog.at_level("INFO", logger="megaskip"):
        data = build_dataset(streamed, fast_tokenizer(CHATML_WITHOUT_END))
        assert data.stats.lines()[0].endswith("read while training")
        assert "files left out: test split: test.jsonl" in caplog.messages[-1]
        assert isinstance(data.train, StreamingRows)
        caplog.clear()
        for _ in range(2):
            list(islice(data.train.skip(1), read))
    counts = [message for message in caplog.messages if "rows read" in message]
    assert len(counts) == 1 and counts[0].startswith(said)
    if read is None:
        assert "42 rows read, 40 used, 2 dropped (1: all that would be" in counts[0]
        assert caplog.messages[-1].endswith("columns that nothing reads: id 24% of the rows")


def test_packing_keeps_every_row_whole_and_held_out_rows_apart(config: DataConfig) -> None:
    loose = build_dataset(config, fast_tokenizer())
    tight = build_dataset(changed(config, packing=True), fast_tokenizer())
    assert sorted(ids(tight.train)) == sorted(ids(loose.train))
    assert ids(tight.held_out) == ids(loose.held_out)
    assert count(tight) < count(loose)
    assert all(row.packed and len(row) <= 64 for row in tight.train)
    assert not any(row.packed for row in tight.held_out)


def test_max_samples_cuts_through_all_sources(config: DataConfig, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "b.jsonl", questions(30, start=100))
    data = build_dataset(
        changed(config, data=(*config.data, other), max_samples=20), fast_tokenizer()
    )
    assert [source.samples for source in data.stats.sources] == [10, 10]


def test_workers_change_nothing_but_the_time(config: DataConfig, tmp_path: Path) -> None:
    write_lines(tmp_path / "qa.jsonl", questions(300))
    alone = build_dataset(config, fast_tokenizer())
    elsewhere = changed(config, tokenize_workers=2, cache_dir=str(tmp_path / "other"))
    shared = build_dataset(elsewhere, fast_tokenizer())
    assert shared.fingerprint == alone.fingerprint
    assert ids(shared.train) == ids(alone.train)


def test_error_in_a_worker_reaches_the_user(config: DataConfig) -> None:
    with pytest.raises(DataError, match=r"qa\.jsonl, line 1: .* has no chat template"):
        build_dataset(changed(config, tokenize_workers=2), fast_tokenizer(None))


def test_nothing_to_learn_is_an_error_and_leaves_no_cache(config: DataConfig) -> None:
    with pytest.raises(DataError, match="no supervised token is left in 40 samples: 40 lost every"):
        build_dataset(changed(config, seq_length=8), fast_tokenizer())
    assert [path.suffix for path in Path(str(config.cache_dir)).iterdir()] == [".lock"]


def test_second_build_reads_the_cache(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_dataset(config, fast_tokenizer())
    monkeypatch.setattr(TOKENISE, never)
    second = build_dataset(config, fast_tokenizer())
    assert ids(first.train) == ids(second.train)
    assert first.stats == second.stats
    assert isinstance(next(iter(second.train)).segments[0].input_ids, np.memmap)


def never(*args: Any, **options: Any) -> None:
    raise AssertionError("tokenised again")


def test_fingerprint_follows_all_that_matters_and_nothing_else(
    config: DataConfig, tmp_path: Path
) -> None:
    tokenizer = fast_tokenizer()
    base = build_dataset(config, tokenizer).fingerprint
    tokenizer("hello", truncation=True, max_length=3)
    assert build_dataset(config, tokenizer).fingerprint == base
    assert build_dataset(changed(config, prompt_tokens=7), tokenizer).fingerprint == base
    (tmp_path / "t.jinja").write_text(CHATML + " ")
    others = [
        build_dataset(changed(config, seq_length=65), tokenizer),
        build_dataset(changed(config, seed=2), tokenizer),
        build_dataset(changed(config, packing=True), tokenizer),
        build_dataset(changed(config, streaming=True), tokenizer),
        build_dataset(changed(config, chat_template=str(tmp_path / "t.jinja")), tokenizer),
        build_dataset(config, fast_tokenizer(MARKED)),
        build_dataset(config, fast_tokenizer(bos=False)),
        build_dataset(config, slow_tokenizer(tmp_path)),
    ]
    write_lines(tmp_path / "qa.jsonl", questions(41))
    others.append(build_dataset(config, tokenizer))
    assert len({base, *(data.fingerprint for data in others)}) == 10


def test_fingerprint_does_not_follow_the_path_by_which_the_data_are_named(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("qa.jsonl", "./qa.jsonl", str(tmp_path / "qa.jsonl"))
    for name in names:
        shown = build_dataset(changed(config, data=(name,)), fast_tokenizer()).stats.lines()
        assert shown[0].startswith(f"data {name}:")
    named, other = (
        {build_dataset(changed(config, data=(n,)), fast_tokenizer()).fingerprint for n in which}
        for which in (names, ("qa.jsonl:2",))
    )
    assert len(named) == 1
    assert named != other


def test_a_cache_that_cannot_be_made_is_one_message(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--cache_dir .*Not a directory"):
        build_dataset(changed(config, cache_dir=str(tmp_path / "file/cache")), fast_tokenizer())


def test_a_disk_that_fills_up_and_a_file_that_grows_are_one_message(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave nothing that passes for the tokens of that file."""

    def written_to(*args: Any, **options: Any) -> Iterator[tuple[int, Tokenised]]:
        yield from tokenise_all(*args, **options)
        with (tmp_path / "qa.jsonl").open("a") as file:
            file.write("\n")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(DataError, match=r"--cache_dir .*cannot be kept there \(File too large"):
            build_dataset(config, fast_tokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with monkeypatch.context() as patch:
        patch.setattr(TOKENISE, written_to)
        with pytest.raises(DataError, match=r"qa\.jsonl: it was written to while it was read"):
            build_dataset(config, fast_tokenizer())
    assert not [path for path in Path(str(config.cache_dir)).iterdir() if path.is_dir()]


def test_a_text_that_the_tokenizer_has_no_tokens_for_is_named(
    config: DataConfig, tmp_path: Path
) -> None:
    words = Tokenizer(models.WordLevel({"b": 0, "c": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    file = tmp_path / "words.jsonl"
    for text in ("c b", "b d"):
        write_lines(file, [{"text": "b c"}] * 5 + [{"text": text}])
        changes = changed(config, data=(str(file),), held_out=0)
        if "d" not in text:
            assert ids(build_dataset(changes, tokenizer).train) == [[0, 1]] * 5 + [[1, 0]]
            continue
        with pytest.raises(
            DataError, match=r"words\.jsonl, line 6: the tokenizer cannot read 'b d'"
        ):
            build_dataset(changes, tokenizer)


def test_damaged_cache_is_noticed(config: DataConfig) -> None:
    data = build_dataset(config, fast_tokenizer())
    path = Path(str(config.cache_dir)) / data.fingerprint / "input_ids.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"input_ids\.bin: the cached data are damaged. Delete the"):
        build_dataset(config, fast_tokenizer())


def build_and_die(config: DataConfig) -> None:
    """Be killed in the middle of tokenising, as by a scheduler."""
    import megaskip.data.dataset as dataset

    def dying(
        jobs: Iterable[Job], tokenizer: SampleTokenizer, *, workers: int
    ) -> Iterator[tuple[int, Tokenised]]:
        yield from islice(tokenise_all(jobs, tokenizer, workers=workers), 5)
        os.kill(os.getpid(), signal.SIGKILL)

    dataset.tokenise_all = dying
    build_dataset(config, fast_tokenizer())


def build_slowly(config: DataConfig, results: Any) -> None:
    """Build, taking half a second to tokenise, and tell whether this process tokenised."""
    import megaskip.data.dataset as dataset

    tokenised = []

    def slow(*args: Any, **options: Any) -> Iterator[tuple[int, Tokenised]]:
        tokenised.append(True)
        time.sleep(0.5)
        return tokenise_all(*args, **options)

    dataset.tokenise_all = slow
    data: TokenizedData = build_dataset(config, fast_tokenizer())
    results.put((bool(tokenised), ids(data.train)))


@pytest.mark.timeout(60)
def test_killed_builder_leaves_nothing_that_passes_for_complete(config: DataConfig) -> None:
    process = multiprocessing.get_context("fork").Process(target=build_and_die, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = list(Path(str(config.cache_dir)).glob("*.tmp-*"))
    assert len(left) == 1
    data = build_dataset(config, fast_tokenizer())
    assert count(data) == 36 and not left[0].exists()


@pytest.mark.timeout(60)
def test_of_two_processes_one_tokenises_and_both_get_the_data(config: DataConfig) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=build_slowly, args=(config, results)) for _ in range(2)]
    for process in processes:
        process.start()
    (first, rows), (second, same_rows) = results.get(timeout=50), results.get(timeout=50)
    for process in processes:
        process.join()
    assert sorted([first, second]) == [False, True]
    assert rows == same_rows and len(rows) == 36


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (1, 3)])
def test_streaming_gives_the_same_rows_in_the_same_order(
    config: DataConfig, tmp_path: Path, weights: tuple[int, int]
) -> None:
    other = write_lines(tmp_path / "b.jsonl", questions(15, start=100))
    data = (f"{config.data[0]}:{weights[0]}", f"{other}:{weights[1]}")
    both = changed(config, data=data, held_out=0)
    stored = build_dataset(both, fast_tokenizer())
    streamed = build_dataset(changed(both, streaming=True), fast_tokenizer())
    assert ids(streamed.train) == ids(stored.train)
    assert ids(streamed.train) == ids(streamed.train)


def test_streaming_holds_out_the_first_rows_at_most_a_fifth(config: DataConfig) -> None:
    twice = changed(config, data=(config.data[0] + ":2",), streaming=True)
    whole = build_dataset(changed(twice, held_out=0), fast_tokenizer())
    data = build_dataset(twice, fast_tokenizer())
    held_out = ids(data.held_out)
    assert held_out == ids(whole.train)[:4]
    assert ids(data.train) == [row for row in ids(whole.train) if row not in held_out]
    assert len(build_dataset(changed(twice, held_out=99), fast_tokenizer()).held_out) == 16


@pytest.mark.parametrize("packing", [False, True])
def test_streaming_resumes_by_skipping(config: DataConfig, packing: bool) -> None:
    data = build_dataset(changed(config, streaming=True, packing=packing), fast_tokenizer())
    assert isinstance(data.train, StreamingRows)
    rows = list(data.train)
    assert ids(data.train.skip(2).skip(1)) == ids(rows[3:])
    assert all(row.packed is packing and len(row) <= 64 for row in rows)


def test_streaming_of_data_without_anything_to_learn_is_an_error(config: DataConfig) -> None:
    data = build_dataset(
        changed(config, streaming=True, seq_length=8, held_out=0), fast_tokenizer()
    )
    with pytest.raises(DataError, match="no supervised token is left in 40 samples"):
        list(data.train)


def test_a_second_process_that_no_lock_holds_back_is_no_problem(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems without locks: while one tokenises, another does so from start to end."""
    nothing = contextlib.nullcontext()
    monkeypatch.setattr("megaskip.data.build_once._locked", lambda path: nothing)
    real, inner = tokenise_all, []

    def tokenise(*args: Any, **kwargs: Any) -> Any:
        if not inner:
            inner.append(None)
            inner[0] = build_dataset(config, fast_tokenizer())
        return real(*args, **kwargs)

    monkeypatch.setattr(TOKENISE, tokenise)
    outer = build_dataset(config, fast_tokenizer())
    assert ids(outer.train) == ids(inner[0].train)
    assert not list(Path(str(config.cache_dir)).glob("*.tmp-*"))


def test_data_that_cannot_be_read_are_not_blamed_on_the_cache(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(TOKENISE, gone)
    with pytest.raises(OSError, match="Stale file handle"):
        build_dataset(config, fast_tokenizer())


@pytest.mark.parametrize("change", [{}, {"streaming": True}, {"streaming": True, "held_out": 0}])
def test_tokens_beyond_the_vocabulary_are_refused(
    config: DataConfig, change: dict[str, Any]
) -> None:
    tokenizer = fast_tokenizer()
    data = build_dataset(changed(config, **change), tokenizer)
    largest = max(token for row in ids(data.train) + ids(data.held_out) for token in row)
    known = for_vocabulary(data, tokenizer, largest + 1)
    assert ids(known.train) == ids(data.train)
    with pytest.raises(DataError, match=f"token {largest} is beyond the model's vocabulary"):
        ids(for_vocabulary(data, tokenizer, largest).train)


def test_padding_that_the_model_does_not_know_is_another_token() -> None:
    tokenizer = fast_tokenizer()
    assert padding_token(tokenizer, 340) == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 340
    assert padding_token(tokenizer, 340) == 0
