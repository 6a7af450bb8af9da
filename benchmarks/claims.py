"""What weight normalization, meta tokens and mixing operators are worth, at a size for a CPU.

Nemotron-Flash (Fu et al. 2025) reports each at a billion parameters. Here a hybrid of the order of
its 3B model, a million and a half parameters large, trains on a million tokens of English prose
with one thing changed at a time:

- weight_norm: Adam without decay and weights projected to unit norm, against AdamW with decay and
  no projection, as in the paper; weight_norm_alone: against Adam without decay or projection.
- meta_tokens: sixteen, against none.
- hybrid_against_<mixer>: against as many operators of which all mixers are of one kind. The width
  and the FFN's ratio are chosen so that a request takes as long as the hybrid's, measured on the
  CPU that the results name, by the decoder that users run. In the end all are timed interleaved.

Every arm trains with the same three learning rates and seed 0, then with its best one and the other
seeds. A seed decides batches and their order, the same in all arms, and initial weights.

difference: validation loss with the thing less that without, or of the hybrid less that of the
pure model, in nats per token: below zero it is worth something. Mean over seeds, and Student's 95 %
interval of differences paired by seed (low, high). That the learning rate was chosen by a loss of
seed 0 is in none of them. latency_ratio: of a request, to the hybrid's; [low, ratio, high], 95 %.

The results file holds every training and is what the same command goes on from, on this machine or
another; what was cut short is begun anew.

python benchmarks/claims.py               some hours on two CPU cores
python benchmarks/claims.py --seeds 5     two more
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

from latency.device import Device
from latency.request import Request, decoding
from latency.timer import Measurement, Protocol, measure_interleaved, quiet
from latency.workload import Workload
from search.config import plain
from search.proxy import ProxyConfig, ProxyTraining
from search.worker import Report, Worker
from slm.architecture import Architecture
from slm.compile_ahead import compile_ahead
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.operators import parse_operator
from slm.training.config import OptimizerConfig
from slm.training.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "claims.json"
VOCAB_SIZE = 4096
# As many per token of context as in the paper: 256 in 4,096.
META_TOKENS = 16
SEQUENCE_TOKENS = 256
BATCH_SIZE = 4
VALIDATION_TOKENS = 2**17
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
MIXERS = {
    "attention": "attention(head_dim=32)",
    "mamba2": "mamba2(head_dim=32,state_size=64)",
    "deltanet": "deltanet(head_dim=32)",
}
HYBRID = ("deltanet", "mamba2", "attention", "mamba2")
HYBRID_WIDTH, FFN_RATIO = 128, 3.0
# What a pure model is chosen from: the width first, then the ratio of its FFNs.
WIDTHS = tuple(range(64, 257, 32))
FFN_RATIOS = tuple(np.arange(2.0, 4.51, 0.125).tolist())

# The schedule of configs/optimizer/adamw.yaml, for all alike.
ADAMW = OptimizerConfig(name="adamw", weight_decay=0.1, warmup_steps=50)
ADAM = replace(ADAMW, name="adam", weight_decay=0.0)
WEIGHT_NORM = replace(ADAM, weight_norm=True)
OPTIMIZERS = {
    "hybrid": WEIGHT_NORM,
    "hybrid_without_weight_norm": ADAMW,
    "hybrid_without_meta_tokens": WEIGHT_NORM,
    **dict.fromkeys(MIXERS, WEIGHT_NORM),
    "hybrid_without_weight_norm_or_decay": ADAM,
}
# By claim, what the hybrid is compared with.
CLAIMS = {
    "weight_norm": "hybrid_without_weight_norm",
    "weight_norm_alone": "hybrid_without_weight_norm_or_decay",
    "meta_tokens": "hybrid_without_meta_tokens",
    **{f"hybrid_against_{mixer}": mixer for mixer in MIXERS},
}
WORKLOAD = Workload(prompt_tokens=64, new_tokens=64)
PROTOCOL = Protocol(compile_unit="operator")
# Far longer than any training, also on a busy machine: what hangs must not do so for ever.
TIME_LIMIT_S = 86_400.0

console = Console(stderr=True)


def main() -> None:
    arguments = parse_arguments()
    device = Device.current(threads=arguments.threads, kind="cpu")
    proxy = proxy_config(arguments.tokens)
    store = Store(arguments.results, recipe(arguments.source, proxy))
    protocol = replace(PROTOCOL, max_seconds=arguments.seconds)
    if not store.architectures:
        store.keep_models(matched_models(device, protocol))
    corpus = prepare(
        DataConfig(source=arguments.source, cache_dir=arguments.cache),
        TokenizerConfig(name="bpe", vocab_size=VOCAB_SIZE),
        progress=console.print,
    )
    trainer = Trainer(corpus.folder.resolve(), proxy, arguments.threads)
    train_all(store, trainer, arguments.seeds, arguments.processes)
    if not store.is_timed:
        store.keep_latencies(time_models(store.architectures, device, protocol), device)
    results = {
        **{claim: compare(store, "hybrid", other) for claim, other in CLAIMS.items()},
        "latency_ratio": store.latency_ratios,
    }
    print_results(results)
    print(json.dumps({"benchmark": "claims", "results": results, "environment": device.describe()}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings per arm to compare")
    parser.add_argument("--tokens", type=int, default=2**20, help="of each training")
    parser.add_argument("--seconds", type=float, default=16.0, help="most for a measurement")
    parser.add_argument("--processes", type=int, default=2, help="that train")
    parser.add_argument(
        "--threads", type=int, default=1, help="of a training, and of what is timed"
    )
    parser.add_argument("--source", choices=("prose", "shakespeare"), default="prose", help="text")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to go on from")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="of the packed corpus")
    return parser.parse_args()


def proxy_config(tokens: int) -> ProxyConfig:
    """How every arm is trained, but for what `OPTIMIZERS` says and the learning rate."""
    return ProxyConfig(
        rung_tokens=(tokens,),
        batch_size=BATCH_SIZE,
        sequence_tokens=SEQUENCE_TOKENS,
        validation_tokens=min(VALIDATION_TOKENS, tokens),
        time_limit_s=TIME_LIMIT_S,
        optimizer=WEIGHT_NORM,
        # Not by what the machine does fast: all must compute alike.
        precision="bfloat16",
    )


def recipe(source: str, proxy: ProxyConfig) -> dict[str, Any]:
    """What must be the same for trainings to be comparable; JSON-able."""
    decisive = ("rung_tokens", "batch_size", "sequence_tokens", "validation_tokens")
    trained = {name: plain(proxy)[name] for name in (*decisive, "gradient_clip", "precision")}
    optimizers = {arm: plain(optimizer) for arm, optimizer in OPTIMIZERS.items()}
    for optimizer in optimizers.values():
        del optimizer["lr"]
    rates = list(LEARNING_RATES)
    return {"source": source, **trained, "learning_rates": rates, "optimizers": optimizers}


# What is stored


@dataclass(frozen=True)
class Run:
    """One training: an arm, its peak learning rate and a seed."""

    arm: str
    lr: float
    seed: int


class Store:
    """The results file: recipe, models with their latencies, machines, and trainings.

    Raises SystemExit if the file holds results of another recipe.
    """

    def __init__(self, path: Path, wanted: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "recipe": wanted,
            "architectures": {},
            "timing": None,
            "machines": {},
            "trainings": [],
        }
        if path.exists():
            self._content = json.loads(path.read_text())
        if self._content["recipe"] != wanted:
            raise SystemExit(f"{path}: made with {self._content['recipe']}, not {wanted}")

    @property
    def architectures(self) -> dict[str, Architecture]:
        """By arm; empty before they have been chosen."""
        texts = self._content["architectures"]
        return {arm: Architecture.parse(text) for arm, text in texts.items()}

    @property
    def is_timed(self) -> bool:
        """Whether the latency of every arm is known as well as the protocol asks."""
        timing = self._content["timing"]
        return timing is not None and all(each["converged"] for each in timing["ratios"].values())

    @property
    def latency_ratios(self) -> dict[str, list[float]]:
        """By arm, [low, ratio, high]."""
        ratios = self._content["timing"]["ratios"]
        return {
            arm: [ratio["low_ms"], ratio["median_ms"], ratio["high_ms"]]
            for arm, ratio in ratios.items()
        }

    @property
    def losses(self) -> dict[Run, float]:
        """Validation losses of what was trained, infinite where the training diverged."""
        return {
            Run(row["arm"], row["lr"], row["seed"]): math.inf
            if row["loss"] is None
            else row["loss"]
            for row in self._content["trainings"]
        }

    def keep_models(self, architectures: dict[str, Architecture]) -> None:
        """Keep what the arms are."""
        self._content["architectures"] = {arm: str(each) for arm, each in architectures.items()}
        self._write()

    def keep_latencies(self, ratios: dict[str, Measurement], device: Device) -> None:
        """Keep how long they take."""
        self._content["timing"] = {
            "workload": plain(WORKLOAD),
            "device": device.describe(),
            "ratios": {arm: ratio.to_dict() for arm, ratio in ratios.items()},
        }
        self._write()

    def keep_training(self, run: Run, row: dict[str, Any], machine: dict[str, Any]) -> None:
        """Keep what came of a training."""
        self._content["machines"].setdefault(machine["key"], machine)
        self._content["trainings"].append({**asdict(run), **row, "machine": machine["key"]})
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(self._content, indent=1) + "\n")


# Models of equal latency


def matched_models(device: Device, protocol: Protocol) -> dict[str, Architecture]:
    """The arms' architectures."""
    hybrid = model([MIXERS[name] for name in HYBRID], HYBRID_WIDTH)

    def measure(architecture: Architecture) -> float:
        ratio = measure_together(hybrid, {architecture}, device, protocol)[architecture].median_ms
        console.print(f"{ratio:.3f} of the hybrid's latency: {architecture}", soft_wrap=True)
        return ratio

    architectures = {name: hybrid for name in OPTIMIZERS if name not in MIXERS}
    architectures["hybrid_without_meta_tokens"] = replace(hybrid, meta_tokens=0)
    for name, mixer in MIXERS.items():
        architectures[name] = of_equal_latency(mixer, measure, target=1.0)
    return architectures


