"""A search whose workers are Slurm jobs on a study in PostgreSQL.

Some of them are ended, one is queued again, and the command itself is killed and started anew.
"""

import json
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import optuna
import psutil
import pytest
import yaml
from optuna.trial import TrialState

from benchmarks.postgresql_server import PostgreSQLServer
from search import config as search_config
from tests.cluster.conftest import LAUNCHER, Start, page_command
from tests.cluster.slurm_cluster import SlurmCluster
from tests.search.small_search import SETTINGS, small_text
from tests.search.small_space import space_config

NUM_CANDIDATES = 10
NUM_WORKERS = 4
TIMEOUT_SECONDS = 150.0


@pytest.fixture
def search(root: Path, tmp_path: Path) -> list[str]:
    """The command of docs/slurm.md, of fewer workers and of candidates that take some seconds."""
    values = {
        **SETTINGS,
        "space": search_config.plain(space_config(max_operators=6)),
        "data": small_text(tmp_path),
        "evolution": {"initial_candidates": 6, "population_size": 4, "sample_size": 2},
        "proxy": {**SETTINGS["proxy"], "rung_tokens": [4800]},
        "num_candidates": NUM_CANDIDATES,
        "audit": {"candidates": 1, "repeated": 1, "seeds": 0},
        # Far above any.
        "target_ms": 1e6,
    }
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /data: text\n" + yaml.safe_dump(values)
    (tmp_path / "experiment" / "tiny.yaml").write_text(text)
    python, option, module, *overrides = page_command(root, "name=many")
    assert (python, option, module) == ("python", "-m", "search")
    return [
        *("-m", "search", "--config-dir", str(tmp_path), *overrides),
        *("experiment=tiny", f"workers={NUM_WORKERS}"),
        # The seeds of the demo's space are not those of the test's.
        *("~space.seeds.mamba2_attention", "~space.seeds.deltanet_mamba2", *LAUNCHER),
    ]


def held_by(url: str) -> list[int]:
    """Processes that hold claims."""
    study = optuna.load_study(study_name="many", storage=url)
    running = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
    return [trial.user_attrs["claim"]["owner"]["pid"] for trial in running]


def freeze_with_claims(
    cluster: SlurmCluster, url: str, count: int
) -> tuple[list[psutil.Process], dict[int, str]]:
    """Stop all workers at a moment at which so many of them hold claims.

    The processes that are stopped, and the number of each worker's job by its process.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        jobs = [job_id for job_id, state in cluster.jobs().items() if state == "RUNNING"]
        by_pid = {each.pid: job_id for job_id in jobs for each in cluster.processes(job_id)}
        if len(by_pid) == NUM_WORKERS:
            workers = [psutil.Process(pid) for pid in by_pid]
            # Those that train, too: who is woken to be told must not find that all is done.
            processes = [p for worker in workers for p in (worker, *worker.children(True))]
            for process in processes:
                process.suspend()
            # What they have told the database last is done by then.
            time.sleep(1.0)
            if len(set(held_by(url)) & set(by_pid)) >= count:
                return processes, by_pid
            resume(processes)
        time.sleep(0.3)
    raise AssertionError(f"no {count} of {NUM_WORKERS} workers hold claims")


def resume(processes: list[psutil.Process]) -> None:
    """Those that are still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def test_a_search_comes_to_its_end_whoever_is_left(
    cluster: SlurmCluster,
    postgresql: str,
    postgresql_server: PostgreSQLServer,
    search: list[str],
    start: Start,
    tmp_path: Path,
) -> None:
    assert f"storage.url={postgresql}" in search
    command = start(*search)
    assert command.stdout is not None
    said = ""
    while "#3 " not in said:
        line = command.stdout.readline()
        assert line, said
        said += line
    frozen, by_pid = freeze_with_claims(cluster, postgresql, 3)
    killed, cancelled, requeued, *_ = (pid for pid in held_by(postgresql) if pid in by_pid)
    command.kill()
    command.wait()
    again = start(*search)
    assert again.stdout is not None
    found = [again.stdout.readline() for _ in range(NUM_WORKERS + 1)]
    # The target comes between them.
    assert sum(", from before" in line for line in found) == NUM_WORKERS, found
    psutil.Process(killed).send_signal(signal.SIGKILL)
    cluster.run("scancel", by_pid[cancelled])
    # As Slurm does by itself, `signal_delay_s` before a job's time is over.
    cluster.run("scancel", "--signal=USR2", by_pid[requeued])
    resume(frozen)
    output = again.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert again.returncode == 0, output
    assert "Restarts=1 " in cluster.run("scontrol", "show", "job", by_pid[requeued])

    study = optuna.load_study(study_name="many", storage=postgresql)
    scored = Counter(
        trial.user_attrs["proposal"]["number"]
        for trial in study.trials
        if trial.state == TrialState.COMPLETE
    )
    assert scored == dict.fromkeys(range(NUM_CANDIDATES), 1)
    lost = [t for t in study.trials if t.state == TrialState.FAIL and "dropped" not in t.user_attrs]
    pids = {trial.user_attrs["claim"]["owner"]["pid"] for trial in lost}
    assert pids == {killed, cancelled, requeued}
    released = [t.user_attrs["released"] for t in lost if "released" in t.user_attrs]
    # Who was stopped while it made a claim cannot release it; that is taken from the dead then.
    assert set(released) == {"interrupted by KeyboardInterrupt"}

    run_folder = tmp_path / "runs" / "many"
    described = json.loads((run_folder / "search.json").read_text())
    assert described["status"] == "finished"
    assert described["command"] == ["python", *search]
    assert len(json.loads((run_folder / "candidates.json").read_text())) == NUM_CANDIDATES
    frontier = json.loads((run_folder / "frontier.json").read_text())
    assert all(member["cloze_error"] is not None for member in frontier["members"])
    assert (run_folder / "report.html").exists()
    assert f"{NUM_CANDIDATES} candidates scored, 0 failed" in output
    checkpoints = {path.name for path in (run_folder / "candidates").iterdir()}
    assert len(checkpoints) == NUM_CANDIDATES
    for path in run_folder.rglob("*"):
        if path.is_file():
            assert postgresql_server.password.encode() not in path.read_bytes(), path
    assert os.environ["PGPASSWORD"] == postgresql_server.password
