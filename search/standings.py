"""How a search stands: a row per candidate, the best and the frontier, kept up to date.

What a new score costs here does not grow with the search.
"""

from __future__ import annotations

from search.frontier import Frontier
from search.results import Row, candidate_row, chosen, is_scored, worst_point
from search.space import SearchSpace
from search.study import Record, Study

ENDED = ("scored", "failed")


class Standings:
    """Rows of a study's candidates, by number, as they were at the last `update`.

    best: the lowest loss that meets the target. num_done: candidates that were trained, or tried.
    context_tokens: of the workload.
    """

    def __init__(self, study: Study, space: SearchSpace, context_tokens: int) -> None:
        self.rows: list[Row] = []
        self.best: Row | None = None
        self.num_done = 0
        self._study = study
        self._space = space
        self._context_tokens = context_tokens
        self._records: list[Record] = []
        self._frontier: Frontier | None = None

    @property
    def num_on_frontier(self) -> int:
        """Members of the frontier."""
        return len(self._frontier.points) if self._frontier is not None else 0

    def update(self) -> None:
        """Take over what the study has read since."""
        setup = self._study.fact("setup")
        if self._frontier is None:
            self._frontier = Frontier(worst_point(setup["target_ms"], setup["vocab_size"]))
        for number, record in enumerate(self._study.records):
            if number < len(self._records) and self._records[number] is record:
                continue
            before = self.rows[number] if number < len(self.rows) else None
            row = candidate_row(record, self._space, setup["target_ms"], self._context_tokens)
            self._records[number : number + 1] = [record]
            self.rows[number : number + 1] = [row]
            self.num_done += (row["state"] in ENDED) - (
                before is not None and before["state"] in ENDED
            )
            if is_scored(row):
                self._frontier.add((row["loss"], row["latency_ms"]))
            if before is not None and before is self.best:
                self.best = chosen(self.rows)
            else:
                self.best = chosen([row] if self.best is None else [self.best, row])
