"""The code file of an exported folder: the package's own inference modules, joined into one.

Nothing is written twice: what runs in training is what is shipped, and what only training needs is
in modules that are left out. The file imports torch and transformers only.
"""

import ast
import re
from pathlib import Path

from megaskip._version import __version__

CODE = "modeling_megaskip.py"
_MODELS = ("errors", "arch/decoder", "arch/sites", "inference/hf")
_MODULES = {
    "routed": (
        *_MODELS,
        "config/checks",
        "config/router",
        "routing/decision",
        "routing/pooling",
        "routing/executor",
        "routing/kept_units",
        "routing/compensation",
        "routing/router",
        "routing/thresholds",
        "routing/state",
        "routing/gate",
        "routing/routers",
        "arch/sublayer",
        "arch/decision_cache",
        "arch/wiring",
        "inference/kept",
        "inference/packed",
        "inference/executor",
        "inference/routed",
    ),
    "dropped": (*_MODELS, "routing/decision", "inference/kept", "inference/dropped"),
}
"""The modules of an export by its kind, in an order in which each finds what it needs."""
_BLANK_LINES = re.compile(r"\n{3,}")
_BLANK_AFTER_CLASS = re.compile(r"^(class .*:\n)\n", re.MULTILINE)
_DUMMY_BODY = re.compile(r":\n +\.\.\.$", re.MULTILINE)
_HEADER = f'''"""Inference of routed models (Router-Tuning, arXiv 2410.13184) in transformers.

Joined by megaskip {__version__} from its modules, where all is documented; needs torch and
transformers only. Apache-2.0.
"""
'''


def bundled_code(kind: str) -> str:
    """Return the text of the code file for models that are "routed", or have sublayers
    "dropped"."""
    package = Path(__file__).parent.parent
    imports: set[tuple[str, str]] = set()
    owners: dict[str, str] = {}
    bodies = []
    for name in _MODULES[kind]:
        source = (package / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        for defined in _defined_names(tree):
            # Two modules with one private name would silently share it here.
            assert defined not in owners, f"{defined} is in {owners[defined]} and in {name}"
            owners[defined] = name
        imports |= _foreign_imports(tree)
        about = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        bodies.append(f"# -- megaskip/{name}.py: {about}\n{_body(source, tree)}")
    return "\n\n".join([f"{_HEADER}\n{_import_lines(imports)}", *bodies]) + "\n"


def _body(source: str, tree: ast.Module) -> str:
    """Return the text of a module without its imports and documentation: what runs, and why."""
    left_out = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    numbers = {
        number
        for node in [*left_out, *_documentation(tree)]
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.splitlines(), start=1)
    text = "\n".join(line for number, line in lines if number not in numbers).strip()
    text = _BLANK_LINES.sub("\n\n", _DUMMY_BODY.sub(": ...", text))
    return _BLANK_AFTER_CLASS.sub(r"\1", text)


def _documentation(tree: ast.Module) -> list[ast.stmt]:
    """Return the strings that document the module, its classes, functions and fields, but for those
    that are a whole body."""
    return [
        statement
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and len(node.body) > 1
        for statement in node.body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]


def _foreign_imports(tree: ast.Module) -> set[tuple[str, str]]:
    """Return (module, name) of each import that is not the package's own; no module for whole
    ones."""
    pairs = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            pairs |= {("", ast.unparse(alias)) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("megaskip"):
            pairs |= {(node.module or "", ast.unparse(alias)) for alias in node.names}
    return pairs


def _import_lines(imports: set[tuple[str, str]]) -> str:
    """Return the text of imports, one line for each module."""
    plain = [f"import {name}" for module, name in sorted(imports) if not module]
    selective = [
        f"from {module} import {', '.join(sorted(name for of, name in imports if of == module))}"
        for module in sorted({module for module, _ in imports if module})
    ]
    return "\n".join(plain + selective)


def _defined_names(tree: ast.Module) -> list[str]:
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return names
