"""Whether a warm start saves training, and whether it spoils the ranking.

Pairs of parent and child, one mutation apart, are drawn from the space of the tabular benchmark
(benchmarks/hybrid_bench.py), no child twice. The parent trains to the lowest rung of a search, the
child to the same rung from the parent's weights, as in a search with `proxy.warm_start`. Recipe,
corpus and seed are the table's, which knows every child's losses from scratch, here called cold.

- rank_correlation: Spearman's, of children's losses with those after all cold steps. Of `warm`
  losses; of `cold` ones after as many steps; of `cold_twice` ones after the tokens of parent and
  child together; of `mixed` ones, warm for a random half of the children, which is what a search
  ranks together (medians over many halves). rank_correlation_less_cold: by how much it is higher
  than that of cold losses, on the same children.
- loss_less_cold: warm losses less cold ones after as many steps, mean, in nats per token.
- cold_steps: until a child reaches its warm loss from scratch, on its curve of the table, linear in
  the loss and in the steps' logarithm; the median. tokens_ratio: those of the child's warm training
  as a share of that. The parent's are not counted: a search has trained it for its own sake.

Intervals are the bootstrap's over pairs, 95 %. What is trained is kept in the run folder, so that
the same command goes on where it stopped.

python benchmarks/warm_start.py                 a quarter of an hour on two CPU cores
python benchmarks/warm_start.py --pairs 32
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from hybrid_bench import (
    BUDGETS,
    PROXY,
    SEEDS,
    SPACE,
    STEP_TOKENS,
    TABLE,
    VOCAB_SIZE,
    corpus_folder,
    environment,
)
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from latency.device import Device
from search.proxy import ProxyTraining
from search.rank_correlation import MIN_CANDIDATES, rank_correlation, spearman
from search.space import SearchSpace, SpaceConfig
from slm.architecture import Architecture
from slm.config import read
from slm.data import PackedCorpus
from slm.training.files import write_atomically

SEED = SEEDS[0]
STEPS = tuple(budget // STEP_TOKENS for budget in BUDGETS)
# What the lowest rung may be: budgets of which the table has the double, too.
RUNGS = tuple(steps for steps in STEPS if 2 * steps in STEPS)
# How often the children are halved into warm and cold ones.
NUM_HALVES = 20
NUM_RESAMPLES = 1_000

console = Console(stderr=True)


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pairs = draw_pairs(arguments.pairs)
    trained = train_all(pairs, arguments)
    table = cold_curves()
    warm = np.array([each["loss"] for each in trained])
    results = compare(warm, np.array([table[child] for _, child in pairs]), arguments.steps)
    print_results(results)
    # The parents' losses are in the table, too: the same to the last digit on the same machine.
    parents = [table[parent][STEPS.index(arguments.steps)] for parent, _ in pairs]
    differences = [abs(p - each["parent_loss"]) for p, each in zip(parents, trained, strict=True)]
    about = {
        **Device.current(threads=1, kind="cpu").describe(),
        "pairs": len(pairs),
        "steps": arguments.steps,
        "all_steps": STEPS[-1],
        "halves": NUM_HALVES,
        "seed": SEED,
        "parents_differ_from_table_by": max(differences),
    }
    print(json.dumps({"benchmark": "warm_start", "results": results, "environment": about}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=128, help="how many")
    parser.add_argument("--steps", type=int, choices=RUNGS, default=48, help="lowest rung's")
    parser.add_argument("--processes", type=int, default=2, help="that train, a thread each")
    parser.add_argument("--threads", type=int, default=1, help="only 1")
    parser.add_argument("--folder", type=Path, default=Path("runs/warm_start"), help="of the run")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="of the packed corpus")
    arguments = parser.parse_args()
    if arguments.pairs < MIN_CANDIDATES:
        parser.error(f"--pairs: must be >= {MIN_CANDIDATES}, got {arguments.pairs}")
    return arguments


def draw_pairs(count: int) -> list[tuple[str, str]]:
    """So many random parents, each with a child that is a mutation away: architectures.

    More pairs begin with the same ones. No child is there twice.
    """
    space = SearchSpace(read(SpaceConfig, OmegaConf.load(SPACE)))
    rng = random.Random(SEED)
    genotypes = list(space.genotypes())
    pairs: dict[str, str] = {}
    while len(pairs) < min(count, len(genotypes)):
        parent = rng.choice(genotypes)
        mutation = space.mutate(parent, rng)
        assert mutation is not None
        parent_text, child_text = (
            str(space.realize(each, space.config.widths[0], VOCAB_SIZE))
            for each in (parent, space.canonical(mutation.genotype))
        )
        pairs.setdefault(child_text, parent_text)
    return [(parent, child) for child, parent in pairs.items()]


def train_all(pairs: list[tuple[str, str]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What training every pair gave; what was trained before is not trained again."""
    corpus = corpus_folder(arguments.cache)
    paths = [pair_path(arguments.folder, *pair, arguments.steps) for pair in pairs]
    missing = [(*pair, path) for pair, path in zip(pairs, paths, strict=True) if not path.exists()]
    console.print(f"{len(pairs) - len(missing)} of {len(pairs)} are trained")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        jobs = [pool.submit(train, *job, corpus, arguments.steps) for job in missing]
        for number, job in enumerate(as_completed(jobs), start=1):
            console.print(f"{number}/{len(missing)} {job.result()}")
    return [json.loads(path.read_text()) for path in paths]


