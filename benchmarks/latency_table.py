"""How well an operator table predicts whole models: builds one, then measures random hybrids.

python benchmarks/latency_table.py
python benchmarks/latency_table.py --architectures 40 --seconds 10
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from latency.device import Device
from latency.table import LatencyTable
from latency.table_error import TableError
from latency.timer import CpuMeter, Protocol
from latency.workload import Workload
from slm.architecture import Architecture
from slm.operators import OperatorConfig, parse_operator

VOCAB_SIZE = 4096
META_TOKENS = 8
WIDTHS = (64, 96, 128)
OPERATORS = (
    "attention(head_dim=32)",
    "attention(head_dim=32,window=64)",
    "mamba2(head_dim=32,state_size=32)",
    "deltanet(head_dim=32)",
    "ffn",
)


def main() -> None:
    arguments = parse_arguments()
    device = Device.current(threads=arguments.threads)
    workload = Workload(prompt_tokens=arguments.prompt, new_tokens=arguments.new)
    protocol = Protocol(max_seconds=arguments.seconds)
    operators = [parse_operator(text) for text in OPERATORS]
    architectures = random_architectures(operators, arguments.architectures, arguments.seed)
    console = Console(stderr=True)
    meter = CpuMeter()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        table = LatencyTable.load_or_build(
            [(operator, width) for width in WIDTHS for operator in operators],
            VOCAB_SIZE,
            workload,
            device,
            meta_tokens=META_TOKENS,
            cache_dir=Path(folder),
            protocol=protocol,
            progress=console.print,
        )
        build_s = time.monotonic() - began
    error = table.validate(architectures, protocol, console.print)
    print_error(error)
    rows = [row for rows in table.rows.values() for row in rows.values()]
    environment = {
        **device.describe(),
        "workload": str(workload),
        "architectures": len(architectures),
        "seed": arguments.seed,
        "max_seconds": arguments.seconds,
        "table_build_s": round(build_s, 1),
        "rows": len(rows),
        "rows_converged": sum(row.converged for row in rows),
        "rows_quiet": sum(row.quiet for row in rows),
        "other_cpus_busy": round(meter.others_busy(), 2),
        "reference_ms": table.reference_ms,
    }
    results = {
        "mape_percent": error.mape_percent,
        "max_error_percent": error.max_error_percent,
        "spearman": error.spearman,
    }
    report = {"benchmark": "latency_table", "results": results, "environment": environment}
    print(json.dumps(report, ensure_ascii=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", type=int, default=12, help="random models to measure")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--seed", type=int, default=0, help="decides the random models")
    return parser.parse_args()


def random_architectures(
    operators: list[OperatorConfig], count: int, seed: int
) -> list[Architecture]:
    """Models of 2 to 10 operators of any kind in any order, at any of the widths."""
    draw = random.Random(seed)
    return [
        Architecture(
            width=draw.choice(WIDTHS),
            vocab_size=VOCAB_SIZE,
            meta_tokens=META_TOKENS,
            operators=tuple(draw.choices(operators, k=draw.randint(2, 10))),
        )
        for _ in range(count)
    ]


def print_error(error: TableError) -> None:
    table = Table(title="predicted by the table against measured whole")
    for column in (
        "width",
        "operators",
        "predicted, ms",
        "measured, ms",
        "by the clock",
        "error, %",
    ):
        table.add_column(column, justify="right")
    columns = (
        error.architectures,
        error.predicted_ms,
        error.measured_ms,
        error.raw_ms,
        error.errors_percent,
    )
    for text, predicted, measured, raw, percent in zip(*columns, strict=True):
        architecture = Architecture.parse(text)
        table.add_row(
            str(architecture.width),
            str(len(architecture.operators)),
            f"{predicted:.2f}",
            f"{measured:.2f}",
            f"{raw:.2f}",
            f"{percent:+.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
