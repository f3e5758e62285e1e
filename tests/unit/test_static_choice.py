"""Which sublayers are dropped for good, by measured capacities, and what cannot be dropped."""

from pathlib import Path
from typing import Any

import pytest
from dropped_models import dropped_from
from families import tiny_model

from megaskip.config.commands.export_static import ExportStaticOptions
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.errors import ConfigError, UnsupportedModelError
from megaskip.export.shards import names_of_dropped
from megaskip.export.static import choose_dropped, sublayers

CAPACITY = {2: 0.6, 3: 0.2, 4: 0.4, 5: 0.2}


def test_layers_are_chosen_by_capacity() -> None:
    assert choose_dropped(CAPACITY, below=0.5) == (3, 4, 5)
    assert choose_dropped(CAPACITY, below=0.4) == (3, 5)
    assert choose_dropped(CAPACITY, count=1) == (5,)
    assert choose_dropped(CAPACITY, count=3) == (3, 4, 5)
    assert choose_dropped(CAPACITY, layers=[5, 2, 5]) == (2, 5)
    assert choose_dropped(CAPACITY, layers=list(CAPACITY)) == (2, 3, 4, 5)
    assert choose_dropped({0: 0.0, **CAPACITY}, count=2) == (3, 5)
    assert sublayers("block", (3, 5)) == {"attn": [3, 5], "mlp": [3, 5]}
    assert sublayers("mlp", (3,)) == {"attn": [], "mlp": [3]}


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({}, "exactly one way .* found none"),
        ({"below": 0.5, "count": 2}, "found --below and --count"),
        ({"below": 0.1}, "drops nothing: the lowest capacity is 0.200, of layer 5"),
        ({"below": 0.9}, r"drops every routed layer \(2-5\)"),
        ({"below": 3.0}, r"--below 3 is outside \(0, 1\]"),
        ({"count": 0}, r"--count 0 is outside \[1, 4\]"),
        ({"count": 9}, r"--count 9 is outside \[1, 4\]"),
        ({"count": 4}, "--count 4 drops every routed layer"),
        ({"layers": [0, 3]}, "layer 0 is never dropped"),
        ({"layers": [3, 9]}, "layer 9 has no router; the routed ones are 2-5"),
        ({"layers": []}, "names no layer"),
    ],
)
def test_wrong_choices_say_what_to_change(way: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_dropped(CAPACITY, **way)


@pytest.mark.parametrize(
    ("dropped", "error", "message"),
    [
        ({"attn": [0]}, ConfigError, "expected one of layers 1 to 5"),
        ({"attn": [6]}, ConfigError, "expected one of layers 1 to 5"),
        ({"attn": []}, ConfigError, "nothing to drop"),
        ({"block": [3]}, ConfigError, "nothing to drop"),
    ],
)
def test_folder_refuses_what_cannot_be_dropped(
    dropped: dict[str, list[int]], error: type[Exception], message: str, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(error, match=message):
        dropped_from(tmp_path, dropped)
    with pytest.raises(ConfigError, match="not one of hf, decilm"):
        dropped_from(tmp_path, {"attn": [3]}, "gguf")


def test_a_format_that_there_is_not_is_refused(tmp_path: Path) -> None:
    routers, text = RouterSource(routers=tmp_path), TextSource()
    with pytest.raises(ConfigError, match="not one of hf, decilm"):
        ExportStaticOptions(source=routers, text=text, output=tmp_path / "out", format="gguf")


def test_tensors_that_are_not_clear_are_refused() -> None:
    text = ["model.layers.3.self_attn.q_proj.weight", "model.norm.weight"]
    assert names_of_dropped(text, {"attn": [3]}) == {text[0]}
    with pytest.raises(UnsupportedModelError, match="2 stacks of layers .*vision.layers"):
        names_of_dropped([*text, "vision.layers.3.self_attn.q_proj.weight"], {"attn": [3]})
    with pytest.raises(UnsupportedModelError, match=r"layer 3 has no .* \(it has self_attn\)"):
        names_of_dropped(text, {"mlp": [3]})
    with pytest.raises(UnsupportedModelError, match="0 stacks"):
        names_of_dropped(["h.3.attn.weight"], {"attn": [3]})