def time_models(
    architectures: dict[str, Architecture], device: Device, protocol: Protocol
) -> dict[str, Measurement]:
    """By arm, the latency as a multiple of the hybrid's, all timed together."""
    hybrid = architectures["hybrid"]
    others = set(architectures.values()) - {hybrid}
    # As much time for each as where two are compared.
    longer = replace(protocol, max_seconds=protocol.max_seconds * len(others))
    ratios = measure_together(hybrid, others, device, longer)
    return {arm: ratios[each] for arm, each in architectures.items()}


def model(mixers: Sequence[str], width: int, ffn_ratio: float = FFN_RATIO) -> Architecture:
    """An FFN after each mixer."""
    ffn = parse_operator(f"ffn(ratio={ffn_ratio},multiple_of=16)")
    return Architecture(
        width=width,
        vocab_size=VOCAB_SIZE,
        meta_tokens=META_TOKENS,
        operators=tuple(each for mixer in mixers for each in (parse_operator(mixer), ffn)),
    )


def of_equal_latency(
    mixer: str, measure: Callable[[Architecture], float], target: float
) -> Architecture:
    """The model of one mixer that comes nearest to a latency: by width, then by the FFN's ratio."""
    mixers = [mixer] * len(HYBRID)
    width = nearest([model(mixers, width) for width in WIDTHS], measure, target).width
    return nearest([model(mixers, width, ratio) for ratio in FFN_RATIOS], measure, target)


