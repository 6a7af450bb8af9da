"""A real Slurm cluster for the tests of what runs on one."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import SlurmCluster, missing_programs
from tests.pages import page_commands

NUM_GPUS = 8
# Of the launcher, for jobs on this machine.
LAUNCHER = [
    *("hydra.launcher.partition=main", "hydra.launcher.gpus_per_node=null"),
    *("hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null"),
    "hydra.launcher.timeout_min=30",
]
Start = Callable[..., "subprocess.Popen[str]"]


def page_command(root: Path, argument: str) -> list[str]:
    """The command of docs/slurm.md that has an argument."""
    commands = map(shlex.split, page_commands(root / "docs" / "slurm.md"))
    (command,) = [words for words in commands if argument in words]
    return command


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """One cluster, of which every test waits for its own jobs."""
    if missing := missing_programs():
        pytest.skip(f"needs Slurm (apt-get install slurm-wlm munge): no {', '.join(missing)}")
    # Where the path is short enough for a socket.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with SlurmCluster(folder, NUM_GPUS if os.geteuid() == 0 else 0) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def cluster(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, which every command of the test finds."""
    for variable, value in slurm_cluster.environment.items():
        monkeypatch.setenv(variable, value)
    return slurm_cluster


@pytest.fixture
def start(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts `python …` in the test's folder, as a person would on a login node."""
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