def pair_path(folder: Path, parent: str, child: str, steps: int) -> Path:
    digests = (Architecture.parse(text).digest for text in (parent, child))
    return folder / f"{'-'.join(digests)}-{steps}.json"


def train(parent_text: str, child_text: str, path: Path, corpus_path: Path, steps: int) -> str:
    """Train a parent, then its child from there, and keep what came of them."""
    torch.set_num_threads(1)
    corpus = PackedCorpus.open(corpus_path)
    parent, child = Architecture.parse(parent_text), Architecture.parse(child_text)
    first = ProxyTraining(parent, corpus, PROXY, SEED)
    first.train(steps * STEP_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "parent.safetensors"
        first.save(weights)
        second = ProxyTraining(child, corpus, PROXY, SEED, parent=(parent, weights))
    second.train(steps * STEP_TOKENS)
    trained = {
        "parent": parent_text,
        "child": child_text,
        "seed": SEED,
        "steps": steps,
        "parent_loss": first.validate(),
        "loss": second.validate(),
        "seconds": first.seconds + second.seconds,
        "environment": environment(),
    }
    write_atomically(path, json.dumps(trained))
    return f"{trained['parent_loss']:.4f} -> {trained['loss']:.4f}: {child_text}"


def cold_curves() -> dict[str, list[float]]:
    """The table: by architecture its losses from scratch, one per budget."""
    rows = [row for row in pq.read_table(TABLE).to_pylist() if row["seed"] == SEED]
    return {row["architecture"]: [row[f"loss_{budget}"] for budget in BUDGETS] for row in rows}


def compare(warm: np.ndarray, curves: np.ndarray, steps: int) -> dict[str, Any]:
    """The figures, see the top, as [low, value, high].

    warm: losses of the children after so many steps, [N]; curves: cold ones, [N, budgets].
    """
    cold, cold_twice = (curves[:, STEPS.index(each)] for each in (steps, 2 * steps))
    final, n = curves[:, -1], len(warm)
    rng = np.random.default_rng(SEED)
    is_warm = rng.permuted(np.tile(np.arange(n) < n // 2, (NUM_HALVES, 1)), axis=1)
    # What ranks the children: a score of each, or several, [scores, N].
    rankings = {
        "warm": warm[None],
        "cold": cold[None],
        "cold_twice": cold_twice[None],
        "mixed": np.where(is_warm, warm, cold),
    }
    to_reach = np.array([steps_to(*each) for each in zip(warm, curves, strict=True)])

    def less_cold(name: str, chosen: np.ndarray) -> np.ndarray:
        return median_rho(rankings[name], final, chosen) - median_rho(cold[None], final, chosen)

    return {
        "rank_correlation": {name: correlate(each, final) for name, each in rankings.items()},
        "rank_correlation_less_cold": {
            name: interval(partial(less_cold, name), n) for name in ("warm", "mixed")
        },
        "loss_less_cold": interval(lambda chosen: (warm - cold)[chosen].mean(axis=-1), n),
        "cold_steps": interval(lambda chosen: np.median(to_reach[chosen], axis=-1), n),
        "tokens_ratio": interval(lambda chosen: np.median(steps / to_reach[chosen], axis=-1), n),
    }


def correlate(rankings: np.ndarray, final: np.ndarray) -> list[float]:
    """[low, rho, high] of rankings [scores, N]: medians over them."""
    found = [rank_correlation(each, final, SEED) for each in rankings]
    return np.median([(each.low, each.rho, each.high) for each in found if each], axis=0).tolist()


def median_rho(rankings: np.ndarray, final: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rho of the chosen [..., N] children, [...]: the median over rankings [scores, N]."""
    rhos = [spearman(np.stack([each, final])[:, chosen]) for each in rankings]
    return np.median(rhos, axis=0)


def interval(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> list[float]:
    """[low, value, high] of a statistic of the chosen [..., N] of n pairs."""
    chosen = np.random.default_rng(SEED).integers(n, size=(NUM_RESAMPLES, n))
    low, high = np.nanquantile(statistic(chosen), [0.025, 0.975])
    return [float(low), float(statistic(np.arange(n))), float(high)]


def steps_to(loss: float, curve: np.ndarray) -> float:
    """Steps from scratch that reach a loss; the first or the last of the table where none does."""
    lowest = np.minimum.accumulate(curve)
    return float(np.exp(np.interp(-loss, -lowest, np.log(STEPS))))


def print_results(results: dict[str, Any]) -> None:
    lines = Table(title="ranking by losses after few steps, against all cold steps")
    for column in ("losses", "Spearman's rho", "less that of cold"):
        lines.add_column(column)
    for name, rho in results["rank_correlation"].items():
        difference = results["rank_correlation_less_cold"].get(name)
        lines.add_row(name, written(rho), written(difference) if difference else "")
    console.print(lines)
    for name in ("loss_less_cold", "cold_steps", "tokens_ratio"):
        console.print(f"{name}: {written(results[name])}")


def written(found: list[float]) -> str:
    low, value, high = found
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
