"""Hydra's launcher of sweeps as Slurm jobs: that of hydra-submitit-launcher, and what it lacks.

It waits for every job, whatever becomes of others, and learns from Slurm's queue that one was
cancelled or killed. A job that is told that its time is over, once it has saved what it did, is
queued again. Hydra takes launchers from this package only.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import open_dict

from slm import slurm
from slm.config import EXIT_BAD_CONFIG, EXIT_OUT_OF_TIME, EXIT_PREEMPTED, ConfigError
from slm.jobs import Job, leave_error

log = logging.getLogger(__name__)

# Hydra imports this file at every start, also without the extra `sweeps`.
if find_spec("hydra_plugins.hydra_submitit_launcher") is not None:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
        SlurmLauncher as SubmititLauncher,
    )

    class SlurmLauncher(SubmititLauncher):
        """Each job of a sweep is a Slurm job, all of them one array.

        Why a job failed stands in its folder, `slm.jobs.ERROR_FILE`; for Hydra all are done.
        """

        def launch(
            self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
        ) -> Sequence[JobReturn]:
            """Submit the jobs and wait for them; Ctrl-C cancels them."""
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            try:
                with slurm.submitting():
                    submitted = slurm.executor(self.params).map_array(
                        self,
                        list(map(list, job_overrides)),
                        ["hydra.sweep.dir"] * len(numbers),
                        numbers,
                        [f"job_id_for_{number}" for number in numbers],
                        [Singleton.get_state()] * len(numbers),
                    )
            except ConfigError as error:
                # Hydra would print a traceback.
                print(f"error: {error}", file=sys.stderr)
                sys.exit(EXIT_BAD_CONFIG)
            jobs = {
                each.job_id: self._job(overrides, number)
                for each, overrides, number in zip(submitted, job_overrides, numbers, strict=True)
            }
            for job_id, job in jobs.items():
                log.info("job %d is Slurm's %s: %s", job.number, job_id, " ".join(job.overrides))
            self._wait(submitted, jobs)
            return [
                JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
                for overrides in job_overrides
            ]

        def __call__(self, *arguments: Any) -> JobReturn:
            """What the Slurm job does."""
            try:
                return super().__call__(*arguments)
            except SystemExit as stop:
                if stop.code in (EXIT_PREEMPTED, EXIT_OUT_OF_TIME):
                    slurm.requeue_stopped(
                        stop.code == EXIT_OUT_OF_TIME, self.params["max_num_timeout"]
                    )
                raise

        def _job(self, overrides: Sequence[str], number: int) -> Job:
            assert self.config is not None
            assert self.hydra_context is not None
            config = self.hydra_context.config_loader.load_sweep_config(
                self.config, list(overrides)
            )
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            return Job.of(config)

        def _wait(self, submitted: Sequence[Any], jobs: dict[str, Job]) -> None:
            """Until each has ended; what ended without a result says so in its folder."""
            watch, left = slurm.Watch(), list(submitted)
            try:
                while left:
                    ended = watch.look(left)
                    for slurm_job in [job for job in left if job.job_id in ended]:
                        left.remove(slurm_job)
                        self._note_end(slurm_job, jobs[slurm_job.job_id], ended[slurm_job.job_id])
                    if left:
                        watch.pause()
            finally:
                # Only what an interruption has left.
                slurm.cancel([job.job_id for job in left])

        @staticmethod
        def _note_end(slurm_job: Any, job: Job, reason: str | None) -> None:
            if reason is None:
                # Of what went wrong around the task, which leaves its own reason.
                error = slurm_job.exception()
                reason = None if error is None else "its process failed"
            if reason is not None:
                leave_error(job.folder, f"{reason}; its output: {slurm.log_path(slurm_job)}")
            log.info("job %d has ended%s", job.number, ": " + job.error if job.error else "")
