"""How well an operator table predicts whole models: builds one, then measures held-out hybrids.

Near: architectures of the demo's space whose measured latency is within ±10 % of one target, which
is where a search takes its decisions. All: from the whole space. The baseline is a regression on
weight bytes and operator count, fitted to as many measured models as the table has rows.

python benchmarks/latency_table.py
python benchmarks/latency_table.py --near 40 --all 40 --seconds 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from latency.device import Device
from latency.table import LatencyTable
from latency.table_error import TableError, table_error
from latency.timer import CpuMeter, Protocol
from latency.workload import Workload
from search.space import SearchSpace, SpaceConfig
from slm.architecture import Architecture
from slm.config import read

SPACE = Path(__file__).parent.parent / "configs" / "space" / "demo.yaml"
VOCAB_SIZE = 4096
# Of the target: how far from it a measurement may be to count as near.
NEAR = 0.10
# And a prediction to be worth a measurement: wider, so that the table does not choose its own test.
WORTH_MEASURING = 0.25

console = Console(stderr=True)


def main() -> None:
    arguments = parse_arguments()
    device = Device.current(threads=arguments.threads, kind=arguments.device)
    workload = Workload(prompt_tokens=arguments.prompt, new_tokens=arguments.new)
    protocol = Protocol(max_seconds=arguments.seconds, compile_unit="operator")
    space = SearchSpace(read(SpaceConfig, OmegaConf.load(SPACE)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SLM_CACHE_DIR"] = folder
        table, build_s = build(space, workload, device, protocol, Path(folder))
        console.print(f"built in {build_s:.0f} s")
        report(arguments, space, table, protocol, build_s)


def report(
    arguments: argparse.Namespace,
    space: SearchSpace,
    table: LatencyTable,
    protocol: Protocol,
    build_s: float,
) -> None:
    """Measure, print what came of it."""
    meter = CpuMeter()
    draws = draw(space, random.Random(arguments.seed))
    num_rows = sum(map(len, table.rows.values()))

    fitted = measure(table, [next(draws) for _ in range(num_rows)], protocol)
    everywhere = measure(table, [next(draws) for _ in range(arguments.all)], protocol)
    near, target_ms = measure_near(table, space, draws, arguments.near, protocol)
    coefficients = fit_baseline(fitted)

    console.print(error_table("near", near, coefficients))
    console.print(error_table("all", everywhere, coefficients))
    baseline = {
        "near": summary(baseline_error(near, coefficients)),
        "all": summary(baseline_error(everywhere, coefficients)),
    }
    results = {"near": summary(near), "all": summary(everywhere), "baseline": baseline}
    rows = [row for rows in table.rows.values() for row in rows.values()]
    environment = {
        **table.device.describe(),
        "workload": str(table.workload),
        "compile_unit": protocol.compile_unit,
        "seed": arguments.seed,
        "max_seconds": arguments.seconds,
        "target_ms": target_ms,
        "table_build_s": round(build_s, 1),
        "rows": len(rows),
        "rows_converged": sum(row.converged for row in rows),
        "rows_quiet": sum(row.quiet for row in rows),
        "other_cpus_busy": round(meter.others_busy(), 2),
        "reference_times": table.to_dict()["reference_times"],
        "models": {
            name: [
                {"architecture": text, "predicted_ms": predicted, "measured_ms": measured}
                for text, predicted, measured in zip(
                    error.architectures, error.predicted_ms, error.measured_ms, strict=True
                )
            ]
            for name, error in (("fitted", fitted), ("all", everywhere), ("near", near))
        },
    }
    line = {"benchmark": "latency_table", "results": results, "environment": environment}
    print(json.dumps(line, ensure_ascii=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--near", type=int, default=20, help="models near the target")
    parser.add_argument("--all", type=int, default=20, help="models of the whole space")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each measurement")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--seed", type=int, default=0, help="decides the random models")
    return parser.parse_args()


def build(
    space: SearchSpace, workload: Workload, device: Device, protocol: Protocol, folder: Path
) -> tuple[LatencyTable, float]:
    """The table of the space and the seconds it took from nothing, compilation included."""
    began = time.monotonic()
    table = LatencyTable.load_or_build(
        space.operators(),
        VOCAB_SIZE,
        workload,
        device,
        meta_tokens=space.config.meta_tokens[0],
        cache_dir=folder,
        protocol=protocol,
        progress=console.print,
    )
    return table, time.monotonic() - began


def draw(space: SearchSpace, rng: random.Random) -> Iterator[Architecture]:
    """Different architectures of the space, at random widths."""
    seen = set()
    while True:
        genotype = space.sample(rng)
        width = rng.choice(space.available_widths(genotype))
        architecture = space.realize(genotype, width, VOCAB_SIZE)
        if architecture not in seen:
            seen.add(architecture)
            yield architecture


def measure(
    table: LatencyTable, architectures: list[Architecture], protocol: Protocol
) -> TableError:
    return table.validate(architectures, protocol, console.print)


def measure_near(
    table: LatencyTable,
    space: SearchSpace,
    draws: Iterator[Architecture],
    count: int,
    protocol: Protocol,
) -> tuple[TableError, float]:
    """Models near the latency of the space's reference, and that latency in ms."""
    target_ms = measure(table, [space.reference(VOCAB_SIZE)], protocol).measured_ms[0]
    found: list[tuple[str, float, float, float]] = []
    while len(found) < count:
        architecture = next(draws)
        if abs(table.predict(architecture).request_ms / target_ms - 1) > WORTH_MEASURING:
            continue
        one = measure(table, [architecture], protocol)
        if abs(one.measured_ms[0] / target_ms - 1) <= NEAR:
            found.append(
                (str(architecture), one.predicted_ms[0], one.measured_ms[0], one.raw_ms[0])
            )
    texts, *columns = zip(*found, strict=True)
    return table_error(list(texts), *map(list, columns)), target_ms


