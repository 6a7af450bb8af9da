"""Eight GPUs of one node, fake ones: each job uses those that Slurm has given to it."""

import os
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from slm import slurm
from slm.config import compose
from tests.cluster.conftest import LAUNCHER, NUM_GPUS
from tests.cluster.slurm_cluster import SlurmCluster

GPUS_PER_JOB = 2
NUM_JOBS = NUM_GPUS // GPUS_PER_JOB


def gpus_of_worker(folder: Path, number: int) -> str | None:
    """Those that a search's worker takes in a job of Slurm, while all others have theirs."""
    import torch

    from search.devices import visible_devices

    (folder / str(number)).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < NUM_JOBS and time.monotonic() < deadline:
        time.sleep(0.1)
    # There are none; which they are is asked of Slurm's environment only.
    torch.cuda.is_available = lambda: True
    return visible_devices(0, GPUS_PER_JOB)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices")
def test_each_job_takes_the_gpus_that_slurm_gives_it(
    cluster: SlurmCluster, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.chdir(tmp_path)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (config,) = compose(
        "train", ["hydra/launcher=slurm", *LAUNCHER, f"hydra.launcher.gpus_per_node={GPUS_PER_JOB}"]
    )
    options = {**config.hydra.launcher, "submitit_folder": str(tmp_path / "jobs" / "%j")}
    (tmp_path / "together").mkdir()
    executor = slurm.executor(options)
    jobs = executor.map_array(gpus_of_worker, [tmp_path / "together"] * NUM_JOBS, range(NUM_JOBS))
    watch = slurm.Watch()
    while len(ended := watch.look(jobs)) < NUM_JOBS:
        watch.pause()
    assert set(ended.values()) == {None}
    given = [job.result().split(",") for job in jobs]
    assert [len(names) for names in given] == [GPUS_PER_JOB] * NUM_JOBS
    assert sorted(name for names in given for name in names) == [str(n) for n in range(NUM_GPUS)]
