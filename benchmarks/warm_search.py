"""Whether a warm start spares a search training: whole searches, of which every model is trained.

benchmarks/search_efficiency.py asks how much training a search needs until the hypervolume that the
published one ends with, on the table of hybrid models (benchmarks/hybrid_bench.py). Here its own
search, `ours`, is made as with `proxy.warm_start`: what is new begins with its parent's weights as
they are then, and all trainings are made, by the table's recipe, on its corpus. Without a warm
start these trainings are the table's, so that the same seeds are read from there.

- tokens: until the goal is reached, in full trainings, per seed; null if it never was.
- tokens_ratio: of warm searches to cold ones, the median over the seeds, with the smallest and the
  largest.
- hypervolume: by the losses of the table, of what a warm search had trained in full by then, and of
  what the cold one had after as many tokens. At the goal, a warm search has found what a cold one
  has to find; below, it got there by lower losses, which its candidates owe to their parents'
  training. goal: as in the table.

What was trained is kept in the run folder, so that the same command goes on where it stopped.

python benchmarks/warm_search.py                    two hours on two CPU cores
python benchmarks/warm_search.py --seeds 1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hybrid_bench import PROXY, SEEDS, corpus_folder, environment
from rich.console import Console
from rich.table import Table
from search_efficiency import (
    NUM_SEEDS,
    OURS,
    RUNG_STEPS,
    TABLE,
    Benchmark,
    evolve,
    finite,
    goal_of,
    run,
    tokens_to,
    volume_after,
)

from latency.device import Device
from search.frontier import Frontier
from search.proxy import ProxyTraining
from slm.architecture import Architecture
from slm.data import PackedCorpus
from slm.training.files import write_atomically

console = Console(stderr=True, soft_wrap=True)


class WarmTraining:
    """Trains the candidates of one search, each from its parent's weights, and keeps them.

    last: what was trained last.
    """

    def __init__(self, folder: Path, corpus: PackedCorpus) -> None:
        self.last: str | None = None
        self._folder = folder
        self._corpus = corpus
        self._texts: dict[int, str] = {}
        # The newest checkpoint of each candidate.
        self._checkpoints: dict[int, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, number: int, parent: int | None, text: str, tokens: int) -> float:
        """The loss after so many tokens of the candidate's own; parent: where it begins."""
        before = self._checkpoints.get(number)
        checkpoint = self._folder / f"{number}-{tokens}.safetensors"
        self.last = self._texts[number] = text
        self._checkpoints[number] = checkpoint
        known = checkpoint.with_suffix(".json")
        if not known.exists():
            loss = self._train(parent, text, tokens, before, checkpoint)
            trained = {"architecture": text, "parent": parent, "tokens": tokens, "loss": loss}
            write_atomically(known, json.dumps({**trained, "environment": environment()}))
            console.print(f"{self._folder.name} #{number} {tokens} tokens: {loss:.4f}  {text}")
        found = json.loads(known.read_text())
        if (found["architecture"], found["parent"]) != (text, parent):
            raise SystemExit(f"{known}: of another search; choose another --folder")
        return float(found["loss"])

    def _train(
        self, parent: int | None, text: str, tokens: int, before: Path | None, checkpoint: Path
    ) -> float:
        start = None
        if before is None and parent is not None:
            start = Architecture.parse(self._texts[parent]), self._checkpoints[parent]
        training = ProxyTraining(Architecture.parse(text), self._corpus, PROXY, SEEDS[0], start)
        if before is not None:
            training.load(before)
        training.train(tokens)
        loss = training.validate()
        training.save(checkpoint)
        return loss


def main() -> None:
    arguments = parse_arguments()
    bench = Benchmark.load(TABLE)
    corpus = corpus_folder(arguments.cache)
    seeds = range(arguments.seeds)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        goal = goal_of(bench, list(pool.map(partial(run, TABLE, "aging"), range(NUM_SEEDS))))
        console.print(f"goal: {goal:.4f}")
        curves = list(pool.map(partial(run, TABLE, "ours"), seeds))
        found = list(pool.map(partial(search, arguments.folder, corpus, goal), seeds))
    cold, warm = [tokens_to(goal, curve) for curve in curves], [tokens for tokens, _ in found]
    results = {
        "tokens": {name: in_full(bench, each) for name, each in (("warm", warm), ("cold", cold))},
        "tokens_ratio": summary([w / c for w, c in zip(warm, cold, strict=True)]),
        "hypervolume": {
            "warm": [volume for _, volume in found],
            "cold": [volume_after(*each) for each in zip(warm, curves, strict=True)],
        },
    }
    print_results(results, goal)
    about = {
        **Device.current(threads=1, kind="cpu").describe(),
        "goal": goal,
        "seeds": len(seeds),
        "rung_steps": list(RUNG_STEPS),
    }
    print(json.dumps({"benchmark": "warm_search", "results": results, "environment": about}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=6, help="how many searches")
    parser.add_argument("--processes", type=int, default=2, help="that train, a thread each")
    parser.add_argument("--threads", type=int, default=1, help="only 1")
    parser.add_argument("--folder", type=Path, default=Path("runs/warm_search"), help="of the run")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="of the packed corpus")
    return parser.parse_args()


def search(folder: Path, corpus: Path, goal: float, seed: int) -> tuple[float, float]:
    """Tokens of a warm search until the goal, and the table's hypervolume of what it trained."""
    torch.set_num_threads(1)
    bench = Benchmark.load(TABLE)
    train = WarmTraining(folder / f"seed-{seed}", PackedCorpus.open(corpus))
    warm, cold = Frontier(bench.worst), Frontier(bench.worst)
    for tokens, point in evolve(OURS, RUNG_STEPS, bench, seed, train):
        if point is None:
            continue
        warm.add(point)
        assert train.last is not None
        cold.add((bench.loss(train.last, bench.full_tokens), point[1]))
        if warm.hypervolume >= goal:
            return float(tokens), cold.hypervolume
    return float("inf"), cold.hypervolume


def in_full(bench: Benchmark, tokens: list[float]) -> list[float | None]:
    """Tokens of every seed, in full trainings."""
    return [finite(each / bench.full_tokens) for each in tokens]


def summary(ratios: list[float]) -> dict[str, float | None]:
    """The median, the smallest and the largest."""
    middle, low, high = np.quantile(ratios, (0.5, 0, 1), method="higher")
    return {"ratio": finite(middle), "low": finite(low), "high": finite(high)}


def print_results(results: dict[str, Any], goal: float) -> None:
    lines = Table(title=f"full trainings until a hypervolume of {goal:.4f}")
    for column in ("seed", "warm", "cold", "warm's by the table", "cold's after as many"):
        lines.add_column(column, justify="right")
    rows = zip(*results["tokens"].values(), *results["hypervolume"].values(), strict=True)
    for seed, (warm, cold, *volumes) in enumerate(rows):
        texts = ["never" if each is None else f"{each:.1f}" for each in (warm, cold)]
        lines.add_row(str(seed), *texts, *(f"{volume:.4f}" for volume in volumes))
    console.print(lines)
    console.print(f"tokens_ratio: {results['tokens_ratio']}")


if __name__ == "__main__":
    main()