def features(text: str) -> list[float]:
    architecture = Architecture.parse(text)
    return [1.0, 4.0 * architecture.parameters(), len(architecture.operators)]


def fit_baseline(fitted: TableError) -> np.ndarray:
    """Coefficients of the least relative squares of base, weight bytes and operator count."""
    measured = np.array(fitted.measured_ms)
    x = np.array([features(text) for text in fitted.architectures]) / measured[:, None]
    return np.linalg.lstsq(x, np.ones(len(measured)), rcond=None)[0]


def baseline_error(error: TableError, coefficients: np.ndarray) -> TableError:
    predicted = np.array([features(text) for text in error.architectures]) @ coefficients
    return table_error(error.architectures, predicted.tolist(), error.measured_ms, error.raw_ms)


def summary(error: TableError) -> dict[str, float | None]:
    return {
        "mape": error.mape_percent / 100,
        "spearman": error.spearman,
        "n": len(error.architectures),
    }


def error_table(name: str, error: TableError, coefficients: np.ndarray) -> Table:
    table = Table(title=f"{name}: predicted by the table against measured whole")
    for column in ("width", "operators", "predicted, ms", "measured, ms", "error, %", "baseline's"):
        table.add_column(column, justify="right")
    others = baseline_error(error, coefficients).errors_percent
    columns = (
        error.architectures,
        error.predicted_ms,
        error.measured_ms,
        error.errors_percent,
        others,
    )
    for text, predicted, measured, percent, other in zip(*columns, strict=True):
        architecture = Architecture.parse(text)
        table.add_row(
            str(architecture.width),
            str(len(architecture.operators)),
            f"{predicted:.2f}",
            f"{measured:.2f}",
            f"{percent:+.1f}",
            f"{other:+.1f}",
        )
    return table


if __name__ == "__main__":
    main()