def nearest(
    models: Sequence[Architecture], measure: Callable[[Architecture], float], target: float
) -> Architecture:
    """Of models in order of latency the one nearest to the target, by bisection."""
    measured: dict[Architecture, float] = {}
    low, high = 0, len(models)
    while low < high:
        middle = (low + high) // 2
        measured[models[middle]] = measure(models[middle])
        if measured[models[middle]] < target:
            low = middle + 1
        else:
            high = middle
    return min(measured, key=lambda each: abs(measured[each] - target))


def measure_together(
    hybrid: Architecture, others: set[Architecture], device: Device, protocol: Protocol
) -> dict[Architecture, Measurement]:
    """Requests of all, interleaved, as multiples of the hybrid's: numbers, not times.

    In every placement all models are made anew; see `Protocol`.
    """
    unit = protocol.compile_unit
    models = {str(each): each for each in (hybrid, *sorted(others, key=str))}
    compile_ahead(decoding(each, WORKLOAD, device, unit) for each in models.values())
    share = replace(protocol, max_seconds=protocol.max_seconds / protocol.placements)
    placements: list[dict[str, Measurement]] = []
    held = []
    with quiet(device):
        for _ in range(protocol.placements):
            requests = {
                text: Request(each, WORKLOAD, device, unit) for text, each in models.items()
            }
            # Kept, so that the next ones get memory of their own.
            held.append(requests)
            timing = measure_interleaved(
                {text: request.run for text, request in requests.items()},
                device,
                share,
                derive=lambda samples: {
                    text: ms / samples[str(hybrid)] for text, ms in samples.items()
                },
            )
            placements.append(timing.measurements)
    return {
        each: Measurement.from_placements(
            [found[text] for found in placements], protocol.max_interval_percent
        )
        for text, each in models.items()
    }


# Trainings


