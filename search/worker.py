"""A supervised worker process: what goes wrong in it costs one job, not the search.

The process is started once and reused, so that imports and compiled code are paid for once. When
it crashes, hangs or fails, it is ended, and the next job starts a fresh one. It ends by itself when
the search does. One can be started early, to import while the search does so.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

POLL_SECONDS = 0.2
SECONDS_BETWEEN_REPORTS = 0.2
# For a process to end by itself, once there is nothing more for it to do.
PATIENCE_SECONDS = 5.0
# By which schedulers end jobs, and time for such a signal to reach this process as well.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNAL_SECONDS = 1.0

# Receives what a job reports about its progress.
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class WorkerProcess:
    """A process that waits to be told what it works for."""

    process: BaseProcess
    connection: Connection

    @classmethod
    def start(cls, module: str | None = None) -> WorkerProcess:
        """Start one, which first imports a module that its work will need."""
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, module), daemon=True)
        with _interrupts_blocked():
            process.start()
        # Once only the process holds its end, its death ends the connection.
        theirs.close()
        return cls(process, connection)

    def end(self, patience_s: float) -> None:
        """Let it clean up after itself for so long, then kill it."""
        # When it waits for a job, this ends it.
        self.connection.close()
        self.process.join(patience_s)
        self.process.kill()
        self.process.join()


class JobError(Exception):
    """A job did not end well; the message is the reason."""


class Worker:
    """Runs methods of `target` in a process of its own, one at a time.

    target: a picklable object; the process gets its copy when it starts. Each method that is run
    takes a keyword `report`, to be called with progress.
    visible_devices: the GPUs of the process, as CUDA_VISIBLE_DEVICES has them; None: all.
    early: a process that was started before and has not been told anything, to be the first.
    """

    def __init__(
        self,
        target: object,
        visible_devices: str | None = None,
        early: WorkerProcess | None = None,
    ) -> None:
        self._target = target
        self._visible_devices = visible_devices
        self._early = early
        self._running: WorkerProcess | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return self._running.process.pid if self._running is not None else None

    def run(
        self,
        method: str,
        *arguments: Any,
        time_limit_s: float,
        on_report: Report = lambda _: None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Any:
        """Run `target.method(*arguments)`; its result.

        on_wait: called again and again meanwhile; what it raises ends the job.

        Raises JobError if it raises, if the process dies, or if it takes longer than the limit,
        which includes the start of the process.
        """
        deadline = time.monotonic() + time_limit_s
        try:
            self._start()
            self._send(method, arguments)
            while True:
                kind, value = self._receive(deadline, on_wait)
                if kind == "result":
                    return value
                if kind == "error":
                    raise JobError(value)
                on_report(value)
        except BaseException:
            self._end(patience_s=0.0)
            raise

    def close(self) -> None:
        """End the process: let it clean up after itself, but not for long."""
        self._end(PATIENCE_SECONDS)

    def _end(self, patience_s: float) -> None:
        for each in (self._running, self._early):
            if each is not None:
                each.end(patience_s)
        self._running = self._early = None

    def _start(self) -> None:
        if self._running is None:
            self._running, self._early = self._early or WorkerProcess.start(), None
            environment = dict(os.environ)
            if self._visible_devices is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self._visible_devices
            self._send(self._target, environment)

    def _send(self, *message: Any) -> None:
        """Raises JobError if the process is dead."""
        assert self._running is not None
        try:
            self._running.connection.send(message)
        except ConnectionError:
            raise JobError(self._cause_of_death()) from None

    def _receive(self, deadline: float, on_wait: Callable[[], None]) -> tuple[str, Any]:
        """The next message of the process. Raises JobError when there will be none in time."""
        assert self._running is not None
        connection = self._running.connection
        try:
            while time.monotonic() < deadline:
                on_wait()
                if connection.poll(POLL_SECONDS):
                    return connection.recv()
        except (EOFError, ConnectionError):
            raise JobError(self._cause_of_death()) from None
        raise JobError("took longer than its time limit")

    def _cause_of_death(self) -> str:
        assert self._running is not None
        process = self._running.process
        process.join()
        if -(process.exitcode or 0) in STOPPING:
            # No candidate does that. A scheduler's signal reaches every process of a job: what it
            # means for the search is decided by its own handler, here.
            time.sleep(SIGNAL_SECONDS)
        return f"the worker process {how_it_ended(process.exitcode or 0)}"


def how_it_ended(exit_code: int) -> str:
    """What the exit code of a process says, negative for a signal: 'exited with code 3'."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, JobError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C waits, for this thread until the end, for a process that it starts until `_serve`.

    While a process starts it imports much; a Ctrl-C then would end it with a traceback.
    """
    # It is started with the first process, and would unblock them.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, module: str | None) -> None:
    """The process: run jobs until the search is gone."""
    # Ctrl-C reaches every process of the terminal; the search decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if module is not None:
        import_module(module)
    last_report_s = 0.0

    def report(progress: dict[str, Any]) -> None:
        nonlocal last_report_s
        if time.monotonic() - last_report_s >= SECONDS_BETWEEN_REPORTS:
            last_report_s = time.monotonic()
            connection.send(("report", progress))

    try:
        target, environment = connection.recv()
        # The search has gone on since this process was started.
        os.environ.update(environment)
        while True:
            method, arguments = connection.recv()
            try:
                result = getattr(target, method)(*arguments, report=report)
            except ConnectionError:
                raise
            except Exception as error:  # whatever a candidate does wrong is its own affair
                connection.send(("error", describe(error)))
            else:
                connection.send(("result", result))
    except (EOFError, ConnectionError):
        return
