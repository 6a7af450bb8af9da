"""Where a study is stored: files of SQLite or of Optuna's journal, or PostgreSQL."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, Union, runtime_checkable

import optuna

from slm.config import ConfigError, schema

if TYPE_CHECKING:
    from search.journal import StudyJournal
    from search.relational import RelationalStorage

StudyStorage: TypeAlias = Union["RelationalStorage", "StudyJournal"]

MIN_LEASE_SECONDS = 1.0


@schema
class StorageConfig:
    """Where the study lives.

    kind: sqlite and journal are files of the run's folder, for processes on one machine: journal
        is the faster for many. postgresql serves many machines.
    url: of postgresql, postgresql+psycopg://user@host/database. What it leaves out, the password
        always, comes from PGHOST, PGUSER, PGDATABASE, PGPASSWORD or ~/.pgpass.
    lease_seconds: an owner that has been silent for so long has lost its candidate.
    """

    kind: Literal["sqlite", "journal", "postgresql"]
    url: str | None = None
    lease_seconds: float = 120.0

    def __post_init__(self) -> None:
        problems = []
        if (self.url is not None) != (self.kind == "postgresql"):
            needs = "needs" if self.url is None else "takes no"
            problems.append(f"url: {self.kind} storage {needs} url, got {self.url!r}")
        elif self.url is not None:
            from search.postgresql import url_problems

            problems += url_problems(self.url)
        if self.lease_seconds < MIN_LEASE_SECONDS:
            problems.append(
                f"lease_seconds: must be >= {MIN_LEASE_SECONDS:g}, got {self.lease_seconds:g}"
            )
        if problems:
            raise ConfigError(problems)

    def open(self, run_folder: Path) -> StudyStorage:
        """Connect. Raises ConfigError if there is no server, or no driver for it."""
        if self.kind == "journal":
            from optuna.storages.journal import JournalFileBackend

            from search.journal import StudyJournal

            return StudyJournal(JournalFileBackend(str(run_folder / "journal.log")))
        if self.kind == "sqlite":
            from search.relational import RelationalStorage

            return RelationalStorage(
                f"sqlite:///{run_folder / 'study.db'}",
                engine_kwargs={"connect_args": {"timeout": 60, "factory": _Connection}},
            )
        assert self.url is not None
        from search.postgresql import PostgreSQLStorage

        return PostgreSQLStorage(self.url)


def clock_of(storage: optuna.storages.BaseStorage) -> Clock:
    """The server's, else this machine's."""
    return storage if isinstance(storage, Clock) else MachineClock()


@runtime_checkable
class Clock(Protocol):
    """What leases go by."""

    def now(self) -> float:
        """Seconds since 1970."""

    def silence(self, heartbeat: float) -> float:
        """Seconds since a heartbeat in which others could have been recorded."""


class MachineClock:
    """Of this machine."""

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def silence(self, heartbeat: float) -> float:
        """Seconds since a heartbeat."""
        return time.time() - heartbeat


class _Connection(sqlite3.Connection):
    """Writes to a log first, and waits for the disk when the log is full.

    A process that is killed loses nothing; a power cut may lose the last seconds, whole.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")
