"""How much training a search needs: ours, and others, on the tabular benchmark of hybrid models.

The table (benchmarks/hybrid_bench.parquet) knows every hybrid of one space: its loss at thirteen
budgets and its latency. So a search takes a second, and can be made with many seeds. All searches
go through `search.evolution.next_step` as a real one does, with one worker; what misses the latency
target is never trained, by none of them.

- aging: the published way (Nemotron-Flash): aging evolution, ten children per cycle, every
  candidate trained in full. The hypervolume of the frontier of what was trained in full after
  NUM_EVALUATIONS candidates is the goal of all: the median over the seeds.
- random, nsga2, tpe: proposals at random and by Optuna's samplers, every candidate trained in full.
- lowest_rung_first: every candidate of the space on our lowest rung, then the best ten in full.
- random_on_rungs: our rungs and who is promoted on them, proposals at random.
- halving_on_rungs: our rungs, proposals by non-dominated ranks and promotion by asynchronous
  successive halving with them (`pareto`).
- ours: `ehvi` on rungs.

Every method goes on until it reaches the goal or has nothing left to do. `tokens`: what it trains
on until then, in full trainings, the median over the seeds (null: most seeds never get there).
`tokens_ratio`: the same as a share of what aging evolution needs; `ours_ratio`: what ours needs, as
a share of this method. Both with the bootstrap's 95 % interval.

python benchmarks/search_efficiency.py
python benchmarks/search_efficiency.py --methods aging random ours
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table as Lines

from latency.device import Device
from search.evolution import EvolutionConfig, next_step
from search.frontier import Frontier, best_first, hypervolume
from search.genotype import Genotype
from search.history import Candidate, History, Promotion, Proposal
from search.offspring import propose_random
from search.space import SearchSpace, SpaceConfig
from slm.architecture import Architecture
from slm.config import read

HERE = Path(__file__).parent
SPACE = HERE.parent / "configs" / "space" / "hybrid_bench.yaml"
TABLE = HERE / "hybrid_bench.parquet"
# Of the space, the share of the hybrids that meet the latency target.
FEASIBLE_SHARE = 0.75
# What the published search is given: evaluations, all in full.
NUM_EVALUATIONS = 100
AGING = EvolutionConfig(
    algorithm="aging",
    initial_candidates=20,
    population_size=20,
    sample_size=5,
    children_per_cycle=10,
)
RANDOM = EvolutionConfig(algorithm="random", initial_candidates=1, population_size=1, sample_size=1)
NSGA2 = EvolutionConfig(algorithm="nsga2", initial_candidates=20, population_size=20, sample_size=1)
TPE = EvolutionConfig(algorithm="tpe", initial_candidates=20, population_size=1, sample_size=1)
PARETO = EvolutionConfig(
    algorithm="pareto", initial_candidates=20, population_size=30, sample_size=8
)
OURS = EvolutionConfig(algorithm="ehvi", initial_candidates=10, population_size=1, sample_size=1)
# Steps of the table's last budget at which a candidate is looked at.
NUM_STEPS = 1024
RUNG_STEPS = (48, 768, NUM_STEPS)
NUM_FULL = 10
# Searches of each method.
NUM_SEEDS = 50
NUM_RESAMPLES = 10_000

# Tokens trained on so far, and the point (loss, latency) that was reached in full with them.
Trained = Iterator[tuple[int, tuple[float, float] | None]]
Method = Callable[["Benchmark", int], Trained]
# Trains a candidate: its number, its parent's, what it is, and to how many tokens. Gives its loss.
Train = Callable[[int, int | None, str, int], float]
# Tokens and hypervolume after each training.
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Benchmark:
    """The table. losses: by architecture, one per budget; latencies_ms: by architecture."""

    space: SearchSpace
    budgets: tuple[int, ...]
    losses: dict[str, tuple[float, ...]]
    latencies_ms: dict[str, float]
    target_ms: float

    @classmethod
    @cache
    def load(cls, path: Path) -> Benchmark:
        """Of each hybrid the first seed."""
        table = pq.read_table(path)
        budgets = tuple(json.loads(table.schema.metadata[b"hybrid_bench"])["budgets"])
        rows = [row for row in table.to_pylist() if row["seed"] == 0]
        latencies_ms = {row["architecture"]: row["latency_ms"] for row in rows}
        return cls(
            SearchSpace(read(SpaceConfig, OmegaConf.load(SPACE))),
            budgets,
            {row["architecture"]: tuple(row[f"loss_{b}"] for b in budgets) for row in rows},
            latencies_ms,
            float(np.quantile(list(latencies_ms.values()), FEASIBLE_SHARE)),
        )

    @property
    def full_tokens(self) -> int:
        """Of a full training."""
        return self.budgets[-1]

    @property
    def feasible(self) -> list[str]:
        """Architectures that meet the target."""
        return [text for text, ms in self.latencies_ms.items() if ms <= self.target_ms]

    @property
    def worst(self) -> tuple[float, float]:
        """Where volume ends: the worst loss in full, at the target."""
        return max(losses[-1] for losses in self.losses.values()), self.target_ms

    @property
    def highest(self) -> float:
        """The volume when everything has been trained in full."""
        points = [(self.losses[text][-1], self.latencies_ms[text]) for text in self.feasible]
        return hypervolume(points, self.worst)

    def text(self, genotype: Genotype) -> str:
        """A genotype's key."""
        vocab_size = Architecture.parse(next(iter(self.losses))).vocab_size
        return str(self.space.realize(genotype, self.space.config.widths[0], vocab_size))

    def loss(self, text: str, tokens: int) -> float:
        """After so many tokens."""
        return self.losses[text][self.budgets.index(tokens)]

    def train(self, number: int, parent: int | None, text: str, tokens: int) -> float:
        """What training it from scratch gave: `Train` by the table."""
        return self.loss(text, tokens)


