"""What a search needs of a PostgreSQL server, a real one, and what becomes of it without."""

import sys
import threading
import time

import optuna
import psycopg
import pytest
import sqlalchemy

from benchmarks.postgresql_server import PostgreSQLServer
from search import postgresql as module
from search.postgresql import PostgreSQLStorage
from search.storage import StorageConfig, clock_of
from slm.config import ConfigError, read


@pytest.fixture
def storage(postgresql: str) -> PostgreSQLStorage:
    return PostgreSQLStorage(postgresql)


@pytest.fixture
def study(storage: PostgreSQLStorage) -> optuna.Study:
    return optuna.create_study(storage=storage, study_name="test")


def test_a_password_in_the_url_and_another_database_are_refused_without_being_repeated() -> None:
    for url, problem in (
        ("postgresql://me:secret@host/db", "storage.url: must not hold the password"),
        ("postgresql://me@host/db?password=secret", "storage.url: must not hold the password"),
        ("mysql://me@host/db", "storage.url: must begin with postgresql+psycopg://, got mysql://"),
        ("me:secret@host/db", "storage.url: must be like postgresql+psycopg://user@host/database"),
    ):
        with pytest.raises(ConfigError) as error:
            read(StorageConfig, {"kind": "postgresql", "url": url}, "storage")
        (found,) = error.value.problems
        assert found.startswith(problem)
        assert "secret" not in found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"PGHOST": "/nowhere"}, 'connection to server on socket "/nowhere/.s.PGSQL.5432" failed'),
        ({"PGPASSWORD": "guessed"}, "password authentication failed"),
        ({"PGDATABASE": "missing"}, 'database "missing" does not exist'),
    ],
    ids=["no server", "password", "no database"],
)
def test_what_cannot_be_reached_is_said_in_one_line(
    postgresql: str, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], problem: str
) -> None:
    for variable, value in change.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"storage.url: postgresql.*{problem}") as error:
        PostgreSQLStorage(postgresql)
    assert "\n" not in str(error.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install slm-frontier\[postgresql\]"):
        PostgreSQLStorage("postgresql://")


def test_many_may_be_the_first(postgresql: str) -> None:
    """Optuna alone fails in all but one: each finds no tables, and creates them."""
    found: list[PostgreSQLStorage] = []
    threads = [
        threading.Thread(target=lambda: found.append(PostgreSQLStorage(postgresql)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert found[0].get_current_version() == found[0].get_head_version()


def test_the_clock_is_the_servers(
    storage: PostgreSQLStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, machine_s = clock_of(storage), time.time()
    monkeypatch.setattr(time, "time", lambda: machine_s + 3600)
    assert abs(clock.now() - machine_s) < 60
    assert clock.silence(clock.now()) < 60
    assert clock_of(optuna.storages.InMemoryStorage()).now() > machine_s + 3599


def test_sessions_that_the_server_ends_cost_nothing(study: optuna.Study) -> None:
    """Both where a connection has rested and in the middle of a transaction."""
    first_id = study.ask()._trial_id
    backend = study._storage._backend
    cut_at: list[str] = []

    def end_session(connection: object, cursor: object, statement: str, *_: object) -> None:
        if cut_at and cut_at[0] in statement:
            cut_at.clear()
            end_sessions()

    sqlalchemy.event.listen(backend.engine, "before_cursor_execute", end_session)
    cut_at.append("INSERT INTO trial_user_attributes")
    study._storage.set_trial_user_attr(first_id, "a", 1)
    for statement in ("UPDATE trials", "INSERT INTO trial_system_attributes"):
        trial_id = study.ask()._trial_id
        study._storage.set_trial_user_attr(trial_id, "a", 1)
        end_sessions()
        cut_at.append(statement)
        backend.complete_trial(trial_id, [2.0], {"b": 2}, {"c": 3})
        assert not cut_at
        trial = backend.get_trial(trial_id)
        assert (trial.state, trial.values) == (optuna.trial.TrialState.COMPLETE, [2.0])
        assert (trial.user_attrs, trial.system_attrs) == ({"a": 1, "b": 2}, {"c": 3})
    backend.complete_trial(first_id, [2.0], {}, {})
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        backend.complete_trial(first_id, [3.0], {"b": 2}, {})
    for statement in ("FROM studies", "FROM trials", "FROM trial_params", "FROM trial_values"):
        cut_at.append(statement)
        trial, *_ = backend.get_all_trials(study._study_id)
        assert (trial.user_attrs, trial.values) == ({"a": 1}, [2.0])
        assert not cut_at
    cut_at.append("clock_timestamp()")
    assert backend.now() > 0
    assert not cut_at


def end_sessions() -> None:
    """End all sessions of the database but the one that does it."""
    with psycopg.connect(autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_who_freezes_within_a_transaction_holds_nobody_up(
    study: optuna.Study, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FROZEN_SECONDS", 1.0)
    frozen = PostgreSQLStorage(postgresql).engine.connect()
    frozen.execute(sqlalchemy.text("SELECT * FROM studies FOR UPDATE"))
    # Waits for the lock, until the server takes it away.
    assert study.ask().number == 0
    frozen.invalidate()


def test_turns_are_taken_one_after_another_and_lost_by_who_freezes(
    postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FROZEN_SECONDS", 1.0)
    first, second = PostgreSQLStorage(postgresql), PostgreSQLStorage(postgresql)
    order: list[str] = []

    def follow() -> None:
        with second.turn(1):
            order.append("second")

    waiting = threading.Thread(target=follow)
    with first.turn(1):
        waiting.start()
        # Another study's turns are its own.
        with second.turn(2):
            order.append("other study")
        time.sleep(0.3)
        order.append("first")
    waiting.join()
    assert order == ["other study", "first", "second"]

    waiting = threading.Thread(target=follow)
    with first.turn(1):
        waiting.start()
        # Silent for longer than a process that lives.
        waiting.join()
        assert first.now() > 0
    assert order[3:] == ["second"]


def test_a_search_waits_for_a_server_that_restarts_and_ends_without_one(
    postgresql: str,
    postgresql_server: PostgreSQLServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = PostgreSQLStorage(postgresql)
    study = optuna.create_study(storage=backend)
    first = study.ask()
    try:
        postgresql_server.stop()
        starter = threading.Timer(module.SECONDS_BETWEEN_ATTEMPTS, postgresql_server.start)
        starter.start()
        study.tell(first, 1.0)
        starter.join()
        assert study.ask().number == 1
        assert [trial.values for trial in study.trials] == [[1.0], None]
        assert count_waits(caplog) == 1
        # While it was away nobody could say that it was alive.
        assert backend.silence(backend.now() - 1e6) < 1e5

        monkeypatch.setattr(module, "PATIENCE_SECONDS", 1.0)
        end_sessions()
        study.set_user_attr("a", 1)
        postgresql_server.stop()
        for _ in range(2):
            with pytest.raises(ConfigError, match="is gone; the same command goes on"):
                study.set_user_attr("a", 2)
        # In order to end, nobody waits again.
        assert count_waits(caplog) == 2
    finally:
        postgresql_server.start()


def count_waits(caplog: pytest.LogCaptureFixture) -> int:
    return sum("is gone, waiting for it" in line for line in caplog.messages)
