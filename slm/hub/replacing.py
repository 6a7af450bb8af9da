"""Folders that are written whole, each beside a report of what it holds, and replace earlier ones.

The report of `export/` is `export.json`. Only what it names is ever replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm.config import ConfigError
from slm.evaluation_results import EVALUATION_FILE
from slm.hub.card import CARD_FILE, read_json
from slm.training.files import write_atomically


def report_file(folder: Path) -> Path:
    """Where the report of a folder lies."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.json")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a folder; empty if there is none."""
    report = read_json(report_file(folder))
    return report if isinstance(report.get("files"), dict) else {}


def write_report(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Write the report of a folder: what was found, and its files; returns it."""
    report = {"path": str(folder), **found, "files": file_sizes(folder)}
    write_atomically(report_file(folder), json.dumps(report, indent=2) + "\n")
    return report


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of each file of a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*"))}


def replacement_problems(folder: Path, source: Path) -> list[str]:
    """What would be lost if a folder made from `source` took the place of `folder`."""
    folder, report = folder.resolve(), report_file(folder)
    problems = []
    if source.resolve().is_relative_to(folder):
        problems.append(f"'{folder}' holds what is to be read, '{source}'")
    known = read_report(folder)
    if report.exists() and not known:
        problems.append(f"'{report}', where the report goes, is something else")
    if not folder.exists():
        return problems
    if not folder.is_dir() or not known:
        return [*problems, f"'{folder}' exists and is not an export"]
    files = known["files"]
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(names - set(files) - {EVALUATION_FILE})
    if foreign:
        problems.append(f"'{folder}' holds what no export has written: {', '.join(foreign)}")
    card = folder / CARD_FILE
    if card.is_file() and card.stat().st_size != files.get(CARD_FILE):
        problems.append(f"'{card}' was changed since; move it away to have it written anew")
    return problems


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` if nothing is raised.

    What a process that was killed has left is cleared away, or put back. Raises ConfigError if
    another process is at it.
    """
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            _clear(folder, new, old)
            new.mkdir()
            try:
                yield new
                if folder.exists():
                    os.rename(folder, old)
                os.rename(new, folder)
            finally:
                _clear(folder, new, old)
    except Timeout:
        raise ConfigError([f"out: '{folder}' is being written by another process"]) from None


def _clear(folder: Path, new: Path, old: Path) -> None:
    """Remove what is left over; the folder as it was comes back if nothing took its place."""
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