def main() -> None:
    arguments = parse_arguments()
    bench = Benchmark.load(arguments.table)
    seeds = range(arguments.seeds)
    curves: dict[str, list[Curve]] = {}
    with ProcessPoolExecutor(arguments.processes) as pool:
        for name in arguments.methods:
            curves[name] = list(pool.map(partial(run, arguments.table, name), seeds))
            console.print(f"{name}: {len(seeds)} searches")
    goal = goal_of(bench, curves["aging"])
    tokens = {
        name: np.array([tokens_to(goal, curve) for curve in found]) / bench.full_tokens
        for name, found in curves.items()
    }
    line = {
        "benchmark": "search_efficiency",
        "results": {name: compare(name, tokens) for name in arguments.methods},
        "goal": goal,
        "highest": bench.highest,
        "seeds": len(seeds),
        "settings": {
            "hybrids": len(bench.losses),
            "feasible": len(bench.feasible),
            "target_ms": bench.target_ms,
            "evaluations": NUM_EVALUATIONS,
            "rung_steps": list(RUNG_STEPS),
        },
        "environment": Device.current(threads=1, kind="cpu").describe(),
    }
    print_results(line)
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), help="with aging and ours among them"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", type=Path, default=TABLE)
    return parser.parse_args()


def evolve(
    config: EvolutionConfig,
    rung_steps: tuple[int, ...],
    bench: Benchmark,
    seed: int,
    train: Train | None = None,
) -> Trained:
    """A search with one worker, until there is nothing left to do. train: None: the table's."""
    train = train or bench.train
    rung_tokens = [steps * bench.full_tokens // NUM_STEPS for steps in rung_steps]
    num_candidates = len(bench.feasible)
    history, tokens = History(), 0
    while True:
        step = next_step(
            bench.space,
            config,
            seed,
            bench.target_ms,
            history,
            rung_tokens=rung_tokens,
            num_candidates=num_candidates,
        )
        if step is None:
            return
        if isinstance(step, Promotion):
            known = history[step.number]
            genotype, losses, rung, parent = known.genotype, known.scores, step.rung, None
        else:
            genotype, losses, rung, parent = step.genotype, (), 0, step.parent
        text = bench.text(genotype)
        latency_ms = bench.latencies_ms[text]
        if latency_ms > bench.target_ms:
            history.put(Candidate(step.number, genotype, "infeasible", (), latency_ms))
            continue
        tokens += rung_tokens[rung] - (rung_tokens[rung - 1] if rung else 0)
        losses = (*losses, train(step.number, parent, text, rung_tokens[rung]))
        history.put(Candidate(step.number, genotype, "scored", losses, latency_ms))
        is_full = rung == len(rung_tokens) - 1
        yield tokens, (losses[-1], latency_ms) if is_full else None


def random_on_rungs(bench: Benchmark, seed: int) -> Trained:
    """Ours, but what is new is drawn from the space, and not chosen."""

    def draw(space: SearchSpace, seed: int, history: History, _: object) -> list[Proposal]:
        rng = random.Random(f"{seed}/{len(history)}")
        proposal = propose_random(space, len(history), rng, history)
        return [] if proposal is None else [proposal]

    with patch("search.improvement.new_choices", draw):
        yield from evolve(OURS, RUNG_STEPS, bench, seed)


def lowest_rung_first(bench: Benchmark, seed: int) -> Trained:
    """Every candidate on the lowest rung, in any order; the best ten of them in full."""
    lowest_tokens = RUNG_STEPS[0] * bench.full_tokens // NUM_STEPS
    feasible = bench.feasible
    points = [(bench.loss(text, lowest_tokens), bench.latencies_ms[text]) for text in feasible]
    tokens = lowest_tokens * len(feasible)
    best = best_first(points)[:NUM_FULL]
    for place in np.random.default_rng(seed).permutation(best):
        text = feasible[place]
        tokens += bench.full_tokens - lowest_tokens
        yield tokens, (bench.loss(text, bench.full_tokens), bench.latencies_ms[text])


IN_FULL = (NUM_STEPS,)
METHODS: dict[str, Method] = {
    "aging": partial(evolve, AGING, IN_FULL),
    "random": partial(evolve, RANDOM, IN_FULL),
    "nsga2": partial(evolve, NSGA2, IN_FULL),
    "tpe": partial(evolve, TPE, IN_FULL),
    "lowest_rung_first": lowest_rung_first,
    "random_on_rungs": random_on_rungs,
    "halving_on_rungs": partial(evolve, PARETO, RUNG_STEPS),
    "ours": partial(evolve, OURS, RUNG_STEPS),
}


def run(table: Path, name: str, seed: int) -> Curve:
    """One search, until the frontier cannot become better."""
    bench = Benchmark.load(table)
    frontier, curve = Frontier(bench.worst), []
    for tokens, point in METHODS[name](bench, seed):
        if point is not None:
            frontier.add(point)
        curve.append((tokens, frontier.hypervolume))
        if math.isclose(frontier.hypervolume, bench.highest):
            break
    found = np.array(curve)
    return found[:, 0], found[:, 1]


def goal_of(bench: Benchmark, curves: list[Curve]) -> float:
    """The hypervolume that the published search ends with, the median over its seeds."""
    evaluated = NUM_EVALUATIONS * bench.full_tokens
    return float(np.median([volume_after(evaluated, curve) for curve in curves]))


def volume_after(tokens: float, curve: Curve) -> float:
    """The hypervolume after so many tokens."""
    return float(curve[1][curve[0] <= tokens][-1])


def tokens_to(goal: float, curve: Curve) -> float:
    """Tokens until a hypervolume is reached; infinite if it is not."""
    reached = np.flatnonzero(curve[1] >= goal - 1e-9)
    return float(curve[0][reached[0]]) if len(reached) else math.inf


def compare(name: str, tokens: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a method needs, against aging evolution and ours. tokens: by method, one per seed."""
    own = tokens[name]
    quarter, median, three_quarters = np.quantile(own, (0.25, 0.5, 0.75), method="higher")
    return {
        "tokens": finite(median),
        "tokens_quartiles": [finite(quarter), finite(three_quarters)],
        "reached": float(np.isfinite(own).mean()),
        "tokens_ratio": ratio(own, tokens["aging"]),
        "ours_ratio": ratio(tokens["ours"], own),
    }


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, Any]:
    """Of the medians, with its bootstrap interval; null where a median is infinite above."""
    rng = np.random.default_rng(0)
    medians = [
        np.quantile(rng.choice(each, (NUM_RESAMPLES, len(each))), 0.5, axis=1, method="higher")
        for each in (numerator, denominator)
    ]
    resampled = np.divide(
        *medians, where=np.isfinite(medians[0]), out=np.full(NUM_RESAMPLES, np.inf)
    )
    middle = float(
        np.quantile(numerator, 0.5, method="higher")
        / np.quantile(denominator, 0.5, method="higher")
    )
    low, high = np.quantile(resampled, (0.025, 0.975), method="higher")
    return {"ratio": finite(middle), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """A number as JSON has it."""
    return float(value) if math.isfinite(value) else None


def print_results(line: dict[str, Any]) -> None:
    lines = Lines(title=f"to a hypervolume of {line['goal']:.4f} (of {line['highest']:.4f})")
    for column in ("method", "full trainings", "against aging", "ours against it"):
        lines.add_column(column)
    for name, found in line["results"].items():
        median = "never" if found["tokens"] is None else f"{found['tokens']:.1f}"
        low, high = ("never" if v is None else f"{v:.1f}" for v in found["tokens_quartiles"])
        lines.add_row(
            name,
            f"{median} ({low} to {high})",
            format_ratio(found["tokens_ratio"]),
            format_ratio(found["ours_ratio"]),
        )
    console.print(lines)


def format_ratio(found: dict[str, Any]) -> str:
    texts = {name: "∞" if value is None else f"{value:.3f}" for name, value in found.items()}
    return f"{texts['ratio']} [{texts['low']}, {texts['high']}]"


console = Console()

if __name__ == "__main__":
    main()
