"""The two checkpoints that a run keeps: the last one, and the one before it."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from slm.config import ConfigError
from slm.training import sharded_checkpoint
from slm.training.checkpoint import LAST_CHECKPOINT, read_checkpoint

LAST = LAST_CHECKPOINT.name
PREVIOUS = "previous.ckpt"
# One that is being written, and one that cannot be gone on from.
PARTIAL, DAMAGED = "partial.ckpt", "damaged.ckpt"


def keep(folder: Path) -> None:
    """Make the one that was written the last one, and the last one the one before it.

    At any moment a whole one is there under either name, and on the disk for good.
    """
    partial, last, previous = folder / PARTIAL, folder / LAST, folder / PREVIOUS
    if partial.is_dir():
        sharded_checkpoint.write_manifest(partial)
    for path in [*partial.glob("*"), partial]:
        _synchronize(path)
    if last.exists():
        _remove(previous)
        os.replace(last, previous)
    os.replace(partial, last)
    _synchronize(folder)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and what it says of its run; None if there is none at all.

    One that is damaged is named, and the one before it taken. Raises ConfigError if all are.
    """
    problems: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            content = sharded_checkpoint.check(path) if path.is_dir() else _check(path)
        except ConfigError as error:
            problems += error.problems
            continue
        for problem in problems:
            print(f"{problem}; going on from '{path}'")
        return path, content
    if problems:
        raise ConfigError([f"{problem}; resume=never starts afresh" for problem in problems])
    return None


def set_aside(folder: Path, good: Path) -> None:
    """Have the last one, damaged where the one before it is the good one, not displace that."""
    last = folder / LAST
    if good != last and last.exists():
        _remove(folder / DAMAGED)
        os.replace(last, folder / DAMAGED)


def forget(folder: Path) -> None:
    """Remove all of them."""
    for name in (LAST, PREVIOUS, PARTIAL, DAMAGED):
        _remove(folder / name)


def _check(file: Path) -> dict[str, Any]:
    """The content of a file of which nothing is damaged; raises ConfigError, naming it."""
    content = read_checkpoint(file)
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ConfigError([f"checkpoint '{file}': is damaged at {damaged}"])
    return content


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _synchronize(path: Path) -> None:
    """Have what was written there survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
