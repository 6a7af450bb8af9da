"""Operators of a user's own: Python files, or modules, imported before their names are read."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path

from slm.config import ConfigError
from slm.operators import OPERATORS, Operator

# Of the sources of every plugin that this process has imported, by the module's name.
_digests: dict[str, str] = {}
# What each was imported by, by the module's name.
_sources: dict[str, str] = {}


def load_plugins(plugins: Sequence[str]) -> None:
    """Import each plugin once: the path of a `.py` file, or the name of an importable module.

    A file becomes a module under its own name, so that an export can copy it. Raises ConfigError
    with one line for each that cannot be imported; none of its operators is known then.
    """
    problems = []
    for plugin in plugins:
        try:
            _load(plugin)
        except ConfigError as error:
            problems += [f"plugins: '{plugin}': {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def loaded_plugins() -> tuple[str, ...]:
    """What `load_plugins` has imported: the whole paths of files, the names of modules."""
    return tuple(_sources[name] for name in _digests)


def plugin_digests() -> dict[str, str]:
    """Digest of each plugin's sources as they were imported, by the module's name."""
    return dict(_digests)


def _load(plugin: str) -> None:
    file = Path(plugin).resolve() if plugin.endswith(".py") else None
    name = plugin if file is None else file.stem
    if file is not None:
        _check_file(file, name)
    if name in _digests:
        return
    known = dict(OPERATORS)
    try:
        if file is None:
            importlib.import_module(name)
        else:
            _import_file(file, name)
        _refuse_replacements(known)
    except (Exception, SystemExit) as error:  # whatever a user's code does is said in one line
        sys.modules.pop(name, None)
        OPERATORS.clear()
        OPERATORS.update(known)
        raise ConfigError([_describe(error, file)]) from error
    _digests[name] = _digest(name)
    _sources[name] = name if file is None else str(file)


def _check_file(file: Path, name: str) -> None:
    """Raise ConfigError if the file is not there, or cannot be a module of this name."""
    if not file.is_file():
        raise ConfigError(["no such file"])
    if not name.isidentifier():
        raise ConfigError(["a module's name has letters, digits and _ only; rename the file"])
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() != file:
        raise ConfigError([f"'{name}' is another module, {spec.origin}; rename the file"])


def _import_file(file: Path, name: str) -> None:
    # Not by the loader alone, which would leave a folder of compiled code beside the user's file.
    loader = SourceFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(loader.source_to_code(file.read_bytes(), str(file)), module.__dict__)


def _refuse_replacements(known: Mapping[str, type[Operator]]) -> None:
    """Raise ValueError if an operator that was known has become another class."""
    for name, operator in known.items():
        if OPERATORS[name] is not operator:
            raise ValueError(f"operator name '{name}' is taken by {operator.__module__}")


def _describe(error: BaseException, file: Path | None) -> str:
    """What went wrong, and where in the file, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file is not None and frame.filename == str(file)]
    where = f"line {lines[-1]}: " if lines else ""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{where}{type(error).__name__}: {message}"


def _digest(name: str) -> str:
    """Digest of the sources of a module and of what is imported from its package."""
    package = name.partition(".")[0]
    digest = hashlib.sha256()
    for other, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if other.partition(".")[0] == package and file is not None:
            digest.update(f"{other}\0".encode())
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:12]
