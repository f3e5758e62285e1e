"""The code file of an exported folder: the package's own inference modules, joined into one.

Nothing is written twice: what runs in training is what is shipped. The file imports torch and
transformers only.
"""

import ast
from pathlib import Path

from megaskip._version import __version__

CODE = "modeling_megaskip.py"
_MODULES = (
    "errors",
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
    "arch/decoder",
    "arch/sites",
    "arch/sublayer",
    "arch/decision_cache",
    "inference/kept",
    "inference/packed",
    "inference/executor",
    "arch/wiring",
    "inference/dropped",
    "inference/hf",
)
_HEADER = f'''"""Inference of routed models (Router-Tuning, arXiv 2410.13184) in transformers.

Joined by megaskip {__version__} from its modules; needs torch and transformers only. Apache-2.0.
"""
'''


def bundled_code() -> str:
    """Return the text of the code file."""
    package = Path(__file__).parent.parent
    imports: set[str] = set()
    owners: dict[str, str] = {}
    bodies = []
    for name in _MODULES:
        source = (package / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        for defined in _defined_names(tree):
            # Two modules with one private name would silently share it here.
            assert defined not in owners, f"{defined} is in {owners[defined]} and in {name}"
            owners[defined] = name
        imports |= _foreign_imports(tree)
        bodies.append(f"# -- {name}.py\n\n{_body(source, tree)}")
    plain = sorted(line for line in imports if line.startswith("import "))
    selective = sorted(line for line in imports if not line.startswith("import "))
    return "\n\n".join([_HEADER + "\n" + "\n".join(plain + selective), *bodies]) + "\n"


def _body(source: str, tree: ast.Module) -> str:
    """Return the text of a module without its docstring and imports."""
    lines = source.splitlines()
    for node in tree.body:
        if _is_left_out(node):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return "\n".join(lines).strip()


def _is_left_out(node: ast.stmt) -> bool:
    is_docstring = isinstance(node, ast.Expr) and node.lineno == 1
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, (ast.Import, ast.ImportFrom)) or is_docstring or for_types


def _foreign_imports(tree: ast.Module) -> set[str]:
    """Return one line for each imported name that is not the package's own."""
    lines = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            lines |= {f"import {ast.unparse(alias)}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("megaskip"):
            lines |= {f"from {node.module} import {ast.unparse(alias)}" for alias in node.names}
    return lines - {"from typing import TYPE_CHECKING"}


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
