"""Signals that end a run between two optimizer steps."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed

from slm.config import EXIT_OUT_OF_TIME, EXIT_PREEMPTED

# Ctrl-C; a scheduler's preemption, which may give notice by either of the next two; and Slurm's
# notice that the time of one of our jobs is nearly over.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Catches signals until it is released; a second one stops at once.

    Processes that train together agree: what one was told, all are.
    """

    def __init__(self) -> None:
        self._received = 0
        self._group = None
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Hosts ask each other, without waiting for their devices.
            self._group = torch.distributed.new_group(backend="gloo")
        self._before: dict[int, Any] = {}
        # Only a main thread can.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOPPING}

    def received(self) -> int:
        """The signal to stop for, 0 if there is none; every process has to ask."""
        if self._group is None:
            return self._received
        agreed = torch.tensor(self._received)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, self._group)
        return int(agreed)

    def release(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            stop(number)
        self._received = number
        print("stopping after this step; the same again stops at once", file=sys.stderr)


def stop(number: int) -> None:
    """Raise what ends the program: KeyboardInterrupt for Ctrl-C, else an exit with 143 or 140."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(EXIT_OUT_OF_TIME if number == signal.SIGUSR2 else EXIT_PREEMPTED)
