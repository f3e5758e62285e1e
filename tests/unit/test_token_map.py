"""Token maps: every pair is in the picture, any text is safe to show, wrong input is named."""

import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megaskip.data.tokenizer import load_tokenizer
from megaskip.reporting.token_map import TokenMap, token_map_texts

BACKBONE = Path(__file__).parents[2] / "megaskip" / "demo" / "backbone"


def token_map(tokens: list[str], **changes: Any) -> TokenMap:
    layers = (2, 3, 5)
    ran = np.random.default_rng(0).random((len(layers), len(tokens))) < 0.5
    fields: dict[str, Any] = {
        "tokens": tuple(tokens),
        "layers": layers,
        "ran": ran,
        "num_layers": 6,
        "prompt_tokens": min(3, len(tokens)),
        "title": "a title",
        "target": "attn",
    }
    return TokenMap(**{**fields, **changes})


def html(shown: TokenMap, folder: Path) -> str:
    shown.write_html(folder / "map.html")
    return (folder / "map.html").read_text(encoding="utf-8")


def cells(page: str, state: str) -> int:
    return len(re.findall(rf'<td class="{state}\b', page))


def byte_level(tokens: list[str]) -> Any:
    """A tokenizer with GPT-2's byte table and one special token, the last."""
    special = SimpleNamespace(special=True)
    return SimpleNamespace(
        convert_ids_to_tokens=lambda i: tokens[i] if i < len(tokens) else None,
        convert_tokens_to_ids=lambda token: tokens.index(token) if token in tokens else None,
        added_tokens_decoder={len(tokens) - 1: special},
        decode=lambda ids: "",
    )


def test_html_has_a_cell_for_every_pair_and_says_what_ran(tmp_path: Path) -> None:
    shown = token_map(["The", " cat", " sat", " on", " it"])
    page = html(shown, tmp_path)
    assert cells(page, "ran") == shown.ran.sum()
    assert cells(page, "skipped") == (~shown.ran).sum()
    state = "ran" if shown.ran[2, 1] else "skipped"
    assert f"layer 5, token ' cat': {state}" in unescape(page)
    assert f'<td class="share">{shown.ran[2].mean():.0%}</td>' in page
    assert page.index('<th class="layer">5</th>') < page.index('<th class="layer">2</th>')
    assert page.count("end of the prompt") == 1
    assert "Cut:" not in page


def test_html_needs_no_other_file(tmp_path: Path) -> None:
    page = html(token_map(["a", "b"]), tmp_path)
    assert not re.search(r"<script|<link|src=|href=|url\(|@import|http", page)


def test_text_that_is_markup_or_does_not_print_is_escaped(tmp_path: Path) -> None:
    tokens = ["<script>alert('1')</script>", '"&amp;', " \u4f60", "\n\n", "\t", "\u200b", "\ud800"]
    page = html(token_map(tokens, title="<b>\u00fc</b>"), tmp_path)
    assert "<script>" not in page and "<b>\u00fc" not in page
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in page
    assert "&quot;&amp;amp;" in page
    assert "\u4f60" in page
    for visible in ("\\n\\n</span>\n\n", "\\t", "\\u200b", "\\ud800"):
        assert visible in page


# matplotlib 3.8 calls functions of pyparsing by their old names.
@pytest.mark.filterwarnings("error", r"ignore:.* deprecated - use:DeprecationWarning:matplotlib\._")
@pytest.mark.parametrize("count", [1, 20, 150])
def test_png_is_drawn_without_warnings(tmp_path: Path, count: int) -> None:
    odd = ["$x^2$", "\u4f60\u597d", "\n", "\U0001f600", "$", " \\frac{", "", "\u00e9" * 40]
    shown = token_map([odd[i % len(odd)] for i in range(count)], title="$ \u4f60 _ title " * 9)
    shown.write_png(tmp_path / "map.png")
    picture = imread(tmp_path / "map.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.1


def test_long_texts_are_cut_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = token_map([f"w{i}" for i in range(523)], prompt_tokens=450)
    note = "Cut: the first 400 of 523 tokens; shares are over all 523."
    page = html(shown, tmp_path)
    assert note in page and "w399" in page and "w400" not in page
    assert cells(page, "skipped") == (~shown.ran[:, :400]).sum()
    assert f'<td class="share">{shown.ran[0].mean():.0%}</td>' in page
    assert "end of the prompt" not in page

    written: list[str] = []
    monkeypatch.setattr(
        "megaskip.reporting.token_map_png.Figure.text",
        lambda self, x, y, text, **style: written.append(text),
    )
    shown.write_png(tmp_path / "map.png")
    assert written[-1] == note


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ran": np.ones((2, 4), bool)}, r"ran is bool \(2, 4\), need bool .* \(3, 2\)"),
        ({"ran": np.ones((3, 2))}, r"ran is float64 \(3, 2\), need bool"),
        ({"layers": (2, 3, 6)}, r"\(2, 3, 6\) are not distinct layers of a model of 6"),
        ({"layers": (2, 3, 3)}, "not distinct"),
        ({"prompt_tokens": 3}, "prompt_tokens is 3 of 2 tokens"),
        ({"target": "atn"}, "target 'atn' is not one of attn, mlp, block"),
        ({"layers": (), "ran": np.ones((0, 2), bool)}, "0 layers and 2 tokens"),
    ],
)
def test_fields_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_map(["a", "b"], **{"prompt_tokens": 1, **changes})


def test_sentencepiece_tokens_read_as_text() -> None:
    tokenizer = load_tokenizer(BACKBONE)
    ids = tokenizer("Hello world\n<b> \u00e9", add_special_tokens=True)["input_ids"]
    texts = token_map_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert texts[0] == "<s>"
    assert "".join(texts[1:]).lstrip() == "Hello world\n<b> \\xc3\\xa9"
    assert " world" in texts


def test_byte_level_tokens_read_as_text() -> None:
    tokens = [
        "\u0120",
        "\u0120cat",
        "\u010a",
        "caf\u00c3\u00a9",
        "\u00e4\u00bd",
        "<\uff5cend\uff5c>",
    ]
    expected = (" ", " cat", "\n", "caf\u00e9", "\\xe4\\xbd", "<\uff5cend\uff5c>", "<6>")
    assert token_map_texts(byte_level(tokens), range(len(tokens) + 1)) == expected