@dataclass(frozen=True)
class Trainer:
    """What a process trains with."""

    corpus: Path
    proxy: ProxyConfig
    threads: int

    def train(
        self, text: str, optimizer: OptimizerConfig, seed: int, report: Report
    ) -> dict[str, Any]:
        """Losses in nats per token; that of validation is None where training diverged."""
        import torch

        torch.set_num_threads(self.threads)
        training = ProxyTraining(
            Architecture.parse(text),
            PackedCorpus.open(self.corpus),
            replace(self.proxy, optimizer=optimizer),
            seed,
        )
        row: dict[str, Any] = {"loss": None, "train_loss": None}
        try:
            training.train(self.proxy.rung_tokens[-1], report)
            result = training.result()
        except FloatingPointError as error:
            row["error"] = str(error)
        else:
            row |= {"loss": result.loss, "train_loss": result.train_loss}
        return {
            **row,
            "tokens": training.tokens,
            "seconds": training.seconds,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def train_all(store: Store, trainer: Trainer, seeds: int, processes: int) -> None:
    """Do whatever has not been trained yet, and keep each result as soon as it is there."""
    machine = Device.current(threads=trainer.threads, kind="cpu").describe()
    workers = [Worker(trainer) for _ in range(processes)]
    idle = list(workers)
    running: dict[Future[dict[str, Any]], tuple[Run, Worker]] = {}
    with ThreadPoolExecutor(processes) as pool:
        try:
            while True:
                begun = {run for run, _ in running.values()}
                todo = (run for run in missing(store.losses, seeds) if run not in begun)
                for run in list(islice(todo, len(idle))):
                    worker = idle.pop()
                    optimizer = replace(OPTIMIZERS[run.arm], lr=run.lr)
                    job = (str(store.architectures[run.arm]), optimizer, run.seed)
                    future = pool.submit(worker.run, "train", *job, time_limit_s=TIME_LIMIT_S)
                    running[future] = run, worker
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, worker = running.pop(future)
                    idle.append(worker)
                    store.keep_training(run, future.result(), machine)
                    loss, count = store.losses[run], len(store.losses)
                    console.print(f"{count}. {run.arm}, {run.lr:g}, seed {run.seed}: {loss:.4f}")
        finally:
            for worker in workers:
                worker.close()


def missing(losses: dict[Run, float], seeds: int) -> Iterator[Run]:
    """What can be trained now: learning rates first, then the seeds of arms whose best is known."""
    for arm in OPTIMIZERS:
        yield from (run for run in first_runs(arm) if run not in losses)
    for seed in range(1, seeds):
        for arm in OPTIMIZERS:
            best = best_lr(losses, arm)
            if best is not None and (run := Run(arm, best, seed)) not in losses:
                yield run


def first_runs(arm: str) -> list[Run]:
    """Those that the learning rate is chosen by."""
    return [Run(arm, lr, 0) for lr in LEARNING_RATES]


def best_lr(losses: dict[Run, float], arm: str) -> float | None:
    """The learning rate with the lowest loss; None before all have been tried."""
    runs = first_runs(arm)
    if any(run not in losses for run in runs):
        return None
    return min(runs, key=losses.__getitem__).lr


# What comes of it


def compare(store: Store, arm: str, other: str) -> dict[str, Any]:
    """The loss of an arm less that of another, over the seeds that both have; see the top."""
    losses = store.losses
    best = {name: best_lr(losses, name) for name in (arm, other)}
    by_seed = {
        name: {run.seed: loss for run, loss in losses.items() if (run.arm, run.lr) == (name, lr)}
        for name, lr in best.items()
        if lr is not None
    }
    seeds = sorted(by_seed[arm].keys() & by_seed[other].keys()) if len(by_seed) == 2 else []
    differences = [by_seed[arm][seed] - by_seed[other][seed] for seed in seeds]
    difference, low, high = paired_interval(differences)
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "arms": [arm, other],
        "lr": list(best.values()),
        "loss": [float(np.mean([by_seed[name][s] for s in seeds])) for name in best]
        if seeds
        else None,
        "seeds": seeds,
    }


def paired_interval(differences: Sequence[float]) -> tuple[float | None, ...]:
    """Mean, low and high: Student's 95 % interval; None for what so few differences do not give."""
    n = len(differences)
    if not n or not np.isfinite(differences).all():
        return None, None, None
    mean = float(np.mean(differences))
    if n == 1:
        return mean, None, None
    half_width = float(stdtrit(n - 1, 0.975) * np.std(differences, ddof=1) / math.sqrt(n))
    return mean, mean - half_width, mean + half_width


def print_results(results: dict[str, Any]) -> None:
    table = Table(title="validation loss of the hybrid less that of the other, nats per token")
    for column in ("claim", "difference", "95 % interval", "seeds", "latency to the hybrid's"):
        table.add_column(column, no_wrap=column in ("claim", "95 % interval"))
    for claim, other in CLAIMS.items():
        found = results[claim]
        low, ratio, high = results["latency_ratio"][other]
        table.add_row(
            claim,
            "" if found["difference"] is None else f"{found['difference']:+.4f}",
            "" if found["low"] is None else f"{found['low']:+.4f} to {found['high']:+.4f}",
            str(len(found["seeds"])),
            f"{ratio:.3f} ({low:.3f} to {high:.3f})",
        )
    console.print(table)


if __name__ == "__main__":
    main()
