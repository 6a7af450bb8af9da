"""One search from start to end: data, device, table, target, candidates, frontier.

What is known lives in the study. Everything else in the run folder is written from it, so the same
command goes on wherever the last one ended.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from search import results
from search.audit import audit_lines, missing, run_audit
from search.config import SearchConfig
from search.loggers import Logger, open_logger
from search.model_yaml import training_command
from search.pool import Pool
from search.progress import Progress, Stopwatch, format_count, format_duration, format_latency
from search.quality import in_words
from search.run_folder import RunFolder
from search.searcher import Searcher
from search.worker import JobError

# Files are written anew at most so often, and never for more than this share of the time.
SECONDS_BETWEEN_FILES = 2.0
SHARE_FOR_FILES = 0.05


class Search:
    """A search in its run folder; make it, then `run` it.

    Raises ConfigError if the folder holds another search under the same name.
    """

    def __init__(self, config: SearchConfig, run_folder: Path) -> None:
        self.config = config
        self.folder = run_folder
        self.progress = Progress(config.num_candidates, config.evolution.quality, config.workers)
        self.searcher = Searcher(
            config, run_folder, say=self.progress.say, live=self.progress.live_of(0)
        )
        self.study = self.searcher.study
        self.files = RunFolder(
            run_folder, config, self.searcher.space, self.searcher.device, self.study
        )
        self.stopwatch = Stopwatch()
        self.seconds_before = self.study.fact("seconds") or 0.0
        self._logger: Logger | None = None
        self._next_files_s = 0.0

    def run(self) -> dict[str, Any]:
        """Search until enough candidates are evaluated; the summary of `frontier.json`."""
        if self._is_finished():
            return self._tell_result()
        status = "interrupted"
        with self.searcher.resources as resources:
            try:
                self._prepare()
                self._logger = open_logger(
                    self.config, self.folder, self.study, self.files.standings.num_evaluations
                )
                resources.callback(self._logger.close)
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
        setup = self.searcher.setup
        self.progress.target_ms = setup["target_ms"]
        source = setup["reference"] if setup["target_source"] == "reference" else None
        name = f", that of the {source['name']} ({format_latency(source)})" if source else ""
        self.progress.say(f"target: {setup['target_ms']:.4g} ms per request{name}")
        for target in self.searcher.targets[1:]:
            self.progress.say(f"{target.field}: {target.ms:.4g} ms under {target.workload}")
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

    def _on_done(self, number: int) -> None:
        """Publish and tell what is known of a candidate that was just evaluated."""
        self.study.refresh()
        standings = self.files.standings
        standings.update()
        row = standings.rows[number]
        self.progress.candidate(row, standings.best, standings.num_done, standings.num_on_frontier)
        assert self._logger is not None
        self._logger.log(row, self._standing())
        if time.monotonic() >= self._next_files_s:
            begin_s = time.monotonic()
            self._publish("running")
            seconds = time.monotonic() - begin_s
            pause = max(SECONDS_BETWEEN_FILES, seconds / SHARE_FOR_FILES)
            self._next_files_s = time.monotonic() + pause

    def _standing(self) -> dict[str, float | None]:
        """How the search stands, in numbers; what `Logger.log` takes."""
        standings = self.files.standings
        best = standings.best or {}
        return {
            f"best_{self.config.evolution.quality}": best.get("score"),
            "best_latency_ms": best.get("latency_ms"),
            "num_on_frontier": standings.num_on_frontier,
            "hypervolume": standings.hypervolume,
            "candidates_done": standings.num_done,
            "candidates_per_hour": self.progress.candidates_per_hour,
            "proxy_tokens": standings.tokens,
            "busy_share": self.progress.busy_share,
        }

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

    # For people

    def _publish(self, status: str) -> None:
        seconds = self.seconds_before + self.stopwatch.seconds
        self.files.publish(status, round(seconds, 1))

    def _is_finished(self) -> bool:
        return (
            self.study.fact("status") == "finished"
            and self.study.history.num_tried >= self.config.num_candidates
            and not missing(self.config, self.study)
            and (self.folder / "frontier.json").exists()
        )

    def _tell_result(self) -> dict[str, Any]:
        """Show the frontier and what to do with it."""
        summary = self.files.summary()
        seconds = self.study.fact("seconds")
        self.progress.say(
            f"{summary['num_scored']} candidates scored, {summary['num_failed']} failed, "
            f"{summary['num_too_slow']} too slow, {summary['num_too_large']} too large, "
            f"in {format_duration(seconds)}"
        )
        for row in summary["members"]:
            mark = "*" if row["digest"] == summary["chosen"] else " "
            errors = [
                f"  {in_words(error)} {row[error]:.1%}"
                for error in results.ERRORS
                if row[error] is not None
            ]
            remark = "  (no difference)" if row["is_different"] is False else ""
            self.progress.say(
                f"{mark} {row['digest']}  {format_latency(row):<18} loss {row['loss']:.4f}"
                f"{''.join(errors)}  w={row['width']} {format_count(row['parameters'])}  "
                f"{row['short']}{remark}"
            )
        for line in audit_lines(summary["audit"]):
            self.progress.say(line)
        if summary["chosen"] is not None:
            command = training_command(self.folder, summary["chosen"], self.config.plugins)
            self.progress.say(f"train it: {command}")
        if (self.folder / "report.html").exists():
            self.progress.say(f"look at it: {self.folder}/report.html")
        return summary
