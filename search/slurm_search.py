"""A search whose workers are Slurm jobs, each on what Slurm gives it; the command looks after them.

The command may run where there is no GPU: it measures and trains nothing. Its first job prepares
the search (corpus, latency table, target), then the others join; when one has found that the search
is over, a last job asks the frontier its questions and makes the audit. They share nothing but the
study and the run's folder, so any of them may be preempted or killed, and so may the command: its
jobs go on to the end of the candidates, and the same command finds them again.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from search.config import SearchConfig
from search.overseer import Overseer
from search.progress import WAITING, Progress
from search.slurm_jobs import SlurmJobs, Work
from search.space import SearchSpace
from search.study import Study
from slm import slurm
from slm.config import EXIT_INTERRUPTED, ConfigError

# Of a record that nobody has to be told of yet.
UNDER_WAY = ("running", "waiting")


class SlurmSearch(Overseer):
    """A search in its run folder; make it, then `run` it.

    Raises ConfigError if the folder holds another search under the same name.
    """

    def __init__(self, config: SearchConfig, run_folder: Path, launcher: Mapping[str, Any]) -> None:
        space = SearchSpace(config.space)
        study = Study.open(
            config.storage,
            run_folder,
            config.name,
            config.identity(),
            space,
            config.evolution.objectives,
            works=False,
        )
        progress = Progress(config.num_candidates, config.evolution.quality)
        super().__init__(config, run_folder, space, study, progress)
        folder = run_folder.absolute() / ".submitit" / "%j"
        self._launcher = {**launcher, "name": config.name, "submitit_folder": str(folder)}
        # A job has its GPUs for itself.
        self._job_config = dataclasses.replace(config, workers=1)
        # What has been told of each candidate: its rung and its state.
        self._told = self._known()

    def run(self) -> dict[str, Any]:
        """Until enough candidates are evaluated; the summary of `frontier.json`."""
        if self._is_finished():
            return self._tell_result()
        try:
            self._evaluate_candidates()
            self._finish()
        except KeyboardInterrupt:
            self.progress.say("interrupted; the jobs are cancelled, the same command goes on")
            raise
        except BaseException:
            self.progress.say("the jobs are cancelled; the same command goes on from here")
            raise
        finally:
            self.progress.end()
            if self.study.fact("setup") is not None and self.study.fact("status") != "finished":
                self.study.refresh()
                self._publish("interrupted")
                self.files.write_report()
        self.study.refresh()
        return self._tell_result()

    def _evaluate_candidates(self) -> None:
        with self._jobs() as jobs:
            self._start(jobs, "worker 0", work)
            while self.study.fact("setup") is None and jobs.look():
                self.progress.live(f"preparing the search: {jobs.standing()}")
                jobs.pause()
            self._tell_targets()
            self._publish("running")
            for index in range(1, self.config.workers):
                self._start(jobs, f"worker {index}", work)
            with self._logging():
                self.progress.begin(self.files.standings.num_done)
                while jobs.look():
                    self._tell_news()
                    self.progress.live(jobs.standing() if jobs.num_running else WAITING)
                    jobs.pause()
                self._tell_news()

    def _finish(self) -> None:
        """Have a job question the frontier and make the audit."""
        with self._jobs() as jobs:
            self._start(jobs, "last job", finish, sys.argv[1:])
            while jobs.look():
                self.progress.live(f"accuracy and audit: {jobs.standing()}")
                jobs.pause()

    def _jobs(self) -> SlurmJobs:
        return SlurmJobs(self.folder, self._launcher, self.progress.say)

    def _start(self, jobs: SlurmJobs, name: str, what: Work, *arguments: Any) -> None:
        most_restarts = self._launcher["max_num_timeout"]
        folder = self.folder.absolute()
        jobs.start(name, what, self._job_config, folder, most_restarts, *arguments)

    def _tell_news(self) -> None:
        """One line for each candidate that is done with a rung since the last time."""
        self.study.refresh()
        known = self._known()
        news = [number for number, state in known.items() if self._told.get(number) != state]
        self._told = known
        for number in news:
            self._on_done(number)

    def _known(self) -> dict[int, tuple[int, str]]:
        return {
            number: (record.rung, record.state)
            for number, record in enumerate(self.study.records)
            if record.state not in UNDER_WAY
        }


def work(config: SearchConfig, run_folder: Path, most_restarts: int) -> list[str]:
    """What the job of a worker does; what is wrong with the search, if that has ended it."""

    def search() -> None:
        from search.searcher import Searcher

        searcher = Searcher(config, run_folder)
        with searcher.resources:
            searcher.prepare()
            searcher.run(on_done=lambda number: print(f"candidate {number} is done"))

    return _as_job(config, search, most_restarts)


def finish(
    config: SearchConfig, run_folder: Path, most_restarts: int, command: list[str]
) -> list[str]:
    """What the last job does, once all candidates are evaluated.

    command: arguments of the one that has submitted the job.
    """

    def search() -> None:
        from search.run import Search

        Search(config, run_folder, command).run()

    return _as_job(config, search, most_restarts)


def _as_job(config: SearchConfig, do: Callable[[], None], most_restarts: int) -> list[str]:
    """Do it until a signal comes, by which the job ends in order, or is queued again."""
    received = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        _handle_signals(signal.SIG_IGN)
        raise KeyboardInterrupt

    _handle_signals(interrupt)
    try:
        config.runtime().apply()
        do()
    except ConfigError as error:
        return error.problems
    except KeyboardInterrupt:
        slurm.requeue_stopped(received == signal.SIGUSR2, most_restarts)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        _handle_signals(signal.SIG_IGN)
    return []


def _handle_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, handler)
