from collections.abc import Iterator

import pytest

from latency.device import Device
from latency.timer import Protocol
from latency.workload import Workload
from slm.architecture import Architecture


@pytest.fixture
def device(tmp_path, monkeypatch) -> Device:
    """This CPU, under a lock that nobody else waits for."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Device.current(threads=1, kind="cpu")


@pytest.fixture(scope="module")
def module_device(tmp_path_factory) -> Iterator[Device]:
    """The same, for what the tests of a module share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("lock")))
        yield Device.current(threads=1, kind="cpu")


@pytest.fixture(scope="session")
def protocol() -> Protocol:
    """Six rounds: as few as have an interval."""
    return Protocol(max_seconds=1e-6, max_rounds=6, max_repeats=0, warmup_rounds=1)


@pytest.fixture(scope="session")
def workload() -> Workload:
    return Workload(prompt_tokens=4, new_tokens=5)


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    return Architecture.parse("width=16 vocab_size=32 | attention(head_dim=8) ffn ffn")
