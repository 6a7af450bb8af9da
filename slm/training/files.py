"""Files written whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.config import ConfigError

# For what a process that was killed has left running to end as well.
LOCK_SECONDS = 10.0


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name, then rename: a reader sees the old file or the new."""
    temporary = temporary_path(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def temporary_path(path: Path) -> Path:
    """A name beside a file that no other process takes, on any machine that sees the folder."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other commands out of a run's folder; the system lets go when this process ends.

    The lock lies beside the folder, which stays as it is where the run is refused. Raises
    ConfigError if there is another command.
    """
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ConfigError(
            [f"name: another command is at work in '{folder}'; wait for it, or take another name"]
        ) from None
    try:
        yield
    finally:
        lock.release()
