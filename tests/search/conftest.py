"""A real database server for the tests of what shares one."""

import secrets
from collections.abc import Iterator

import pytest

from benchmarks.postgresql_server import PostgreSQLServer


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    """One server, each test taking a database of its own."""
    with PostgreSQLServer() as server:
        yield server


@pytest.fixture
def postgresql(postgresql_server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty database, which the environment completes."""
    name = f"test_{secrets.token_hex(4)}"
    postgresql_server.create_database(name)
    for variable, value in postgresql_server.environment(name).items():
        monkeypatch.setenv(variable, value)
    return "postgresql+psycopg://"
