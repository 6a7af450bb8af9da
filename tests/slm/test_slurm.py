"""What Slurm's queue says of jobs, and what is made of it. Real clusters: tests/cluster."""

import time
from pathlib import Path

import pytest

from slm import slurm
from slm.config import ConfigError

submitit = pytest.importorskip("submitit")


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what `squeue` prints; while there is none, it fails as one that is too busy."""
    path = tmp_path / "queue"
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\ncat {path} 2> /dev/null || exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "MIN_PAUSE_SECONDS", 0.05)
    return path


def test_a_queue_that_does_not_answer_at_once_is_asked_again(
    queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            queue.write_text("12 RUNNING\n13_0 COMPLETED\n")

    monkeypatch.setattr(time, "sleep", pause)
    assert slurm.is_alive("12")
    assert len(pauses) == 3
    assert not slurm.is_alive("13_0")
    assert not slurm.is_alive("14")


def test_a_queue_that_never_answers_is_no_end_of_a_job(
    queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.2)
    with pytest.raises(ConfigError, match="squeue does not answer, so whether Slurm's job 12"):
        slurm.is_alive("12")
    watch = slurm.Watch()
    assert watch.look([submitit.SlurmJob(queue.parent, "12")]) == {}


@pytest.mark.parametrize("state", ["CANCELLED", "NODE_FAIL"])
def test_after_some_ends_no_result_is_waited_for(queue: Path, state: str) -> None:
    queue.write_text(f"12 {state}\n")
    watch = slurm.Watch()
    job = submitit.SlurmJob(queue.parent, "12")
    assert watch.look([job]) == {"12": f"Slurm has ended it: {state}"}


@pytest.mark.parametrize("line", ["12 COMPLETED\n", "12 FAILED\n", "12 OUT_OF_MEMORY\n", ""])
def test_after_others_a_result_may_take_its_time(
    queue: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.write_text(line)
    watch = slurm.Watch()
    job = submitit.SlurmJob(queue.parent, "12")
    assert watch.look([job]) == {}
    monkeypatch.setattr(slurm, "FILE_SECONDS", 0.0)
    (reason,) = watch.look([job]).values()
    assert reason is not None
    assert reason.startswith("Slurm has ended it")
    job.paths.result_pickle.touch()
    assert watch.look([job]) == {"12": None}
