"""Flat copies of modules, so that a folder of files runs without the package they come from.

transformers loads custom code from the files beside a model's config, and follows imports of the
form `from .module import name` within that one folder.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

ALLOWED = sys.stdlib_module_names | {"torch", "transformers"}


def flatten(
    entries: Sequence[str], plugins: Sequence[str] = (), unused: Collection[str] = ()
) -> dict[str, str]:
    """The modules `entries`, and all they import from their own packages, as files by name.

    `slm.operators.attention` becomes `slm_operators_attention.py`, and every import from a package
    of the entries or the plugins a relative one. plugins: modules from elsewhere, which every
    entry imports. unused: modules that the package they lie in need not import. Raises ValueError
    if a module imports something else than these packages, torch, transformers and the standard
    library, or imports it in a form that has no flat one.
    """
    packages = {name.partition(".")[0] for name in (*entries, *plugins)}
    sources: dict[str, str] = {}
    imports: dict[str, set[str]] = {}
    pending = [*entries, *plugins]
    while pending:
        name = pending.pop()
        if name not in sources:
            sources[name], imports[name] = _flat_module(name, packages, unused)
            pending.extend(imports[name])
    for entry in entries:
        # transformers 5.6 copies only the files that an entry imports itself.
        further = _reachable([entry, *plugins], imports) - imports[entry] - {entry}
        lines = [f"from .{_flat(name)} import __name__ as _  # noqa\n" for name in sorted(further)]
        sources[entry] += "\n" + "".join(lines)

    files = {f"{_flat(name)}.py": sources[name] for name in sorted(sources)}
    if len(files) < len(sources):
        raise ValueError(f"modules {', '.join(sources)}: two of them have the same flat name")
    return files


def _reachable(names: Sequence[str], imports: dict[str, set[str]]) -> set[str]:
    """The modules `names` and all that they import, directly or not."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending.extend(imports[name])
    return found


def _flat_module(name: str, packages: set[str], unused: Collection[str]) -> tuple[str, set[str]]:
    """The flat source of a module, and the modules of `packages` that it imports."""
    module = importlib.import_module(name)
    if module.__file__ is None or name == "__main__":
        raise ValueError(f"module '{name}': has no file that can be copied")
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines, imported = source.splitlines(keepends=True), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check_foreign(name, alias.name, packages)
        elif isinstance(node, ast.ImportFrom):
            target = _absolute(node, module.__package__ or "")
            if target.partition(".")[0] not in packages:
                _check_foreign(name, target, packages)
                continue
            if target in unused and target.rpartition(".")[0] == name:
                first, last = node.lineno - 1, node.end_lineno or node.lineno
                lines[first:last] = [""] * (last - first)
                continue
            _check_names(name, target, node)
            imported.add(target)
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = re.sub(
                r"from\s+[\w.]+\s+import", f"from .{_flat(target)} import", line, count=1
            )
    return f"# Generated from the module {name}; made to be read, not to be edited.\n" + "".join(
        lines
    ), imported


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The full name of the module that `node` imports from."""
    if not node.level:
        return node.module or ""
    parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _check_foreign(importer: str, imported: str, packages: set[str]) -> None:
    top = imported.partition(".")[0]
    if top in packages:
        raise ValueError(
            f"module '{importer}': 'import {imported}' has no flat form; "
            f"write 'from {imported} import …'"
        )
    if top not in ALLOWED:
        raise ValueError(
            f"module '{importer}': imports '{imported}'; an exported model may import torch, "
            "transformers and the standard library only"
        )


def _check_names(importer: str, target: str, node: ast.ImportFrom) -> None:
    """Refuse to import a module by name from its package: a flat package holds no modules."""
    module = importlib.import_module(target)
    for alias in node.names:
        # What a package does not define is a module in it.
        if isinstance(getattr(module, alias.name, module), ModuleType):
            raise ValueError(
                f"module '{importer}': 'from {target} import {alias.name}' has no flat form; "
                "import names, not modules"
            )
