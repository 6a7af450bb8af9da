"""Processes that start at once: forked from one that has imported what they need.

To import torch takes seconds, which a server of Python's own (`multiprocessing`, "forkserver")
spends beside the process that wants others, once. It is forked from before it has computed
anything, and ends with the last process that uses it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

# What evaluates candidates, and what searches for them.
PRELOADED = ["search.evaluate", "search.searcher"]
# Ctrl-C, and by which schedulers end jobs: such a signal may reach every process of a job.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def begin() -> None:
    """Start the server, unless it runs; it is ready later. For whoever will want processes."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    # The server would be ended by signals that mean its processes, and must not be: only it knows
    # how they ended. It and they have the signals blocked from the start.
    with signals_blocked():
        forkserver.ensure_running()


def context() -> ForkServerContext:
    """What makes processes; each has to call `take_over` before anything else."""
    begin()
    return multiprocessing.get_context("forkserver")


def take_over(environment: Mapping[str, str]) -> None:
    """In a new process: have the environment of the one that has started it, and take signals.

    Those that matter must have their handlers by now.
    """
    # The server's is that of whoever was first.
    os.environ.clear()
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Signals that end a process wait, for this thread until the end of the block."""
    # It is started with the first process, and would unblock them.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
