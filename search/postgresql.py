"""PostgreSQL for Optuna: a server that many machines share, and that may be gone for a while.

What an address leaves out, libpq finds where every PostgreSQL program does: PGHOST, PGUSER,
PGDATABASE, PGPASSWORD, ~/.pgpass. A password has to come from there, since an address is written to
the run's files.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import sqlalchemy
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import ArgumentError, DBAPIError

from search.relational import RelationalStorage
from slm.config import ConfigError

log = logging.getLogger(__name__)

DRIVERS = ("postgresql", "postgresql+psycopg")
# How long a server that was there before may be gone; then the search ends.
PATIENCE_SECONDS = 300.0
SECONDS_BETWEEN_ATTEMPTS = 0.5
# A process that is silent for so long within a transaction, which takes milliseconds, is frozen.
FROZEN_SECONDS = 10.0
# Times that one operation is tried whose connection breaks.
MAX_ATTEMPTS = 5
# Of a study; the number is ours alone.
TURN_LOCK = 0x736C6D
# Whoever creates the tables holds this lock of the database; the number is ours alone.
CREATION_LOCK = 0x736C6D2D66

Operation = TypeVar("Operation", bound=Callable[..., Any])


def url_problems(url: str) -> list[str]:
    """What is wrong with an address. They do not repeat it, as it may hold a password."""
    try:
        address = sqlalchemy.make_url(url)
    except ArgumentError:
        return ["url: must be like postgresql+psycopg://user@host/database"]
    problems = []
    if address.drivername not in DRIVERS:
        problems.append(f"url: must begin with {DRIVERS[-1]}://, got {address.drivername}://")
    if address.password is not None or "password" in address.query:
        problems.append(
            "url: must not hold the password, because it is written to the run's files; "
            "set PGPASSWORD, or put it into ~/.pgpass"
        )
    return problems


def _retried(operation: Operation) -> Operation:
    """An operation that is done anew if its connection breaks; each is one transaction.

    What breaks may be the answer to a commit, so all of them may be done twice: an attribute is set
    again, and a trial that is finished stays so and is refused, as to a late writer.
    """

    @functools.wraps(operation)
    def attempt(*arguments: Any, **options: Any) -> Any:
        for remaining in reversed(range(MAX_ATTEMPTS)):
            try:
                return operation(*arguments, **options)
            except (StorageInternalError, DBAPIError) as error:
                if not remaining or not _is_disconnect(error):
                    raise

    return attempt  # type: ignore[return-value]


class PostgreSQLStorage(RelationalStorage):
    """Optuna's storage of relational databases, which waits for its server.

    Raises ConfigError without a driver or a server, and when the server has been gone for too long.
    """

    # When a study is opened, and all the time; `add_trial` is done anew by Optuna itself.
    create_new_study = _retried(RelationalStorage.create_new_study)
    get_study_id_from_name = _retried(RelationalStorage.get_study_id_from_name)
    get_study_name_from_id = _retried(RelationalStorage.get_study_name_from_id)
    get_study_directions = _retried(RelationalStorage.get_study_directions)
    get_study_system_attrs = _retried(RelationalStorage.get_study_system_attrs)
    set_study_system_attr = _retried(RelationalStorage.set_study_system_attr)
    get_study_user_attrs = _retried(RelationalStorage.get_study_user_attrs)
    set_study_user_attr = _retried(RelationalStorage.set_study_user_attr)
    settle_study_user_attr = _retried(RelationalStorage.settle_study_user_attr)
    set_trial_user_attr = _retried(RelationalStorage.set_trial_user_attr)
    set_trial_state_values = _retried(RelationalStorage.set_trial_state_values)
    complete_trial = _retried(RelationalStorage.complete_trial)
    _get_trials = _retried(RelationalStorage._get_trials)

    def __init__(self, url: str) -> None:
        address = sqlalchemy.make_url(url).set(drivername=DRIVERS[-1])
        self._name = str(address)
        self._patience_seconds = 0.0
        options = {
            "pool_pre_ping": True,
            # Of the connections that a server has, each process keeps one.
            "pool_size": 1,
            "connect_args": {
                key: value
                for key, value in _connection_options().items()
                if key not in address.query
            },
        }
        try:
            engine = sqlalchemy.create_engine(
                address,
                isolation_level="AUTOCOMMIT",
                poolclass=sqlalchemy.NullPool,
                connect_args=options["connect_args"],
            )
            with engine.connect() as connection:
                # Of several processes that find no tables one creates them, and the others wait.
                lock = sqlalchemy.text(f"SELECT pg_advisory_lock({CREATION_LOCK})")
                connection.execute(lock)
                super().__init__(str(address), engine_kwargs=options)
        except ImportError:
            raise ConfigError(
                ["storage.kind: postgresql needs psycopg: pip install slm-frontier[postgresql]"]
            ) from None
        except (StorageInternalError, DBAPIError) as error:
            cause = error if isinstance(error, DBAPIError) else error.__cause__
            reason = _one_line(cause.orig if isinstance(cause, DBAPIError) else cause)
            raise ConfigError([f"storage.url: {self._name}: {reason}"]) from None
        sqlalchemy.event.listen(self.engine, "do_connect", self._connect)
        self._patience_seconds = PATIENCE_SECONDS

    def now(self) -> float:
        """Seconds since 1970 by the server's clock, which all machines share."""
        return self._clocks()[0]

    def silence(self, heartbeat: float) -> float:
        """Seconds since a heartbeat; while the server was away, none could be recorded."""
        now, start = self._clocks()
        return now - max(heartbeat, start)

    @contextmanager
    def turn(self, study_id: int) -> Iterator[bool]:
        """Within the block no other process has its turn, unless this one is silent for too long.

        They come in order. Who waits does so in its one connection. True: others may have had
        theirs meanwhile.
        """
        connection = self._wait_for_turn(study_id)
        try:
            yield True
        finally:
            # The lock goes with the transaction; if that has been ended, nothing depends on it.
            with suppress(DBAPIError):
                connection.commit()
            connection.close()

    @_retried
    def _wait_for_turn(self, study_id: int) -> sqlalchemy.Connection:
        connection = self.engine.connect()
        try:
            query = f"SELECT pg_advisory_xact_lock({TURN_LOCK}, {study_id})"
            connection.execute(sqlalchemy.text(query))
        except BaseException:
            connection.close()
            raise
        return connection

    @_retried
    def _clocks(self) -> tuple[float, float]:
        """The server's time, and that of its start, in seconds since 1970."""
        with self.engine.connect() as connection:
            query = sqlalchemy.text(
                "SELECT extract(epoch FROM clock_timestamp()), "
                "extract(epoch FROM pg_postmaster_start_time())"
            )
            now, start = connection.execute(query).one()
        return float(now), float(start)

    def _connect(
        self, dialect: Any, record: object, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """A new connection, for SQLAlchemy; waits while the server is gone."""
        patience_seconds, begin_s = self._patience_seconds, time.monotonic()
        # Whoever gave up, or was interrupted here, does not wait again in order to end.
        self._patience_seconds = 0.0
        is_told = False
        while True:
            try:
                connection = dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.OperationalError as error:
                reason = _one_line(error)
                if time.monotonic() - begin_s >= patience_seconds:
                    raise ConfigError(
                        [f"storage.url: {self._name} is gone; the same command goes on: {reason}"]
                    ) from None
                if not is_told:
                    log.warning("%s is gone, waiting for it: %s", self._name, reason)
                    is_told = True
                time.sleep(SECONDS_BETWEEN_ATTEMPTS)
            else:
                self._patience_seconds = PATIENCE_SECONDS
                return connection


def _connection_options() -> dict[str, Any]:
    """Of libpq: a peer that has fallen silent, server or client, must not hold up the others."""
    return {
        "application_name": "slm-frontier",
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
        # It would hold locks that all others wait for.
        "options": f"-c idle_in_transaction_session_timeout={1000 * FROZEN_SECONDS:.0f}",
    }


def _is_disconnect(error: BaseException | None) -> bool:
    """Whether a broken connection is behind it: Optuna wraps that, or errs once more over it."""
    while error is not None:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())
