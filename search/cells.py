"""The cells of a study: one measurement, or one training with one seed.

A cell is stored as a file of its own the moment it is known, so that a study which was stopped,
however, goes on with the next one. A cell that failed holds `error`, its reason; delete its file to
try it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.run_folder import write_json
from search.study import flatten
from slm.architecture import Architecture
from slm.config import ConfigError

Cell = dict[str, Any]


class CellStore:
    """The cells and facts of the study in a folder."""

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any]) -> None:
        """Open a study's folder, or make it.

        identity: what must be the same for cells to be comparable. Raises ConfigError, saying what
        differs, if the study was made with another one.
        """
        self._cells = folder / "cells"
        self._cells.mkdir(parents=True, exist_ok=True)
        wanted = flatten(identity)
        stored = flatten(self.settle("identity", wanted))
        problems = [
            f"{key}: the study '{name}' was made with {stored.get(key)!r}, now it is "
            f"{wanted.get(key)!r}; choose another name, or the old value"
            for key in stored | wanted
            if stored.get(key) != wanted.get(key)
        ]
        if problems:
            raise ConfigError(problems)

    def settle(self, key: str, value: Cell) -> Cell:
        """Store a cell unless it is known; the cell as stored."""
        if not self._path(key).exists():
            write_json(self._path(key), value)
        cell = self.get(key)
        assert cell is not None, key
        return cell

    def get(self, key: str) -> Cell | None:
        """A cell, or None if it is not known yet. Raises ConfigError naming a file that is none."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError([f"{path}: not valid JSON ({error}); delete it"]) from None
        if not isinstance(cell, dict):
            raise ConfigError([f"{path}: not a cell; delete it"])
        return cell

    def _path(self, key: str) -> Path:
        return self._cells / f"{key}.json"


def measurement_key(architecture: Architecture) -> str:
    """Of the cell with an architecture's latencies."""
    return f"measurement-{architecture.digest}"


def training_key(architecture: Architecture, seed: int) -> str:
    """Of the cell of an architecture's training with a seed."""
    return f"training-{architecture.digest}-{seed}"
