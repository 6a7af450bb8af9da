"""How a search stands: a row per candidate, the best and the frontier, kept up to date.

What a new score costs here does not grow with the search.
"""

from __future__ import annotations

from search.frontier import Frontier
from search.history import Quality
from search.results import Row, candidate_row, chosen, is_scored, worst_point
from search.space import SearchSpace
from search.study import Study


class Standings:
    """Rows of a study's candidates, by number, as they were at the last `update`.

    best: the best score that meets the target. num_done: candidates that are done with a rung, or
    failed. num_evaluations: rungs that candidates are done with, failed on or were too slow for.
    tokens: that all of them were trained on. context_tokens: of the workload. quality: what scores
    are.
    """

    def __init__(
        self, study: Study, space: SearchSpace, context_tokens: int, quality: Quality
    ) -> None:
        self.rows: list[Row] = []
        self.best: Row | None = None
        self.num_done = 0
        self.num_evaluations = 0
        self.tokens = 0
        self._study = study
        self._space = space
        self._context_tokens = context_tokens
        self._quality = quality
        # Of the study's changes, those that were taken over.
        self._num_changes = 0
        # Known once the search has been prepared.
        self._frontier: Frontier | None = None
        self._target_ms = 0.0

    @property
    def num_on_frontier(self) -> int:
        """Members of the frontier."""
        return len(self._frontier.points) if self._frontier is not None else 0

    @property
    def hypervolume(self) -> float:
        """Of the frontier."""
        return self._frontier.hypervolume if self._frontier is not None else 0.0

    def update(self) -> None:
        """Take over what the study has read since."""
        if self._frontier is None:
            setup = self._study.fact("setup")
            self._target_ms = setup["target_ms"]
            self._frontier = Frontier(
                worst_point(self._target_ms, setup["vocab_size"], self._quality)
            )
        changes = self._study.changes[self._num_changes :]
        self._num_changes += len(changes)
        for number in sorted(set(changes)):
            before = self.rows[number] if number < len(self.rows) else None
            record = self._study.records[number]
            row = candidate_row(record, self._space, self._target_ms, self._context_tokens)
            self.rows[number : number + 1] = [row]
            self.num_done += _is_done(row) - (before is not None and _is_done(before))
            self.num_evaluations += _num_evaluations(row) - _num_evaluations(before)
            self.tokens += _tokens(row) - _tokens(before)
            if is_scored(row):
                self._frontier.add((row["score"], row["latency_ms"]))
            if before is not None and before is self.best:
                self.best = chosen(self.rows)
            else:
                self.best = chosen([row] if self.best is None else [self.best, row])


def _is_done(row: Row) -> bool:
    return bool(row["rungs"]) or row["state"] == "failed"


def _num_evaluations(row: Row | None) -> int:
    return len(row["rungs"]) + (row["state"] in ("failed", "infeasible")) if row else 0


def _tokens(row: Row | None) -> int:
    return row["rungs"][-1]["tokens"] if row and row["rungs"] else 0
