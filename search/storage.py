"""Where a study is stored: files of SQLite or of Optuna's journal, or PostgreSQL."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Literal

import optuna

from slm.config import ConfigError, schema

MIN_LEASE_SECONDS = 1.0


@schema
class StorageConfig:
    """Where the study lives.

    kind: sqlite and journal are files of the run's folder, for processes on one machine: journal
        is the faster for many. postgresql serves many machines, and needs its url.
    lease_seconds: an owner that has been silent for so long has lost its candidate. The clocks of
        machines that share a study must agree to well within it.
    """

    kind: Literal["sqlite", "journal", "postgresql"]
    url: str | None = None
    lease_seconds: float = 120.0

    def __post_init__(self) -> None:
        problems = []
        if (self.url is not None) != (self.kind == "postgresql"):
            needs = "needs" if self.url is None else "takes no"
            problems.append(f"url: {self.kind} storage {needs} url, got {self.url!r}")
        if self.lease_seconds < MIN_LEASE_SECONDS:
            problems.append(
                f"lease_seconds: must be >= {MIN_LEASE_SECONDS:g}, got {self.lease_seconds:g}"
            )
        if problems:
            raise ConfigError(problems)

    def open(self, run_folder: Path) -> optuna.storages.BaseStorage:
        """Connect."""
        if self.kind == "journal":
            from optuna.storages.journal import JournalFileBackend

            backend = JournalFileBackend(str(run_folder / "journal.log"))
            return optuna.storages.JournalStorage(backend)
        if self.kind == "sqlite":
            return optuna.storages.RDBStorage(
                f"sqlite:///{run_folder / 'study.db'}",
                engine_kwargs={"connect_args": {"timeout": 60, "factory": _Connection}},
            )
        assert self.url is not None
        return optuna.storages.RDBStorage(self.url)


class _Connection(sqlite3.Connection):
    """Writes to a log first, and waits for the disk when the log is full.

    A process that is killed loses nothing; a power cut may lose the last seconds, whole.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")
