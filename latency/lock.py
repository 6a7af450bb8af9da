"""The device lock: a timing never runs beside anything else that takes it.

It is a file lock (flock), so it holds between processes of one machine and the kernel lets go of
it when the process that holds it ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

log = logging.getLogger(__name__)

# What this thread holds: lock name -> whether exclusively.
_held = threading.local()


@contextmanager
def device_lock(exclusive: bool = True, name: str | None = None) -> Iterator[None]:
    """Hold the lock of a device; wait until it is free.

    exclusive: True for timing; False for background work, which takes it step by step.
    name: names the device; None: the one that this process runs on.

    A thread may take again what it holds already. Raises RuntimeError if it holds the lock
    shared and asks for it exclusively, since it would wait for itself.
    """
    name = name or current_lock_name()
    held: dict[str, bool] = _held.__dict__
    if name in held:
        if exclusive and not held[name]:
            raise RuntimeError(f"device lock {name!r}: held shared, cannot be made exclusive")
        yield
        return
    lock = _open(name, "lock")
    try:
        _acquire(lock, name, exclusive)
        held[name] = exclusive
        try:
            yield
        finally:
            del held[name]
            # Explicitly: a child forked meanwhile shares the file and would keep the lock.
            fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def current_lock_name() -> str:
    """Name of the lock of the device that this process runs on: 'cpu' or the GPU's UUID."""
    if not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _acquire(lock: int, name: str, exclusive: bool) -> None:
    """Lock through a gate, which whoever waits for exclusive use keeps shut.

    Without it, background work that releases and takes the lock at every step could keep a timing
    waiting for ever.
    """
    mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    gate = _open(name, "gate")
    try:
        fcntl.flock(gate, mode)
        try:
            fcntl.flock(lock, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for device lock %s", name)
            fcntl.flock(lock, mode)
        fcntl.flock(gate, fcntl.LOCK_UN)
    finally:
        os.close(gate)


def _open(name: str, kind: str) -> int:
    """Open, or make, a lock file that every user of the machine can lock."""
    path = Path(tempfile.gettempdir()) / f"slm-frontier-{name}.{kind}"
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o644)
