"""The code file of an exported folder: the package's own inference modules, joined into one.

Nothing is written twice: what runs in training is what is shipped, and what only training needs is
in modules that are left out. The file imports torch and transformers only.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import filterfalse
from pathlib import Path

from megaskip._version import __version__

CODE = "modeling_megaskip.py"
_MODELS = ("errors", "arch/decoder", "arch/sites", "inference/hf")
_MODULES = {
    "routed": (
        *_MODELS,
        "config/value_types",
        "config/checks",
        "config/routing",
        "routing/copies",
        "routing/precision",
        "routing/decision",
        "routing/pooling",
        "routing/executor",
        "routing/kept_units",
        "routing/experts",
        "routing/compensation",
        "routing/router",
        "routing/thresholds",
        "routing/state",
        "routing/gate",
        "routing/routers",
        "arch/sublayer",
        "arch/experts",
        "arch/decision_cache",
        "arch/wiring",
        "inference/kept",
        "inference/packed",
        "inference/shared_rows",
        "inference/executor",
        "inference/static_decode",
        "inference/routed",
    ),
    "dropped": (
        *_MODELS,
        "routing/copies",
        "routing/precision",
        "routing/decision",
        "inference/kept",
        "inference/dropped",
    ),
}
"""The modules of an export by its kind, in an order in which each finds what it needs."""
_ROOTS = {
    "routed": ("MegaskipConfig", "MegaskipForCausalLM", "MegaskipModel"),
    "dropped": ("MegaskipConfig", "DroppedForCausalLM", "DroppedDecoder"),
}
"""What transformers asks the file for; a definition that these do not need is left out."""
_BLANK_LINES = re.compile(r"\n{3,}")
_BLANK_AFTER_CLASS = re.compile(r"^(class .*:\n)\n", re.MULTILINE)
_DUMMY_BODY = re.compile(r":\n +\.\.\.$", re.MULTILINE)
_HEADER = f'''"""Inference of models that skip (Router-Tuning, arXiv 2410.13184) in transformers.

Joined by megaskip {__version__} from its modules, where all is documented; needs torch and
transformers only. Apache-2.0.
"""
# What type checkers alone read is left out: protocols, and types of attributes without a value.
from __future__ import annotations
'''


def bundled_code(kind: str) -> str:
    """Return the text of the code file for models that are "routed", or have sublayers
    "dropped"."""
    package = Path(__file__).parent.parent
    sources = {name: (package / f"{name}.py").read_text("utf-8") for name in _MODULES[kind]}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    used = _used_names(trees, _ROOTS[kind])
    sections = []
    for name, tree in trees.items():
        about = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        sections.append(f"# -- megaskip/{name}.py: {about}\n{_body(sources[name], tree, used)}")
    return "\n\n".join([f"{_HEADER}\n{_imports(trees.values(), used)}", *sections]) + "\n"


def _used_names(trees: Mapping[str, ast.Module], roots: Sequence[str]) -> set[str]:
    """Return the names that `roots` need, directly or through others; `trees` are by module."""
    statements: dict[str, ast.stmt] = {}
    for module, tree in trees.items():
        for statement in filterfalse(_is_protocol, tree.body):
            for name in _defined_names(statement):
                # Two modules with one private name would silently share it here.
                assert name not in statements, f"{name} of {module}.py is in another module, too"
                statements[name] = statement
    used: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in used:
            used.add(name)
            nodes = ast.walk(statements[name]) if name in statements else ()
            waiting += [node.id for node in nodes if isinstance(node, ast.Name)]
    return used


def _body(source: str, tree: ast.Module, used: set[str]) -> str:
    """Return the text of a module without its imports and documentation and without definitions
    that are not `used`: what runs, and why."""
    left_out = _for_readers(tree)
    for node in tree.body:
        if _is_protocol(node) or not used.intersection(_defined_names(node)):
            left_out.append(node)
    numbers = {number for node in left_out for number in _line_numbers(node)}
    lines = enumerate(source.splitlines(), start=1)
    text = "\n".join(line for number, line in lines if number not in numbers).strip()
    text = _BLANK_LINES.sub("\n\n", _DUMMY_BODY.sub(": ...", text))
    return _BLANK_AFTER_CLASS.sub(r"\1", text)


def _is_protocol(node: ast.stmt) -> bool:
    """Return whether a statement is a class that says what others have, and is none of theirs."""
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in bases)


def _line_numbers(node: ast.stmt) -> range:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return range(first, (node.end_lineno or node.lineno) + 1)


def _for_readers(tree: ast.Module) -> list[ast.stmt]:
    """Return the strings that document the module, its classes, functions and fields, and what
    classes say of their attributes' types, but for a first one that nothing else follows."""
    left_out: list[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            here = [statement for statement in node.body if _is_for_readers(statement, node)]
            left_out += here if len(here) < len(node.body) else here[1:]
    return left_out


def _is_for_readers(statement: ast.stmt, parent: ast.AST) -> bool:
    if isinstance(statement, ast.AnnAssign):
        has_fields = "dataclass" in map(_decorator, getattr(parent, "decorator_list", []))
        return isinstance(parent, ast.ClassDef) and statement.value is None and not has_fields
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _decorator(node: ast.expr) -> str:
    return ast.unparse(node).split("(")[0]


def _imports(trees: Iterable[ast.Module], used: set[str]) -> str:
    """Return the text of the imports that are `used` and not the package's own, one line for each
    module."""
    plain: set[str] = set()
    selective: defaultdict[str, set[str]] = defaultdict(set)
    for node in (statement for tree in trees for statement in tree.body):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = {ast.unparse(a) for a in node.names if (a.asname or a.name.split(".")[0]) in used}
        if isinstance(node, ast.Import):
            plain |= names
        elif names and node.module and not node.module.startswith("megaskip"):
            selective[node.module] |= names
    lines = [f"import {name}" for name in sorted(plain)]
    for module in sorted(selective):
        lines.append(f"from {module} import {', '.join(sorted(selective[module]))}")
    return "\n".join(lines)


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
