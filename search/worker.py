"""A supervised worker process: what goes wrong in it costs one job, not the search.

The process is started once and reused, so that compiled code is paid for once. When it crashes,
hangs or fails, it is ended, and the next job starts a fresh one. It ends by itself when the search
does.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from search import fork_server

POLL_SECONDS = 0.2
SECONDS_BETWEEN_REPORTS = 0.2
# For a process to end by itself, once there is nothing more for it to do.
PATIENCE_SECONDS = 5.0
# For a scheduler's signal that has ended the process to reach this one as well.
SIGNAL_SECONDS = 1.0

# Receives what a job reports about its progress.
Report = Callable[[dict[str, Any]], None]


class JobError(Exception):
    """A job did not end well; the message is the reason."""


class Worker:
    """Runs methods of `target` in a process of its own, one at a time.

    target: a picklable object; the process gets its copy when it starts. Each method that is run
    takes a keyword `report`, to be called with progress.
    visible_devices: the GPUs of the process, as CUDA_VISIBLE_DEVICES has them; None: all.
    """

    def __init__(self, target: object, visible_devices: str | None = None) -> None:
        self._target = target
        self._visible_devices = visible_devices
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return self._process.pid if self._process is not None else None

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
            connection = self._start()
            connection.send((method, arguments))
            while True:
                kind, value = self._receive(connection, deadline, on_wait)
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
        if self._process is not None and self._connection is not None:
            # When it waits for a job, this ends it.
            self._connection.close()
            self._process.join(patience_s)
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> Connection:
        if self._process is None or self._connection is None:
            context = fork_server.context()
            connection, theirs = context.Pipe()
            environment = dict(os.environ)
            if self._visible_devices is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self._visible_devices
            process = context.Process(
                target=_serve, args=(self._target, theirs, environment), daemon=True
            )
            with fork_server.signals_blocked():
                process.start()
                # Not before it runs: if starting it fails, there is none to be ended.
                self._process, self._connection = process, connection
            # Once only the process holds its end, its death ends the connection.
            theirs.close()
        return self._connection

    def _receive(
        self, connection: Connection, deadline: float, on_wait: Callable[[], None]
    ) -> tuple[str, Any]:
        """The next message of the process. Raises JobError when there will be none in time."""
        try:
            while time.monotonic() < deadline:
                on_wait()
                if connection.poll(POLL_SECONDS):
                    return connection.recv()
        except (EOFError, ConnectionError):
            raise JobError(self._cause_of_death()) from None
        raise JobError("took longer than its time limit")

    def _cause_of_death(self) -> str:
        assert self._process is not None
        self._process.join()
        if -(self._process.exitcode or 0) in fork_server.STOPPING:
            # No candidate does that. A scheduler's signal reaches every process of a job: what it
            # means for the search is decided by its own handler, here.
            time.sleep(SIGNAL_SECONDS)
        return f"the worker process {how_it_ended(self._process.exitcode or 0)}"


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


def _serve(target: object, connection: Connection, environment: Mapping[str, str]) -> None:
    """The process: run jobs until the search is gone."""
    # Ctrl-C reaches every process of the terminal; the search decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fork_server.take_over(environment)
    last_report_s = 0.0

    def report(progress: dict[str, Any]) -> None:
        nonlocal last_report_s
        if time.monotonic() - last_report_s >= SECONDS_BETWEEN_REPORTS:
            last_report_s = time.monotonic()
            connection.send(("report", progress))

    try:
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
