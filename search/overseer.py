"""Who looks after a search, and works on it or not: its lines, its files, its loggers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search import results
from search.audit import audit_lines, missing
from search.config import SearchConfig
from search.loggers import Logger, open_logger
from search.model_yaml import training_command
from search.progress import Progress, Stopwatch, format_count, format_duration, format_latency
from search.quality import in_words
from search.run_folder import RunFolder
from search.space import SearchSpace
from search.study import Study

# Files are written anew at most so often, and never for more than this share of the time.
SECONDS_BETWEEN_FILES = 2.0
SHARE_FOR_FILES = 0.02


class Overseer:
    """Tells of a search what its study knows."""

    def __init__(
        self,
        config: SearchConfig,
        run_folder: Path,
        space: SearchSpace,
        study: Study,
        progress: Progress,
        command: Sequence[str] | None = None,
    ) -> None:
        """Begin; command: arguments of `python -m search`, if not those of this process."""
        self.config = config
        self.folder = run_folder
        self.study = study
        self.progress = progress
        self.files = RunFolder(run_folder, config, space, study, command or sys.argv[1:])
        self.stopwatch = Stopwatch()
        self.seconds_before = study.fact("seconds") or 0.0
        self._logger: Logger | None = None
        self._next_files_s = 0.0

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Evaluations are logged within the block."""
        self._logger = open_logger(
            self.config, self.folder, self.study, self.files.standings.num_evaluations
        )
        try:
            yield
        finally:
            self._logger.close()

    def _tell_targets(self) -> None:
        """Say what candidates have to meet, once that is settled."""
        setup = self.study.fact("setup")
        self.progress.target_ms = setup["target_ms"]
        source = setup["reference"] if setup["target_source"] == "reference" else None
        name = f", that of the {source['name']} ({format_latency(source)})" if source else ""
        self.progress.say(f"target: {setup['target_ms']:.4g} ms per request{name}")
        for name, limit in self.config.limits.items():
            target_ms = setup["limits"][name]["target_ms"]
            self.progress.say(f"limits.{name}.target_ms: {target_ms:.4g} ms under {limit.workload}")

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
