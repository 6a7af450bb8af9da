"""Fixtures for every test."""

import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from benchmarks.postgresql_server import PostgreSQLServer
from slm import plugins
from slm.operators import OPERATORS

# The same examples every time, and no opinion on how long one takes on a busy machine.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

# A shell's background jobs ignore Ctrl-C, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole programs first, which take longest, so that processes end together."""
    items.sort(key=lambda item: len(item.path.parents))


collect_ignore = [] if torch.cuda.is_available() else ["gpu"]


@pytest.fixture(autouse=True, scope="session")
def _own_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is compiled is compiled anew, once for each run of the tests.

    And each process has a device lock of its own, to wait for nothing else that runs on this
    machine: how long something takes is no test's concern.
    """
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLM_CACHE_DIR", str(shared / "slm_cache"))
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        # A fifth less time for the compiler; what calls the compiled loops is a little slower.
        patch.setenv("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
        yield


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> Iterator[None]:
    """Fixed seed, default dtype and one thread, whatever a test did before."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no plugin had ever been imported, and afterwards as before."""
    monkeypatch.setattr(plugins, "_digests", {})
    operators = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(operators)
    packages = {name.partition(".")[0] for name in plugins.plugin_digests()}
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    """A real server, each test taking a database of its own."""
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
