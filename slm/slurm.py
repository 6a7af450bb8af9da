"""Slurm: our jobs, what its queue knows of them, and how one is queued again.

The queue is asked by squeue, which every cluster has. submitit asks sacct, that is the accounting
database; where there is none, it waits for ever for a job that was cancelled or killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from slm.config import ConfigError

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from submitit import AutoExecutor, Job

# What `configs/hydra/launcher/slurm.yaml` launches sweeps with.
LAUNCHER = "hydra_plugins.slm_slurm.SlurmLauncher"
# In one of these a job has ended for good. One that is preempted, or whose node fails, is pending
# again if it may be queued again, and has been forgotten by the queue if not.
ENDED = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    )
)
# Of these, those after which no result is waited for.
LOST = frozenset(("BOOT_FAIL", "CANCELLED", "DEADLINE", "NODE_FAIL", "PREEMPTED", "REVOKED"))
# Between two looks at the queue: few, for many users look at the same one.
MIN_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 15.0
PAUSE_SHARE = 0.05
# For the queue to answer, which it does not while its server is restarted, or very busy.
ANSWER_SECONDS = 60.0
# For a file to be seen on another machine.
FILE_SECONDS = 10.0
# What submitit calls options in its own words; the others are sbatch's.
COMMON_OPTIONS = frozenset(
    (
        *("name", "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb"),
        *("nodes", "stderr_to_stdout"),
    )
)
# Options of the launcher itself.
OWN_OPTIONS = frozenset(("_target_", "submitit_folder", "max_num_timeout"))


def is_chosen(hydra: DictConfig | HydraConf) -> bool:
    """Whether a composed `hydra` node names this launcher."""
    return bool(hydra.launcher.get("_target_") == LAUNCHER)


def problems() -> list[str]:
    """Why nothing can be submitted from here; within a job of Slurm, where nothing has to, none."""
    is_missing = shutil.which("sbatch") is None or shutil.which("squeue") is None
    if is_missing and "SLURM_JOB_ID" not in os.environ:
        return ["hydra/launcher: slurm needs sbatch and squeue, which are not on the PATH"]
    return []


def executor(launcher: Mapping[str, Any]) -> AutoExecutor:
    """What submits jobs with the options of `configs/hydra/launcher/slurm.yaml`."""
    import submitit

    result = submitit.AutoExecutor(
        folder=launcher["submitit_folder"],
        cluster="slurm",
        slurm_max_num_timeout=launcher["max_num_timeout"],
    )
    options = {key: value for key, value in launcher.items() if key not in OWN_OPTIONS}
    result.update_parameters(
        **{
            key if key in COMMON_OPTIONS else f"slurm_{key}": value
            for key, value in options.items()
        }
    )
    return result


@contextmanager
def submitting() -> Iterator[None]:
    """Raises ConfigError with what sbatch says, if it takes no job."""
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as error:
        raise ConfigError([f"hydra.launcher: {' '.join(str(error).split())}"]) from None


def queue_states() -> dict[str, str] | None:
    """The state of each of this user's jobs, by its id ('12', in an array '12_3').

    A job that has ended is forgotten after a while (MinJobAge). None if the queue does not answer.
    """
    command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i %T"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return {job_id: state for job_id, _, state in lines}


def is_alive(job_id: str) -> bool:
    """Whether a job waits or runs. Raises ConfigError if for long the queue does not answer."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while (states := queue_states()) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                [
                    f"hydra/launcher: squeue does not answer, so whether Slurm's job {job_id}, "
                    "from before, still runs is not known; try again when it does"
                ]
            )
        time.sleep(MIN_PAUSE_SECONDS)
    return states.get(job_id, "COMPLETED") not in ENDED


class Watch:
    """Tells which jobs have ended, and how."""

    def __init__(self) -> None:
        self._begin_s = self._changed_s = time.monotonic()
        # When a job was first missed in the queue.
        self._missed_s: dict[str, float] = {}
        self.states: dict[str, str] = {}

    def look(self, jobs: Sequence[Job[Any]]) -> dict[str, str | None]:
        """Of those of `jobs` that have ended: why there is no result; None if there is one."""
        states = queue_states()
        found: dict[str, str | None] = {}
        for job in jobs:
            if has_result(job):
                found[job.job_id] = None
            elif states is not None and states.get(job.job_id, "COMPLETED") in ENDED:
                state = states.get(job.job_id)
                missed_s = self._missed_s.setdefault(job.job_id, time.monotonic())
                # It may have ended well, and its result not be seen here yet.
                if state in LOST or time.monotonic() - missed_s > FILE_SECONDS:
                    found[job.job_id] = self._reason(state)
            else:
                self._missed_s.pop(job.job_id, None)
        if states is not None and states != self.states:
            self.states, self._changed_s = states, time.monotonic()
        return found

    def pause(self) -> None:
        """Until the next look: the longer, the less happens."""
        quiet_s = time.monotonic() - self._changed_s
        time.sleep(min(MAX_PAUSE_SECONDS, max(MIN_PAUSE_SECONDS, PAUSE_SHARE * quiet_s)))

    @staticmethod
    def _reason(state: str | None) -> str:
        if state is None:
            return "Slurm has ended it, and no longer knows how"
        return f"Slurm has ended it: {state}"


def has_result(job: Job[Any]) -> bool:
    """Whether every task of a job has come to its end, well or not."""
    paths = [job.task(number).paths for number in range(job.num_tasks)]
    if paths[0].folder.is_dir():
        # Listing it brings what a network file system remembers of it up to date.
        os.listdir(paths[0].folder)
    return all(path.result_pickle.exists() for path in paths)


def cancel(job_ids: Sequence[str]) -> None:
    """Have Slurm end jobs: SIGTERM, and after a while SIGKILL."""
    if job_ids:
        subprocess.run(["scancel", *job_ids], capture_output=True)


def requeue_stopped(is_out_of_time: bool, most: int) -> None:
    """Have Slurm run this job again, which is about to end because a signal told it to.

    It does if its time is nearly over, unless it has begun anew `most` times; or if it is
    preempted: Slurm queues such a job again only if it has to kill it, not if it ends before that.
    A job that is cancelled stays so. Slurm then ends the job as it is.
    """
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return
    if is_out_of_time:
        is_wanted = int(os.environ.get("SLURM_RESTART_COUNT", "0")) < most
    else:
        is_wanted = _is_preempted()
    if is_wanted:
        subprocess.run(["scontrol", "requeue", _job_id()], check=True)


def _is_preempted() -> bool:
    """Whether Slurm has told this job so, and gives it time to end."""
    command = ["squeue", f"--jobs={_job_id()}", "--noheader", "--Format=State:20,PreemptTime:30"]
    done = subprocess.run(command, capture_output=True, text=True)
    state, _, preempted_at = done.stdout.strip().partition(" ")
    return state == "RUNNING" and preempted_at.strip() not in ("", "N/A")


def log_path(job: Job[Any]) -> Path:
    """What a job has written to standard error."""
    return Path(job.task(0).paths.stderr)


def _job_id() -> str:
    """Of this job."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is None:
        return os.environ["SLURM_JOB_ID"]
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
