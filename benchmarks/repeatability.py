"""Whether a latency measured again, in another process and much later, is the same.

Random models of the demo's space are measured whole, in turn, twice, with `--minutes` between. Two
measurements of a model agree if they differ by no more than the 95 % interval of their difference,
which follows from both intervals, neither being wider than ±3 %. Compared is the request as a
multiple of the references that ran interleaved, which is what tables and searches go by: the
machine need not be equally fast both times. Times by the clock are there too.

python benchmarks/repeatability.py
python benchmarks/repeatability.py --models 20 --minutes 5
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from latency.device import Device
from latency.profile import profile_in_turn
from latency.reference import reference_decodings
from latency.request import decoding
from latency.timer import WIDEST_PERCENT, Protocol
from latency.workload import Workload
from search.space import SearchSpace, SpaceConfig
from slm.architecture import Architecture
from slm.compile_ahead import compile_ahead
from slm.config import read
from slm.decoding_step import CompileUnit

SPACE = Path(__file__).parent.parent / "configs" / "space" / "demo.yaml"
VOCAB_SIZE = 4096
WORKLOAD = Workload(prompt_tokens=64, new_tokens=64)
COMPILE_UNIT: CompileUnit = "operator"

Record = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    texts = models(arguments.models, arguments.seed)
    device = Device.current(threads=arguments.threads, kind="cpu")
    architectures = map(Architecture.parse, texts)
    decodings = [decoding(each, WORKLOAD, device, COMPILE_UNIT) for each in architectures]
    compile_ahead(
        [*reference_decodings(device, COMPILE_UNIT), *decodings], Console(stderr=True).print
    )
    began = time.monotonic()
    first = in_fresh_process(texts, arguments)
    time.sleep(max(0.0, 60 * arguments.minutes - (time.monotonic() - began)))
    second = in_fresh_process(texts, arguments)
    pairs = list(zip(first, second, strict=True))
    print_pairs(pairs)
    results = {
        "models": len(pairs),
        "agree": sum(agree(a["ratio"], b["ratio"]) for a, b in pairs),
    }
    figures = {
        "agree_at_any_width": sum(
            agree(a["ratio"], b["ratio"], widest_percent=math.inf) for a, b in pairs
        ),
        "agree_by_the_clock": sum(agree(a["request_ms"], b["request_ms"]) for a, b in pairs),
        "widest_interval_percent": max(half_width_percent(x["ratio"]) for x in first + second),
        "largest_difference_percent": max(
            abs(difference_percent(a["ratio"], b["ratio"])) for a, b in pairs
        ),
    }
    environment = {
        **device.describe(),
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "max_seconds": arguments.seconds,
        **figures,
        "records": [first, second],
    }
    line = {"benchmark": "repeatability", "results": results, "environment": environment}
    print(json.dumps(line, ensure_ascii=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=10, help="how many")
    parser.add_argument("--minutes", type=float, default=30.0, help="between the two")
    parser.add_argument("--seconds", type=float, default=40.0, help="most time for each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="decides the models")
    return parser.parse_args()


def models(count: int, seed: int) -> list[str]:
    """Random architectures of the demo's space, all different."""
    space = SearchSpace(read(SpaceConfig, OmegaConf.load(SPACE)))
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        genotype = space.sample(rng)
        width = rng.choice(space.available_widths(genotype))
        found[str(space.realize(genotype, width, VOCAB_SIZE))] = None
    return list(found)


def in_fresh_process(texts: list[str], arguments: argparse.Namespace) -> list[Record]:
    """Measure them where nothing was measured before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measure, texts, arguments.threads, arguments.seconds).result()


def measure(texts: list[str], threads: int, seconds: float) -> list[Record]:
    device = Device.current(threads=threads, kind="cpu")
    protocol = Protocol(max_seconds=seconds, compile_unit=COMPILE_UNIT)
    found = []
    for result in profile_in_turn(map(Architecture.parse, texts), WORKLOAD, device, protocol):
        request = result.request_ms
        low, high = result.request_per_reference_interval
        found.append(
            {
                "architecture": str(result.architecture),
                "ratio": [low, result.request_per_reference, high],
                "request_ms": [request.low_ms, request.median_ms, request.high_ms],
                "converged": request.converged,
                "quiet": request.quiet,
                "placements": result.placements,
            }
        )
    return found


def agree(a: list[float], b: list[float], widest_percent: float = WIDEST_PERCENT) -> bool:
    """Whether two measurements [low, median, high] are of the same: see the top."""
    halves = half_width_percent(a), half_width_percent(b)
    return max(halves) <= widest_percent and abs(difference_percent(a, b)) <= math.hypot(*halves)


def difference_percent(a: list[float], b: list[float]) -> float:
    return 100 * (b[1] / a[1] - 1)


def half_width_percent(a: list[float]) -> float:
    return 100 * (a[2] - a[0]) / 2 / a[1]


def print_pairs(pairs: list[tuple[Record, Record]]) -> None:
    table = Table(title="request as a multiple of the references, measured twice")
    for column in ("first", "±, %", "second", "±, %", "difference, %", "agree", "by the clock, %"):
        table.add_column(column, justify="right")
    for first, second in pairs:
        a, b = first["ratio"], second["ratio"]
        table.add_row(
            f"{a[1]:.3f}",
            f"{half_width_percent(a):.1f}",
            f"{b[1]:.3f}",
            f"{half_width_percent(b):.1f}",
            f"{difference_percent(a, b):+.1f}",
            "yes" if agree(a, b) else "no",
            f"{difference_percent(first['request_ms'], second['request_ms']):+.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
