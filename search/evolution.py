"""What to try next, as a pure function of (seed, history).

- `aging`: aging evolution (Real 2019) as Nemotron-Flash uses it (arXiv 2511.18890): the best score
  within the target of a random sample of the newest candidates becomes the parent.
- `pareto`: the same with non-dominated fronts of all objectives instead of the score, the sample
  judged by the highest rung that its members have reached.
- `random`: no parents.
- `ehvi`: who promises the frontier the most per token, of those that can be trained further and of
  new ones, see `search.improvement`.
- `nsga2`, `tpe`: Optuna's samplers, see `search.samplers`.

Each candidate's random stream is derived from the seed and its number, so a search that was stopped
goes on as if it had not been: what was proposed is in the history, what comes next follows from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import Literal, cast

from search.history import (
    QUALITIES,
    Candidate,
    History,
    Objective,
    Promotion,
    Proposal,
    Quality,
)
from search.improvement import next_by_improvement
from search.offspring import propose_child, propose_random
from search.rungs import promote, ranked
from search.samplers import propose_sampled
from search.space import SearchSpace
from slm.config import ConfigError, schema


@schema
class EvolutionConfig:
    """How candidates are proposed and promoted.

    algorithm: see the top of `search.evolution`.
    objectives: how good the model is, by one of `QUALITIES`, then what it costs; all are minimised.
    initial_candidates: seeds, then random ones, before the first mutation.
    population_size: the newest so many candidates can be parents; older ones have died. For nsga2
        the candidates of a generation, of which the first is random.
    sample_size: of these so many are drawn, and the best becomes the parent.
    children_per_cycle: so many are proposed from the same population; 1 takes every score into
        account as soon as it is there.
    promoted_share: of the candidates of a rung, how many go on to the next.

    Of these numbers ehvi takes initial_candidates alone.
    """

    initial_candidates: int
    population_size: int
    sample_size: int
    algorithm: Literal["aging", "pareto", "ehvi", "random", "nsga2", "tpe"] = "aging"
    objectives: tuple[Objective, ...] = ("loss", "latency_ms")
    children_per_cycle: int = 1
    promoted_share: float = 0.25

    def __post_init__(self) -> None:
        problems = [
            f"{name}: must be >= 1, got {getattr(self, name)}"
            for name in (
                "initial_candidates",
                "population_size",
                "sample_size",
                "children_per_cycle",
            )
            if getattr(self, name) < 1
        ]
        if self.algorithm == "nsga2" and self.population_size == 1:
            problems.append("population_size: must be >= 2 for nsga2, got 1")
        if self.sample_size > self.population_size:
            problems.append(
                f"sample_size: must be <= population_size {self.population_size}, "
                f"got {self.sample_size}"
            )
        if not 0 < self.promoted_share < 1:
            problems.append(
                f"promoted_share: must be above 0 and below 1, got {self.promoted_share}"
            )
        is_quality = [objective in QUALITIES for objective in self.objectives]
        is_repeated = len(set(self.objectives)) < len(self.objectives)
        if is_quality != [True] + [False] * (len(is_quality) - 1) or is_repeated:
            problems.append(
                f"objectives: must begin with {', '.join(QUALITIES[:-1])} or {QUALITIES[-1]}, and "
                f"go on with others, each once, got {list(self.objectives)}"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def quality(self) -> Quality:
        """The objective that says how good a model is: the first."""
        return cast("Quality", self.objectives[0])


def next_step(
    space: SearchSpace,
    config: EvolutionConfig,
    seed: int,
    target_ms: float,
    history: History,
    *,
    rung_tokens: Sequence[int],
    num_candidates: int,
) -> Proposal | Promotion | None:
    """What to train after `history`: somebody further, else somebody new; None when all is done.

    rung_tokens: to train on until each rung is done. num_candidates: how many candidates the search
    tries.
    """
    is_over = history.num_tried >= num_candidates
    if config.algorithm == "ehvi":
        if not is_over and not _has_begun(space, config, history):
            return propose(space, config, seed, target_ms, history)
        return next_by_improvement(
            space,
            config.objectives,
            seed,
            target_ms,
            history,
            rung_tokens=rung_tokens,
            tries_new=not is_over,
        )
    promotion = promote(history, len(rung_tokens), config.promoted_share, config.objectives)
    if promotion is not None:
        return promotion
    return None if is_over else propose(space, config, seed, target_ms, history)


def _has_begun(space: SearchSpace, config: EvolutionConfig, history: History) -> bool:
    """Whether the seeds and the first random candidates are there, and something is known."""
    return (
        history.num_tried >= config.initial_candidates
        and all(genotype in history for genotype in space.seeds.values())
        and next(history.newest(), None) is not None
    )


def propose(
    space: SearchSpace, config: EvolutionConfig, seed: int, target_ms: float, history: History
) -> Proposal | None:
    """The candidate that follows `history`; None when nothing new can be found."""
    number = len(history)
    rng = random.Random(f"{seed}/{number}")
    for name, genotype in space.seeds.items():
        if genotype not in history:
            return Proposal(number, genotype, "seed", seed_name=name)
    if config.algorithm == "random" or history.num_tried < config.initial_candidates:
        return propose_random(space, number, rng, history)
    if config.algorithm in ("nsga2", "tpe"):
        sampled = propose_sampled(space, config, rng, target_ms, history)
        if sampled is None:
            return propose_random(space, number, rng, history)
        return Proposal(number, sampled, "sampler")
    population = living(history, config.population_size, cycle_start(number, config))
    if not population:
        return propose_random(space, number, rng, history)
    sample = rng.sample(population, min(config.sample_size, len(population)))
    parent = select_parent(sample, config, target_ms)
    return propose_child(space, number, rng, history, parent)


def cycle_start(number: int, config: EvolutionConfig) -> int:
    """The number of the first child of the cycle that a candidate belongs to."""
    since = number - config.initial_candidates
    return number - since % config.children_per_cycle if since > 0 else number


def living(history: History, population_size: int, before: int) -> list[Candidate]:
    """The newest scored candidates: the oldest is removed as one is added."""
    return list(islice(history.newest(before), population_size))


def select_parent(
    sample: Sequence[Candidate], config: EvolutionConfig, target_ms: float
) -> Candidate:
    """The best of a random sample; the fastest if none meets the target."""
    fitting = [each for each in sample if _latency_ms(each) <= target_ms]
    if not fitting:
        return min(sample, key=lambda each: (_latency_ms(each), each.number))
    if config.algorithm == "aging":
        return min(fitting, key=lambda each: (each.scores[-1], each.number))
    highest = max(len(each.scores) for each in fitting)
    finalists = [each for each in fitting if len(each.scores) == highest]
    return ranked(finalists, highest - 1, config.objectives)[0]


def _latency_ms(candidate: Candidate) -> float:
    assert candidate.latency_ms is not None
    return candidate.latency_ms
