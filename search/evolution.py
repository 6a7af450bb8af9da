"""Aging evolution (Real 2019) as Nemotron-Flash uses it: a pure function of (seed, history).

Each candidate's random stream is derived from the seed and its number, so a search that was
stopped goes on as if it had not been: what was proposed is in the history, what comes next follows
from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from search.genotype import Genotype
from search.space import SearchSpace
from slm.config import ConfigError, schema

# infeasible: no width meets the target. failed: training it went wrong.
State = Literal["waiting", "running", "scored", "failed", "infeasible"]
PROPOSAL_ATTEMPTS = 500
# A parent whose neighbours are all known: so many attempts for each further mutation step.
ATTEMPTS_PER_STEP = 25


@schema
class EvolutionConfig:
    """Aging evolution.

    initial_candidates: seeds, then random ones, before the first mutation.
    population_size: the newest so many candidates can be parents; older ones have died.
    sample_size: of these so many are drawn, and the best becomes the parent.
    """

    initial_candidates: int
    population_size: int
    sample_size: int

    def __post_init__(self) -> None:
        problems = [
            f"{name}: must be >= 1, got {getattr(self, name)}"
            for name in ("initial_candidates", "population_size", "sample_size")
            if getattr(self, name) < 1
        ]
        if self.sample_size > self.population_size:
            problems.append(
                f"sample_size: must be <= population_size {self.population_size}, "
                f"got {self.sample_size}"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Candidate:
    """What evolution knows of a candidate.

    loss: nats per token, and latency_ms: of the whole model, measured; None until it is scored.
    """

    number: int
    genotype: Genotype
    state: State
    loss: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Proposal:
    """The next candidate, and where it comes from.

    seed_name: for a seed. parent, factor: for a mutation, the parent's number and what changed.
    """

    number: int
    genotype: Genotype
    origin: Literal["seed", "random", "mutation"]
    seed_name: str | None = None
    parent: int | None = None
    factor: str | None = None


def propose(
    space: SearchSpace,
    config: EvolutionConfig,
    seed: int,
    target_ms: float,
    history: Sequence[Candidate],
) -> Proposal | None:
    """The candidate that follows `history`; None when nothing new can be found.

    history: every candidate so far, in the order of their numbers.
    """
    number = len(history)
    rng = random.Random(f"{seed}/{number}")
    known = {candidate.genotype for candidate in history}
    for name in space.config.seeds:
        if (genotype := space.seed(name)) not in known:
            return Proposal(number, genotype, "seed", seed_name=name)

    num_tried = sum(candidate.state != "infeasible" for candidate in history)
    population = living(history, config.population_size)
    if num_tried < config.initial_candidates or not population:
        return _propose_random(space, number, rng, known)
    parent = select_parent(population, config.sample_size, target_ms, rng)
    child = _propose_child(space, number, rng, known, parent)
    return child or _propose_random(space, number, rng, known)


def living(history: Sequence[Candidate], population_size: int) -> list[Candidate]:
    """The newest scored candidates: the oldest is removed as one is added."""
    return [candidate for candidate in history if candidate.state == "scored"][-population_size:]


def select_parent(
    population: Sequence[Candidate], sample_size: int, target_ms: float, rng: random.Random
) -> Candidate:
    """The lowest loss that meets the target in a random sample; the fastest if none meets it."""
    sample = rng.sample(population, min(sample_size, len(population)))

    def rank(candidate: Candidate) -> tuple[bool, float, int]:
        assert candidate.loss is not None
        assert candidate.latency_ms is not None
        misses = candidate.latency_ms > target_ms
        return misses, candidate.latency_ms if misses else candidate.loss, candidate.number

    return min(sample, key=rank)


def _propose_random(
    space: SearchSpace, number: int, rng: random.Random, known: set[Genotype]
) -> Proposal | None:
    for _ in range(PROPOSAL_ATTEMPTS):
        if (genotype := space.sample(rng)) not in known:
            return Proposal(number, genotype, "random")
    return None


def _propose_child(
    space: SearchSpace, number: int, rng: random.Random, known: set[Genotype], parent: Candidate
) -> Proposal | None:
    """A mutation of the parent that is new; a mutation of a mutation if need be."""
    for attempt in range(PROPOSAL_ATTEMPTS):
        genotype, factors = parent.genotype, []
        for _ in range(1 + attempt // ATTEMPTS_PER_STEP):
            if (mutation := space.mutate(genotype, rng)) is None:
                return None
            genotype = space.canonical(mutation.genotype)
            factors.append(mutation.factor)
        if genotype not in known:
            return Proposal(
                number, genotype, "mutation", parent=parent.number, factor="+".join(factors)
            )
    return None
