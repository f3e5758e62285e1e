"""Of a folder or pattern the wanted split is read, and what is left out has a reason."""

import gzip
from pathlib import Path

import datasets
import pytest
from data_samples import read_rows, write_lines

from megaskip.data.folder import summarise
from megaskip.data.source import Source, find_source
from megaskip.errors import DataError


def make_files(folder: Path, *names: str) -> Path:
    """Write files with one row each, which holds the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, [{"text": name}])
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([{"text": name}]).to_parquet(str(path))
    return folder


def names_read(source: Source) -> list[str]:
    return [fields["text"] for _, fields in read_rows(source)]


def reasons(source: Source) -> dict[str, str]:
    return {item.name: item.reason for item in source.left_out}


@pytest.mark.parametrize(
    ("read", "left_out"),
    [
        (["a.jsonl", "b.ndjson", "c.jsonl.gz", "sub/d.jsonl"], {}),
        (
            ["data/train-00000-of-00001.parquet"],
            {
                "data/test-00000-of-00001.parquet": "test split",
                "data/validation-00000-of-00001.parquet": "validation split",
                "README.md": "describes the data",
                "LICENSE.txt": "describes the data",
                "dataset_infos.json": "describes the data",
                ".gitattributes": "hidden",
            },
        ),
        (
            ["main/train.jsonl", "socratic/train/0.jsonl"],
            {"main/test.jsonl": "test split", "socratic/dev/0.jsonl": "validation split"},
        ),
        (
            ["my_train.jsonl", "contest.jsonl", "evaluator.jsonl", "train_val_mix.jsonl"],
            {
                "my_test.jsonl": "test split",
                "Eval 2.jsonl": "test split",
                "VAL.jsonl": "validation split",
                "x-dev-1.jsonl": "validation split",
                "held_out.jsonl": "held-out split",
            },
        ),
        (
            ["train.jsonl"],
            {
                ".ipynb_checkpoints": "hidden",
                "__MACOSX": "hidden",
                "._train.jsonl": "hidden",
                "train.jsonl.gz": "a compressed copy of a file beside it",
                "train.jsonl~": "not a kind of file that is read",
            },
        ),
    ],
)
def test_training_split_of_a_folder_is_read_and_the_rest_has_a_reason(
    tmp_path: Path, read: list[str], left_out: dict[str, str]
) -> None:
    folders = {".ipynb_checkpoints", "__MACOSX"}
    files = [f"{name}/train.jsonl" if name in folders else name for name in left_out]
    source = find_source(str(make_files(tmp_path, *read, *files)))
    assert sorted(names_read(source)) == sorted(read)
    assert reasons(source) == left_out


def test_held_out_data_are_the_held_out_splits_of_a_folder(tmp_path: Path) -> None:
    folder = make_files(tmp_path, "train.jsonl", "more.jsonl", "test/0.jsonl", "valid.jsonl")
    source = find_source(str(folder), held_out=True)
    assert names_read(source) == ["test/0.jsonl", "valid.jsonl"]
    assert set(reasons(source).values()) == {"kept for training"}
    (folder / "valid.jsonl").unlink()
    (folder / "test" / "0.jsonl").unlink()
    assert names_read(find_source(str(folder), held_out=True)) == ["more.jsonl", "train.jsonl"]


def test_folder_without_a_training_split_says_what_it_holds(tmp_path: Path) -> None:
    folder = make_files(tmp_path, "test/a.jsonl", "test/b.jsonl", ".old/train.jsonl")
    message = (
        r"nothing to train on \(hidden: \.old; test split: test/a\.jsonl, test/b\.jsonl\); "
        r"expected files .* give its own path"
    )
    with pytest.raises(DataError, match=message):
        find_source(str(folder))
    assert len(names_read(find_source(str(folder / "test")))) == 2
    assert names_read(find_source(str(folder / ".old"))) == [".old/train.jsonl"]


CARD = """---
license: mit
configs:
- config_name: first
  data_files:
  - split: train_sft
    path: "a/part*"
  - split: test_sft
    path: [a/rest.jsonl]
