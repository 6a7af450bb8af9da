"""Measured figures on disk: written whole or not at all, bad files not believed but kept."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from slm.training.files import write_atomically

log = logging.getLogger(__name__)

T = TypeVar("T")


def write_table(path: Path, values: dict[str, Any]) -> None:
    """Write JSON atomically, keeping what was there before as `<name>.previous`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.replace(path, _previous(path))
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_table(path: Path, parse: Callable[[Any], T]) -> T | None:
    """What `parse` makes of the file, or else of the one before it; None if neither is there.

    A file that is not JSON, or that `parse` refuses with ValueError, is named in a warning and
    kept aside as `<name>.bad` (`.bad1`, `.bad2`, …).
    """
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        try:
            return parse(json.loads(candidate.read_bytes()))
        except ValueError as error:
            aside = _aside(candidate)
            os.replace(candidate, aside)
            log.warning("%s: refused (%s); kept as %s", candidate, error, aside.name)
    return None


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def _aside(path: Path) -> Path:
    """The first free name for a bad file."""
    number = 0
    while (aside := path.with_name(f"{path.name}.bad{number or ''}")).exists():
        number += 1
    return aside
