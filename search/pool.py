"""Several workers of one search on this machine, each a process of its own.

They share nothing but the study. What dies is started again: its candidate is taken up by whoever
comes first, and its GPU must not stand idle.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from search.config import SearchConfig
from search.progress import Progress
from search.searcher import Searcher
from slm.config import EXIT_INTERRUPTED, ConfigError

# A worker that dies so often without having evaluated anything is not started again.
MAX_DEATHS = 3
# For workers to give back what they work on, once they have been told to stop.
PATIENCE_SECONDS = 30.0

OnDone = Callable[[int], None]


@dataclass
class _Member:
    """One worker. deaths: since it evaluated something."""

    process: BaseProcess
    connection: Connection
    deaths: int = 0


class Pool:
    """The workers of a search; as a context they are ended, in order, when the block ends."""

    def __init__(self, config: SearchConfig, run_folder: Path, progress: Progress) -> None:
        self._config = config
        self._folder = run_folder
        self._progress = progress
        # Not daemons: each has a process of its own that measures and trains.
        self._context = multiprocessing.get_context("spawn")
        self._members: dict[int, _Member] = {}

    def run(self, on_done: OnDone) -> None:
        """Until the search is over. Raises ConfigError if a worker does, or cannot live."""
        for index in range(self._config.workers):
            self._start(index)
        while self._members:
            connections = {m.connection: index for index, m in self._members.items()}
            for connection in wait(list(connections)):
                assert isinstance(connection, Connection)
                self._listen(connections[connection], connection, on_done)

    def _start(self, index: int, deaths: int = 0) -> None:
        connection, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_search, args=(self._config, self._folder, index, theirs)
        )
        process.start()
        theirs.close()
        self._members[index] = _Member(process, connection, deaths)

    def _listen(self, index: int, connection: Connection, on_done: OnDone) -> None:
        """One message of a worker, or its end."""
        member = self._members[index]
        try:
            kind, *values = connection.recv()
        except (EOFError, ConnectionError):
            del self._members[index]
            self._progress.left(index)
            member.process.join()
            if member.process.exitcode == 0:
                return
            if member.deaths + 1 >= MAX_DEATHS:
                raise ConfigError(
                    [f"workers: worker {index} ended {MAX_DEATHS} times, having done nothing"]
                ) from None
            self._progress.say(f"worker {index} died and is started again")
            self._start(index, member.deaths + 1)
            return
        if kind == "done":
            member.deaths = 0
            on_done(*values)
        elif kind == "say":
            self._progress.say(f"[{index}] {values[0]}")
        elif kind == "live":
            self._progress.live_of(index)(values[0])
        elif kind == "problems":
            raise ConfigError(values[0])

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for member in self._members.values():
            member.process.terminate()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for member in self._members.values():
            member.process.join(max(0.0, deadline - time.monotonic()))
            member.process.kill()
            member.process.join()
        self._members = {}


def _search(config: SearchConfig, run_folder: Path, index: int, connection: Connection) -> None:
    """What the process of a worker does."""
    # Ctrl-C reaches every process of the terminal, a scheduler's SIGTERM perhaps only the first,
    # which passes it on.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)

    def send(*message: Any) -> None:
        try:
            connection.send(message)
        except ConnectionError:
            # Nobody listens any more: the search has been killed.
            raise KeyboardInterrupt from None

    try:
        config.runtime().apply()
        searcher = Searcher(
            config,
            run_folder,
            index,
            say=lambda text: send("say", text),
            live=lambda text: send("live", text),
        )
        with searcher.resources:
            searcher.run(on_done=lambda number: send("done", number))
    except ConfigError as error:
        send("problems", error.problems)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        # What Python does at its exit is not to be disturbed.
        _ignore_signals()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop in order; a second signal does not disturb that."""
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
