import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from latency.lock import device_lock

HOLDER = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from latency.lock import device_lock
print("ready", flush=True)
with device_lock(exclusive=sys.argv[2] == "exclusive", name="test"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start processes that take the lock of a device called 'test' and keep it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    processes = []

    def launch(mode: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), mode]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
        processes.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield launch
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def says_held(process: subprocess.Popen, within_s: float) -> bool:
    ready, _, _ = select.select([process.stdout], [], [], within_s)
    return bool(ready) and process.stdout.readline() == b"held\n"


def test_exclusive_excludes_another_process_until_it_is_killed(start):
    first = start("exclusive")
    assert says_held(first, 30)
    second = start("exclusive")
    assert not says_held(second, 0.3)
    first.send_signal(signal.SIGKILL)
    assert says_held(second, 30)


def test_shared_goes_with_shared_and_not_with_exclusive(start):
    assert says_held(start("shared"), 30)
    with device_lock(exclusive=False, name="test"):
        pass
    assert not says_held(start("exclusive"), 0.3)


def test_background_steps_do_not_keep_a_timing_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = threading.Event()
    steps = []

    def train() -> None:
        while not done.is_set():
            with device_lock(exclusive=False, name="test"):
                time.sleep(0.002)
            steps.append(1)

    trainers = [threading.Thread(target=train, daemon=True) for _ in range(3)]
    for trainer in trainers:
        trainer.start()
    try:
        for _ in range(5):
            with device_lock(name="test"):
                before = len(steps)
                time.sleep(0.02)
                # A step that ended before may still be counted; none began.
                assert len(steps) - before <= len(trainers)
    finally:
        done.set()
        for trainer in trainers:
            trainer.join(timeout=30)
    assert steps
    assert not any(trainer.is_alive() for trainer in trainers)


def test_a_thread_may_take_again_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with device_lock(name="test"), device_lock(name="test"), device_lock(False, name="test"):
        pass
    with device_lock(False, name="test"), pytest.raises(RuntimeError, match="cannot be made"):
        device_lock(name="test").__enter__()
    # Everything was let go of.
    with device_lock(name="test"):
        pass
