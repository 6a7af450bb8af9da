"""Slurm jobs that work on one thing together: those that die are submitted again, a few times.

Which they are stands in a file, so that a command that is run again finds those it left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slm import slurm
from slm.config import ConfigError
from slm.training.files import write_atomically

if TYPE_CHECKING:
    from submitit import Job

JOBS_FILE = "slurm_jobs.json"
# Times that one of the jobs is submitted.
MAX_SUBMISSIONS = 5

# What a job runs; it returns what is wrong, in lines, or nothing.
Work = Callable[..., list[str]]


@dataclass
class _Member:
    """One of the jobs, and how to submit it again."""

    job: Job[list[str]]
    work: Work
    arguments: tuple[Any, ...]
    submissions: int = 1


class SlurmJobs:
    """The jobs of a run's folder, by name; as a context they are cancelled if the block fails.

    launcher: options of `configs/hydra/launcher/slurm.yaml`. say: takes lines for people.
    """

    def __init__(
        self, run_folder: Path, launcher: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._file = run_folder / JOBS_FILE
        self._executor = slurm.executor(launcher)
        self._say = say
        self._watch = slurm.Watch()
        self._members: dict[str, _Member] = {}
        # One of them has come to the end of what they work on.
        self.is_done = False

    def start(self, name: str, work: Work, *arguments: Any) -> None:
        """Have a job run `work(*arguments)`, unless one of that name has been left behind."""
        job_id = self._noted().get(name)
        if job_id is not None and slurm.is_alive(job_id):
            self._say(f"{name} is Slurm's job {job_id}, from before")
            job = self._job(job_id)
        else:
            job = self._submit(name, work, arguments)
        self._members[name] = _Member(job, work, arguments)

    def look(self) -> bool:
        """Submit again what has died; whether any job is left, or waited for.

        Raises ConfigError with what a job says is wrong, or if all of them have died too often.
        """
        ended = self._watch.look([member.job for member in self._members.values()])
        for name, member in list(self._members.items()):
            if member.job.job_id in ended:
                self._on_end(name, member, ended[member.job.job_id])
        if not self._members and not self.is_done:
            raise ConfigError(
                [
                    f"hydra/launcher: all jobs have ended {MAX_SUBMISSIONS} times before they were "
                    "done; what they say is in the files named above"
                ]
            )
        return bool(self._members)

    def pause(self) -> None:
        """Until the next look."""
        self._watch.pause()

    def standing(self) -> str:
        """What the jobs do, in numbers: '6 running, 2 pending'."""
        states = [
            self._watch.states.get(member.job.job_id, "PENDING").lower()
            for member in self._members.values()
        ]
        return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))

    @property
    def num_running(self) -> int:
        """Jobs that Slurm has given a place."""
        members = self._members.values()
        return sum(self._watch.states.get(each.job.job_id) == "RUNNING" for each in members)

    def __enter__(self) -> SlurmJobs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        slurm.cancel([member.job.job_id for member in self._members.values()])

    def _on_end(self, name: str, member: _Member, reason: str | None) -> None:
        del self._members[name]
        if reason is None:
            if (failure := member.job.exception()) is None:
                if problems := member.job.result():
                    raise ConfigError(problems)
                self.is_done = True
                return
            reason = str(failure).strip().splitlines()[-1]
        if self.is_done:
            return
        said = f"{name}, Slurm's job {member.job.job_id}: {reason}; {slurm.log_path(member.job)}"
        if member.submissions == MAX_SUBMISSIONS:
            self._say(f"{said}; it is given up")
            return
        self._say(f"{said}; it is submitted again")
        job = self._submit(name, member.work, member.arguments)
        submissions = member.submissions + 1
        self._members[name] = _Member(job, member.work, member.arguments, submissions)

    def _submit(self, name: str, work: Work, arguments: tuple[Any, ...]) -> Job[list[str]]:
        with slurm.submitting():
            job: Job[list[str]] = self._executor.submit(work, *arguments)
        noted = {**self._noted(), name: job.job_id}
        write_atomically(self._file, json.dumps(noted, indent=1) + "\n")
        self._say(f"{name} is Slurm's job {job.job_id}")
        return job

    def _noted(self) -> dict[str, str]:
        """The last job of each name."""
        if not self._file.exists():
            return {}
        noted: dict[str, str] = json.loads(self._file.read_text(encoding="utf-8"))
        return noted

    def _job(self, job_id: str) -> Job[list[str]]:
        from submitit import SlurmJob

        return SlurmJob(self._executor.folder, job_id)
