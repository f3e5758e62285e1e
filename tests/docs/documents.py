"""What the documents say to a reader who types along: commands, Python blocks, links, flags, paths.

Knows Markdown, not what the commands do.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "launch/README.md",
        ROOT / "megaskip/demo/README.md",
        ROOT / "tests/golden/README.md",
    )
)
PROGRAMS = ("megaskip", "python", "deepspeed", "torchrun", "bash", "sbatch")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SETTINGS = re.compile(r"\w+=\S*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block."""

    document: str
    line: int
    """Of its first line, from 1."""
    language: str
    text: str

    @property
    def name(self) -> str:
        """Return where it stands, as tests are named."""
        return f"{self.document}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command, as a shell would split it."""

    document: str
    line: int
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    is_typed: bool
    """Whether it stands in a block, to be typed, and not in a sentence."""

    @property
    def name(self) -> str:
        """Return where it stands and how it begins, as tests are named."""
        return f"{self.document}:{self.line} {' '.join(self.words[:3])}"


def text_of(document: str) -> str:
    """Return the text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[Block]:
    """Return the fenced blocks of a language, without the indentation of the fence."""
    text = text_of(document)
    return [
        Block(
            document=document,
            line=text[: match.start(3)].count("\n") + 1,
            language=language,
            text="\n".join(row.removeprefix(match.group(1)) for row in match.group(3).splitlines()),
        )
        for match in _FENCE.finditer(text)
        if match.group(2) == language
    ]


def commands(document: str) -> list[Command]:
    """Return what a reader may type: lines of bash blocks, and commands with arguments in text."""
    typed: list[Command] = []
    for block in blocks(document, "bash"):
        for offset, row in _joined(block.text):
            typed += _command(document, block.line + offset, row, is_typed=True)
    for line, code in inline_code(document):
        words = code.split()
        if words[0] in PROGRAMS and len(words) > 1:
            typed += _command(document, line, " ".join(words), is_typed=False)
    return typed


def inline_code(document: str) -> list[tuple[int, str]]:
    """Return (line, code) of each span of code in the text."""
    prose = _prose(document)
    spans = ((prose[: m.start()].count("\n") + 1, m.group(1)) for m in _INLINE.finditer(prose))
    return [(line, code) for line, code in spans if code.strip()]


def links(document: str) -> list[str]:
    """Return the targets of a document's links, of pictures too."""
    return _LINK.findall(_prose(document))


def anchors(document: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags(document: str) -> set[str]:
    """Return the flags that a document names, in blocks and in the text."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(document)))


def _prose(document: str) -> str:
    """Return the text with fenced blocks blanked out, line for line."""
    return _FENCE.sub(lambda match: "\n" * match.group().count("\n"), text_of(document))


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Yield (offset of the first line, command) of a bash block, continued lines joined."""
    begun, first = "", 0
    for offset, row in enumerate(text.splitlines()):
        first = first if begun else offset
        begun += row.strip()
        if begun.endswith("\\"):
            begun = begun[:-1] + " "
            continue
        yield first, begun
        begun = ""


def _command(document: str, line: int, row: str, *, is_typed: bool) -> list[Command]:
    words = shlex.split(row, comments=True)
    settings: list[tuple[str, str]] = []
    while words and words[0] != "export" and _SETTINGS.fullmatch(words[0]):
        name, _, value = words.pop(0).partition("=")
        settings.append((name, value))
    if not words:
        return []
    command = Command(
        document=document,
        line=line,
        words=tuple(words),
        environment=tuple(settings),
        is_typed=is_typed,
    )
    return [command]
