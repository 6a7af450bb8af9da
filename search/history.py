"""What a search knows of its candidates, in a form that proposals and promotions are made from.

Nothing here costs more in a long search than in a short one.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from search.frontier import Point
from search.genotype import Genotype

# waiting: lost its owner. scored: done with the rung it was on. infeasible: no width meets the
# target. failed: training it went wrong.
State = Literal["waiting", "running", "scored", "failed", "infeasible"]
# How good the model is: nats per token, or shares of wrong answers.
Quality = Literal["loss", "cloze_error", "continuation_error", "task_error"]
Objective = Literal[Quality, "latency_ms", "memory_bytes"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)


@dataclass(frozen=True)
class Candidate:
    """What evolution knows of a candidate.

    state: on the rung that it is on. scores: how good it is, by the search's one objective of
    quality, after each rung that it is done with; the lower the better. latency_ms: of the whole
    model, measured; memory_bytes: its weights and state. None until known.
    """

    number: int
    genotype: Genotype
    state: State
    scores: tuple[float, ...] = ()
    latency_ms: float | None = None
    memory_bytes: int | None = None

    @property
    def is_scored(self) -> bool:
        """Whether it has a score and did not fail later."""
        return bool(self.scores) and self.state != "failed"

    def costs(self, objectives: Iterable[Objective]) -> Point | None:
        """Its objectives but the score; None if it was not measured."""
        known = {"latency_ms": self.latency_ms, "memory_bytes": self.memory_bytes}
        costs = [known[objective] for objective in objectives if objective not in QUALITIES]
        return None if None in costs else tuple(map(float, costs))  # type: ignore[arg-type]

    def point(self, objectives: Iterable[Objective], rung: int) -> Point:
        """Its objectives, with the score after a rung."""
        costs = self.costs(objectives)
        assert costs is not None, f"candidate {self.number} was not measured"
        return (self.scores[rung], *costs)


@dataclass(frozen=True)
class Proposal:
    """The next candidate, and where it comes from.

    seed_name: for a seed. parent, factor: for a mutation, the parent's number and what changed.
    """

    number: int
    genotype: Genotype
    origin: Literal["seed", "random", "mutation", "crossover", "sampler"]
    seed_name: str | None = None
    parent: int | None = None
    factor: str | None = None


@dataclass(frozen=True)
class Promotion:
    """A candidate that goes on to a rung."""

    number: int
    rung: int


class History:
    """Every candidate of a search, by number from 0."""

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self._candidates: list[Candidate] = []
        self._numbers: dict[Genotype, int] = {}
        # Numbers of the candidates that are done with each rung, in order.
        self._done: list[list[int]] = []
        # Candidates that trained, are training or will: all but the infeasible.
        self.num_tried = 0
        self._waiting: set[int] = set()
        # Numbers of those that are, or will be, on their first rung.
        self.pending: set[int] = set()
        for candidate in candidates:
            self.put(candidate)

    def __len__(self) -> int:
        return len(self._candidates)

    def __getitem__(self, number: int) -> Candidate:
        return self._candidates[number]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._candidates)

    def __contains__(self, genotype: Genotype) -> bool:
        return genotype in self._numbers

    def put(self, candidate: Candidate) -> None:
        """Add the next candidate, or what is now known of one."""
        number = candidate.number
        if number == len(self._candidates):
            before = None
            self._candidates.append(candidate)
            self._numbers[candidate.genotype] = number
        else:
            before = self._candidates[number]
            assert before.genotype == candidate.genotype, f"candidate {number} changed"
            self._candidates[number] = candidate
        self.num_tried += (candidate.state != "infeasible") - (
            before is not None and before.state != "infeasible"
        )
        (self._waiting.add if candidate.state == "waiting" else self._waiting.discard)(number)
        is_pending = candidate.state in ("waiting", "running") and not candidate.scores
        (self.pending.add if is_pending else self.pending.discard)(number)
        num_known = len(before.scores) if before else 0
        for rung in range(num_known, len(candidate.scores)):
            if rung == len(self._done):
                self._done.append([])
            bisect.insort(self._done[rung], number)

    @property
    def num_scores(self) -> int:
        """Trainings that gave a score, over all rungs."""
        return sum(map(len, self._done))

    def waiting(self) -> list[int]:
        """Numbers of the candidates that lost their owner."""
        return sorted(self._waiting)

    def newest(self, before: int | None = None) -> Iterator[Candidate]:
        """Scored candidates, the newest first; with `before` only those of smaller numbers."""
        scored = self._done[0] if self._done else []
        end = len(scored) if before is None else bisect.bisect_left(scored, before)
        for place in reversed(range(end)):
            candidate = self[scored[place]]
            if candidate.is_scored:
                yield candidate

    def done(self, rung: int, newest: int) -> list[Candidate]:
        """Of the candidates that are done with a rung and did not fail, among its newest."""
        numbers = self._done[rung][-newest:] if rung < len(self._done) else []
        return [self[number] for number in numbers if self[number].is_scored]