- config_name: second
  data_dir: b
{more}---
# A data set
"""


def test_card_of_a_hub_data_set_tells_subsets_and_splits(tmp_path: Path) -> None:
    folder = make_files(
        tmp_path / "set [1]", "a/part-1.jsonl", "a/rest.jsonl", "b/c.jsonl", "d.txt"
    )
    (folder / "README.md").write_text(CARD.format(more=""))
    with pytest.raises(DataError, match=r"several subsets; name one of .*/first, .*/second"):
        find_source(str(folder))
    source = find_source(str(folder / "first:2"))
    assert names_read(source) == ["a/part-1.jsonl"] and source.weight == 2
    assert reasons(source) == {
        "README.md": "describes the data",
        "a/rest.jsonl": "test split",
        "b/c.jsonl": "not of the subset first",
        "d.txt": "not of the subset first",
    }
    assert names_read(find_source(str(folder / "first"), held_out=True)) == ["a/rest.jsonl"]
    assert names_read(find_source(str(folder / "second"))) == ["b/c.jsonl"]
    (folder / "README.md").write_text(CARD.format(more="  default: true\n"))
    assert names_read(find_source(str(folder))) == ["b/c.jsonl"]
    for head, message in (
        ("configs: [", "its head is not YAML"),
        ("date: 2024-99-99", "its head is not YAML"),
        ("a: " + "[" * 1000, "its head is not YAML"),
        ("configs: 5", "configs in its head is 5, expected a list"),
        ("configs: [{data_files: {train: 5}}]", "data_files of default in its head is 5, expected"),
        ("configs: [{data_files: [{path: null}]}]", "data_files of default in its head is None"),
    ):
        (folder / "README.md").write_text(f"---\n{head}\n---\n")
        with pytest.raises(DataError, match=rf"README\.md: {message}"):
            find_source(str(folder))


@pytest.mark.parametrize("head", ["", "# Notes\n---\nx: [\n---\n", "---\nlicense: mit\n---\n"])
def test_readme_without_subsets_changes_nothing(tmp_path: Path, head: str) -> None:
    folder = make_files(tmp_path, "a.jsonl", "test.jsonl")
    (folder / "README.md").write_text(head)
    assert names_read(find_source(str(folder))) == ["a.jsonl"]


def test_links_to_files_are_read_and_links_to_folders_are_named(tmp_path: Path) -> None:
    make_files(tmp_path, "there/a.jsonl", "here/b.jsonl")
    (tmp_path / "here" / "c.jsonl").symlink_to(tmp_path / "there" / "a.jsonl")
    (tmp_path / "here" / "d.jsonl").symlink_to(tmp_path / "there" / "no.jsonl")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    source = find_source(str(tmp_path / "here"))
    assert names_read(source) == ["here/b.jsonl", "there/a.jsonl"]
    assert set(reasons(source)) == {"d.jsonl", "loop"}


def test_saved_data_sets_are_read_whole_and_by_split(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_list([{"text": name}] * 3) for name in ("a", "b"))
    train.filter(lambda row, index: index > 0, with_indices=True).save_to_disk(tmp_path / "one")
    assert names_read(find_source(str(tmp_path / "one"))) == ["a", "a"]
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    source = find_source(str(tmp_path / "both"))
    assert names_read(source) == ["a"] * 3
    assert reasons(source) == {"dataset_dict.json": "describes the data", "test": "test split"}
    assert names_read(find_source(str(tmp_path / "both"), held_out=True)) == ["b"] * 3
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"one: not a readable folder of Dataset\.save_to_disk"):
        names_read(find_source(str(tmp_path / "one")))


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ("*.jsonl", ["a.jsonl", "train.jsonl"]),
        ("data/*", ["data/train-0.parquet"]),
        ("**/*.parquet", ["data/train-0.parquet"]),
        ("data/test-*.parquet", ["data/test-0.parquet"]),
        ("[at]*.jsonl:2", ["a.jsonl", "train.jsonl"]),
        ("dat?", ["data/train-0.parquet"]),
    ],
)
def test_pattern_reads_the_files_that_fit_and_no_held_out_split_unless_it_names_it(
    tmp_path: Path, pattern: str, read: list[str]
) -> None:
    names = ["a.jsonl", "train.jsonl", "test.jsonl", "data/train-0.parquet", "data/test-0.parquet"]
    source = find_source(str(make_files(tmp_path, *names, "data/x.md") / pattern))
    assert names_read(source) == read
    assert source.weight == (2 if pattern.endswith(":2") else 1)


def test_pattern_that_fits_nothing_is_no_file(tmp_path: Path) -> None:
    make_files(tmp_path, "test.txt", "b.md")
    with pytest.raises(DataError, match=r"nothing to train on \(test split: test\.txt\)"):
        find_source(str(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"data '.*\*\.jsonl': no such file or folder"):
        find_source(str(make_files(tmp_path, "a.txt") / "*.jsonl"))


def test_what_is_left_out_is_said_on_one_line(tmp_path: Path) -> None:
    names = [f"test-{index}.jsonl" for index in range(5)]
    source = find_source(str(make_files(tmp_path, "a.jsonl", "b.md", *names)))
    assert summarise(source.left_out) == (
        "not a kind of file that is read: b.md; "
        "test split: test-0.jsonl, test-1.jsonl, test-2.jsonl and 2 more"
    )
