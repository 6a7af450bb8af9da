"""What weight normalization adds to an optimizer step: the projection against fused AdamW's step.

A model of 30M parameters with every kind of projection, steps and projections in turn.

python benchmarks/weight_norm.py
python benchmarks/weight_norm.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATORS = "attention ffn mamba2 ffn deltanet ffn gated_deltanet ffn"
TEXT = f"width=512 vocab_size=8192 | {OPERATORS} {OPERATORS}"


def main() -> None:
    import torch

    from latency.device import Device
    from latency.lock import device_lock

    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    project, step, sizes = build(arguments.text)
    with device_lock(exclusive=True):
        times = measure({"norm": project, "adamw": step}, arguments.repeats)
    ratios = [norm / adamw for norm, adamw in zip(times["norm"], times["adamw"], strict=True)]
    results = {f"{name}_ms": 1000 * statistics.median(values) for name, values in times.items()}
    results["ratio"] = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4)
    print_results(results, sizes, quartiles)
    environment = {
        **Device.current(threads=arguments.threads, kind="cpu").describe(),
        **sizes,
        "architecture": arguments.text,
        "repeats": arguments.repeats,
        "ratio_quartiles": [quartiles[0], quartiles[2]],
    }
    line = {"benchmark": "weight_norm", "results": results, "environment": environment}
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default=TEXT, help="the architecture")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def build(text: str) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, int]]:
    """The projection and the optimizer step of a model, and of how many parameters each is."""
    import torch

    from slm import weight_norm
    from slm.architecture import Architecture
    from slm.model import LanguageModel

    torch.manual_seed(0)
    model = LanguageModel(Architecture.parse(text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "projected": sum(p.numel() for _, p, _ in weight_norm.matrices(model)),
    }
    return lambda: weight_norm.project(model), optimizer.step, sizes


def measure(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each in turn, after two turns that compile and fill caches."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(2 + repeats):
        for name, function in functions.items():
            begin_s = time.perf_counter()
            function()
            if turn >= 2:
                times[name].append(time.perf_counter() - begin_s)
    return times


def print_results(results: dict[str, float], sizes: dict[str, int], quartiles: list[float]) -> None:
    table = Table(title="weight normalization")
    for column in ("parameters", "projected", "projection, ms", "AdamW, ms", "ratio (quartiles)"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{sizes['parameters'] / 1e6:.1f}M",
        f"{sizes['projected'] / 1e6:.1f}M",
        f"{results['norm_ms']:.2f}",
        f"{results['adamw_ms']:.2f}",
        f"{results['ratio']:.3f} ({quartiles[0]:.3f}-{quartiles[2]:.3f})",
    )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
