"""A token map as one HTML page."""

from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np

from megaskip.reporting.token_map import (
    SHOWN_TOKENS,
    TokenMap,
    cut_note,
    deepest_first,
    label,
    shows_prompt_end,
    summary,
    visible,
)


def page(shown: TokenMap) -> str:
    """Return a token map as one HTML page that needs no other file."""
    note = cut_note(shown)
    share_of_token = shown.ran.mean(axis=0)
    return _PAGE.format(
        css=_CSS,
        title=escape(visible(shown.title)),
        summary=escape(summary(shown)),
        prompt_end=_PROMPT_END if shows_prompt_end(shown) else "",
        note=f'<p class="note">{escape(note)}</p>' if note else "",
        text="".join(_text(shown, share_of_token)),
        head="".join(_heads(shown)),
        rows="\n".join(_row(shown, row) for row in deepest_first(shown)),
    )


def _last_of_prompt(shown: TokenMap, token: int) -> bool:
    return token + 1 == shown.prompt_tokens and shows_prompt_end(shown)


def _text(shown: TokenMap, shares: np.ndarray[Any, Any]) -> Iterator[str]:
    for index, token in enumerate(shown.tokens[:SHOWN_TOKENS]):
        hover = f"token {index + 1}: {shares[index]:.0%} of the routed layers ran"
        breaks = "\n" * token.count("\n")
        yield (
            f'<span style="--share:{shares[index]:.3f}" title="{hover}">'
            f"{escape(visible(token))}</span>{breaks}"
        )
        if _last_of_prompt(shown, index):
            yield '<b title="the prompt ends here"></b>'


def _heads(shown: TokenMap) -> Iterator[str]:
    for index, token in enumerate(shown.tokens[:SHOWN_TOKENS]):
        end = ' class="end"' if _last_of_prompt(shown, index) else ""
        hover = escape(f"token {index + 1}: '{visible(token)}'")
        yield f'<th{end} title="{hover}"><span>{escape(label(token))}</span></th>'


def _row(shown: TokenMap, row: int) -> str:
    layer, ran = shown.layers[row], shown.ran[row]
    cells = [f'<th class="layer">{layer}</th><td class="share">{ran.mean():.0%}</td>']
    for index, token in enumerate(shown.tokens[:SHOWN_TOKENS]):
        state = "ran" if ran[index] else "skipped"
        end = " end" if _last_of_prompt(shown, index) else ""
        hover = escape(f"layer {layer}, token '{visible(token)}': {state}")
        cells.append(f'<td class="{state}{end}" title="{hover}"></td>')
    return f"<tr>{''.join(cells)}</tr>"


_CSS = """\
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --faint: #5d6670;
  --line: #d5dae0; --ran: #2b6ca3; --skipped: #f3d7a4; --end: #c8102e; --tint: 43, 108, 163; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e8ebee; --faint: #9aa5b1; --line: #38414b;
    --ran: #5aa2dd; --skipped: #594421; --end: #ff6b7f; --tint: 90, 162, 221; } }
body { margin: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.25rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; }
.note, .legend { color: var(--faint); }
.legend i { display: inline-block; width: 1em; height: 1em; margin: 0 .35em 0 1em;
  vertical-align: -.12em; border-radius: 2px; }
.legend i:first-child { margin-left: 0; }
.legend i.line { width: 3px; background: var(--end); }
.legend i.shades { width: 6em;
  background: linear-gradient(90deg, rgba(var(--tint), 0), rgba(var(--tint), .6));
  outline: 1px solid var(--line); }
.text { margin: 1rem 0; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 6px;
  font: 14px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 22rem; overflow-y: auto; }
.text span { background: rgba(var(--tint), calc(var(--share) * .6)); padding: .15em 0;
  border-radius: 2px; box-shadow: inset -1px 0 var(--page); }
.text b { border-left: 3px solid var(--end); margin: 0 2px; padding: .15em 0; }
.scroll { overflow: auto; max-height: 92vh; padding-bottom: .7rem; }
table { border-spacing: 1px; font-size: 12px; font-variant-numeric: tabular-nums; }
th { font-weight: normal; }
thead th { vertical-align: bottom; padding: 0 0 3px; position: sticky; top: 0; z-index: 2;
  background: var(--page); }
thead span { writing-mode: vertical-rl; text-orientation: sideways; transform: rotate(180deg);
  font: 11px/16px ui-monospace, monospace; white-space: pre; display: inline-block; }
tbody td.ran, tbody td.skipped { min-width: 16px; height: 16px; padding: 0; border-radius: 2px; }
.ran { background: var(--ran); }
.skipped { background: var(--skipped); }
td.end, th.end { border-right: 3px solid var(--end); }
.layer, .share { position: sticky; background: var(--page); text-align: right; padding: 0 .5em;
  min-width: 2.6em; max-width: 2.6em; z-index: 1; box-shadow: 0 0 0 2px var(--page); }
.layer { left: 0; }
.share { left: calc(3.6em + 1px); color: var(--faint); }
thead .layer, thead .share { padding-bottom: 3px; z-index: 3; }
"""

_PROMPT_END = '<i class="line"></i>end of the prompt'

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<p class="legend"><i class="ran"></i>ran <i class="skipped"></i>skipped {prompt_end}
<i class="shades"></i>in the text: share of the routed layers that ran the token, 0 to 100%</p>
{note}
<div class="text">{text}</div>
<div class="scroll">
<table>
<thead><tr><th class="layer">layer</th><th class="share">ran</th>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</body>
</html>
"""
