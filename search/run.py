"""One search from start to end: data, device, table, target, candidates, frontier.

What is known lives in the study. Everything else in the run folder is written from it, so the same
command goes on wherever the last one ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search import results
from search.audit import run_audit
from search.config import SearchConfig
from search.overseer import Overseer
from search.pool import Pool
from search.progress import Progress
from search.searcher import Searcher
from search.worker import JobError, WorkerProcess


class Search(Overseer):
    """A search in its run folder; make it, then `run` it.

    early: of the worker, if it was started already. Raises ConfigError if the folder holds another
    search under the same name.
    """

    def __init__(
        self,
        config: SearchConfig,
        run_folder: Path,
        command: Sequence[str] | None = None,
        early: WorkerProcess | None = None,
    ) -> None:
        progress = Progress(config.num_candidates, config.evolution.quality, config.workers)
        self.searcher = Searcher(
            config, run_folder, say=progress.say, live=progress.live_of(0), early=early
        )
        space, study = self.searcher.space, self.searcher.study
        super().__init__(config, run_folder, space, study, progress, command)

    def run(self) -> dict[str, Any]:
        """Search until enough candidates are evaluated; the summary of `frontier.json`."""
        if self._is_finished():
            return self._tell_result()
        status = "interrupted"
        with self.searcher.resources as resources:
            try:
                self._prepare()
                resources.enter_context(self._logging())
                self._evaluate_candidates()
                self._question_frontier()
                self._audit()
                status = "running" if self.study.num_running else "finished"
                if status == "finished":
                    self.searcher.remove_leftovers()
            except KeyboardInterrupt:
                self.progress.say("interrupted; the same command goes on from here")
                raise
            finally:
                if self.study.fact("setup") is not None:
                    self.study.refresh()
                    self._publish(status)
                    self.files.write_report()
        return self._tell_result()

    def _prepare(self) -> None:
        """Settle the facts that all candidates share, and say what they are."""
        self.progress.say(f"search '{self.config.name}' on {self.searcher.device.key}")
        corpus = self.searcher.corpus
        self.progress.say(
            f"corpus: {len(corpus.train):,} tokens to train on, vocabulary {corpus.vocab_size}"
        )
        self.searcher.prepare()
        self._tell_targets()
        self._publish("running")

    def _evaluate_candidates(self) -> None:
        """Until the search is over, by this process or by several."""
        self.progress.begin(self.files.standings.num_done)
        try:
            if self.config.workers == 1:
                self.searcher.run(self._on_done)
            else:
                # Each of the others has its own.
                self.searcher.worker.close()
                with Pool(self.config, self.folder, self.progress) as pool:
                    pool.run(self._on_done)
        finally:
            self.progress.end()

    # The frontier

    def _question_frontier(self) -> None:
        """Put the word cloze to the frontier's members that were not asked yet."""
        known = self.study.fact("cloze_errors") or {}
        members = [row for row in results.frontier(self.files.rows()) if row["cloze_error"] is None]
        if not members or not self.config.accuracy_items:
            return
        self.progress.say(f"accuracy of {len(members)} candidates of the frontier")
        checkpoints = {row["architecture"]: row["checkpoint"] for row in members}
        try:
            found = self.searcher.run_job("question", checkpoints)
        except JobError as error:
            self.progress.say(f"no accuracy: {error}")
            return
        self.study.update("cloze_errors", known | found)

    def _audit(self) -> None:
        """Find out how far scores can be trusted; all else can be looked at meanwhile."""
        self._publish("running")
        try:
            run_audit(self.searcher)
        finally:
            self.progress.end()
