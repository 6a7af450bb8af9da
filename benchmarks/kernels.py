"""Chunked forms against the best alternative in pure torch: time of forward and backward, and peak
memory. On a CUDA device: this package's torch forms against flash-linear-attention's kernels.

python benchmarks/kernels.py
python benchmarks/kernels.py --operators kda gla --seconds 20

The alternatives are flash-linear-attention's reference functions and transformers' torch functions,
each at the fastest of its chunk sizes. All run interleaved in one process.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from latency.device import Device
from latency.memory import PeakMemory
from latency.timer import CpuMeter, Measurement, Protocol, measure_interleaved
from slm.kernels.backend import set_backend
from slm.kernels.delta_rule import chunk_delta_rule, delta_rule
from slm.kernels.gated_delta_rule import chunk_gated_delta_rule, gated_delta_rule
from slm.kernels.gla import chunk_gla, gla
from slm.kernels.kda import chunk_kda, kda
from slm.kernels.linear_attention import chunk_linear_attention, linear_attention
from slm.kernels.rwkv7 import chunk_rwkv7, rwkv7
from slm.kernels.selective_scan import chunk_selective_scan
from slm.kernels.ssd import chunk_ssd, ssd

BATCH, HEADS, SIZE, STATE = 1, 4, 64, 16
TOKENS, MEMORY_TOKENS = 1024, 2048
CHUNK_SIZES = (16, 32, 64)

# From inputs to the output [B, T, H, V], in whatever layout; only its gradients are taken.
Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One recurrence.

    inputs: their names, see `make_inputs`. ours: this package's chunked form, dispatched: what
    models call, by fla on CUDA (None: there is no such kernel). others: by name, what it is
    compared with, made when it is needed.
    """

    inputs: str
    ours: Kernel
    dispatched: Kernel | None
    others: dict[str, Callable[[], Kernel]] = field(default_factory=dict)


def output(function: Callable[..., tuple[Tensor, Tensor]], **options: int) -> Kernel:
    """The function without the final state it returns."""
    return lambda *inputs: function(*inputs, **options)[0]


def delta_rule_fla(chunk_size: int) -> Kernel:
    from fla.ops.delta_rule.naive import delta_rule_chunkwise

    return lambda q, k, v, beta: delta_rule_chunkwise(
        *(x.transpose(1, 2) for x in (q, k, v, beta)), chunk_size=chunk_size
    )[0]


def gated_delta_rule_fla(chunk_size: int) -> Kernel:
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    return output(naive_chunk_gated_delta_rule, chunk_size=chunk_size)


def gated_delta_rule_transformers(chunk_size: int) -> Kernel:
    function = without_kernels("qwen3_next").torch_chunk_gated_delta_rule
    return output(function, chunk_size=chunk_size)


def kda_fla(chunk_size: int) -> Kernel:
    from fla.ops.kda.naive import naive_chunk_kda

    return output(naive_chunk_kda, chunk_size=chunk_size)


def ssd_ours(x: Tensor, dt: Tensor, k: Tensor, q: Tensor) -> Tensor:
    return chunk_ssd(q, k, x * dt.unsqueeze(-1), -dt)[0]


def ssd_dispatched(x: Tensor, dt: Tensor, k: Tensor, q: Tensor) -> Tensor:
    return ssd(q, k, x * dt.unsqueeze(-1), -dt)[0]


def ssd_fla(chunk_size: int) -> Kernel:
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    def run(x: Tensor, dt: Tensor, k: Tensor, q: Tensor) -> Tensor:
        q, k = (y.unsqueeze(2).expand(-1, -1, x.shape[2], -1) for y in (q, k))
        v = x * dt.unsqueeze(-1)
        return naive_chunk_simple_gla(q, k, v, -dt, chunk_size=chunk_size, scale=1.0)[0]

    return run


def ssd_transformers(chunk_size: int) -> Kernel:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    A = -torch.ones(HEADS)
    return lambda x, dt, k, q: mamba2_chunk_scan(
        x, dt, A, k.unsqueeze(2), q.unsqueeze(2), chunk_size
    )


def gla_fla() -> Kernel:
    from fla.ops.gla.naive import naive_recurrent_gla

    return output(naive_recurrent_gla)


def gla_fla_chunks(chunk_size: int) -> Kernel:
    """The rule of RWKV-7 with nothing removed from the memory."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise

    def run(*inputs: Tensor) -> Tensor:
        q, k, v, g = (x.transpose(1, 2) for x in inputs)
        nothing = torch.zeros_like(k)
        return dplr_chunkwise(q, k, v, nothing, nothing, g, chunk_size=chunk_size)[0]

    return run


def linear_attention_fla() -> Kernel:
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn

    return naive_chunk_linear_attn


def rwkv7_fla(chunk_size: int) -> Kernel:
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise

    def run(*inputs: Tensor) -> Tensor:
        r, w, k, v, a, b = (x.transpose(1, 2) for x in inputs)
        return dplr_chunkwise(r, k, v, a, b, w, chunk_size=chunk_size)[0]

    return run


def selective_scan_transformers() -> Kernel:
    """Token by token: without a compiler there is nothing better."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return lambda x, dt, A, B, C: mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT)


def at_chunk_sizes(make: Callable[[int], Kernel], name: str) -> dict[str, Callable[[], Kernel]]:
    return {f"{name}, chunks of {size}": functools.partial(make, size) for size in CHUNK_SIZES}


def without_kernels(model: str) -> ModuleType:
    """A model's module of transformers with its torch functions: beside packages of kernels it
    takes theirs, which need a GPU."""
    packages = ("fla", "causal_conv1d", "mamba_ssm")
    known = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        return importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(known)


CASES = {
    "delta_rule": Case(
        "q k v beta",
        output(chunk_delta_rule),
        output(delta_rule),
        at_chunk_sizes(delta_rule_fla, "fla"),
    ),
    "gated_delta_rule": Case(
        "q k v g beta",
        output(chunk_gated_delta_rule),
        output(gated_delta_rule),
        at_chunk_sizes(gated_delta_rule_fla, "fla")
        | at_chunk_sizes(gated_delta_rule_transformers, "transformers"),
    ),
    "ssd": Case(
        "v step B C",
        ssd_ours,
        ssd_dispatched,
        at_chunk_sizes(ssd_fla, "fla") | at_chunk_sizes(ssd_transformers, "transformers"),
    ),
    "kda": Case("q k v gk beta", output(chunk_kda), output(kda), at_chunk_sizes(kda_fla, "fla")),
    "gla": Case(
        "q k v gk",
        output(chunk_gla),
        output(gla),
        {"fla, recurrent": gla_fla} | at_chunk_sizes(gla_fla_chunks, "fla"),
    ),
    "linear_attention": Case(
        "q k v",
        output(chunk_linear_attention),
        output(linear_attention),
        {"fla, chunks of 64": linear_attention_fla},
    ),
    "rwkv7": Case(
        "q gk k v a b", output(chunk_rwkv7), output(rwkv7), at_chunk_sizes(rwkv7_fla, "fla")
    ),
    "selective_scan": Case(
        "x dt A B C",
        output(chunk_selective_scan),
        None,
        {"transformers": selective_scan_transformers},
    ),
}


def make_inputs(names: str, num_tokens: int, device: torch.device) -> list[Tensor]:
    """Inputs of the given names, of a size and spread as in a model."""
    torch.manual_seed(0)
    shape = (BATCH, num_tokens, HEADS, SIZE)
    keys = F.normalize(torch.randn(shape), dim=-1)
    beta = torch.rand(shape[:3])
    state_size = STATE if names.startswith("x") else SIZE
    made = {
        "q": torch.randn(shape),
        "k": keys,
        "v": torch.randn(shape),
        "g": F.logsigmoid(torch.randn(shape[:3]) + 2),
        "gk": F.logsigmoid(torch.randn(shape) + 2),
        "beta": beta,
        "step": torch.rand(shape[:3]) / 2,
        "a": -keys,
        "b": keys * beta.unsqueeze(-1),
        "x": torch.randn(BATCH, num_tokens, HEADS * SIZE),
        "dt": torch.rand(BATCH, num_tokens, HEADS * SIZE) / 10,
        "A": -torch.arange(1.0, state_size + 1).expand(HEADS * SIZE, -1),
        "B": torch.randn(BATCH, num_tokens, state_size),
        "C": torch.randn(BATCH, num_tokens, state_size),
    }
    return [made[name].to(device).requires_grad_() for name in names.split()]


def forward_backward(kernel: Kernel, inputs: list[Tensor]) -> Callable[[], object]:
    """What is timed."""

    def run() -> object:
        result = kernel(*inputs)
        return torch.autograd.grad(result, inputs, torch.ones_like(result))

    return run


def time_case(
    name: str, device: Device, protocol: Protocol
) -> tuple[Measurement, dict[str, Measurement]]:
    """Ours, and every other, interleaved."""
    case = CASES[name]
    inputs = make_inputs(case.inputs, TOKENS, device.torch_device)
    if device.kind == "cuda":
        # Ours is what models run there; the other is the torch form.
        assert case.dispatched is not None
        kernels = {"ours": case.dispatched, "torch": case.ours}
        inputs = [x.detach().bfloat16().requires_grad_() for x in inputs]
    else:
        kernels = {"ours": case.ours} | {other: make() for other, make in case.others.items()}
    functions = {key: forward_backward(kernel, inputs) for key, kernel in kernels.items()}
    measurements = measure_interleaved(functions, device, protocol).measurements
    return measurements.pop("ours"), measurements


def peak_mib(name: str, other: str | None) -> float:
    """By how much one forward and backward raises this process's resident memory, at most."""
    case = CASES[name]
    kernel = case.ours if other is None else case.others[other]()
    inputs = make_inputs(case.inputs, MEMORY_TOKENS, torch.device("cpu"))
    run = forward_backward(kernel, inputs)
    # Threads, and what the allocator keeps: not the kernel's.
    forward_backward(kernel, make_inputs(case.inputs, 64, torch.device("cpu")))()
    memory = PeakMemory()
    with memory.measured(Device.current(kind="cpu")):
        run()
    if memory.bytes is None:
        raise OSError("this system does not tell how much memory a process takes")
    return memory.bytes / 2**20


def in_fresh_process(name: str, other: str | None) -> float:
    """`peak_mib` where nothing else was allocated before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_mib, (name, other))


def main() -> None:
    arguments = parse_arguments()
    device = Device.current(threads=arguments.threads)
    protocol = Protocol(max_seconds=arguments.seconds, max_interval_percent=1.0)
    set_backend("auto")
    console = Console(stderr=True)
    meter = CpuMeter()
    results: dict[str, dict[str, float | str]] = {}
    intervals: dict[str, str] = {}
    for name in arguments.operators:
        if device.kind == "cuda" and CASES[name].dispatched is None:
            continue
        console.print(f"timing {name}")
        ours, others = time_case(name, device, protocol)
        other = min(others, key=lambda key: others[key].median_ms)
        best = others[other]
        results[name] = {
            "ours_ms": round(ours.median_ms, 3),
            "other_ms": round(best.median_ms, 3),
            "other": other,
            "ratio": round(ours.median_ms / best.median_ms, 3),
        }
        intervals[name] = " against ".join(
            f"[{each.low_ms:.2f}, {each.high_ms:.2f}]" for each in (ours, best)
        )
        if device.kind == "cpu":
            peaks = [in_fresh_process(name, which) for which in (None, other)]
            results[name] |= {
                "ours_peak_mib": round(peaks[0], 1),
                "other_peak_mib": round(peaks[1], 1),
                "peak_ratio": round(peaks[0] / peaks[1], 3),
            }
    print_results(results, intervals)
    environment = {
        **device.describe(),
        "shape": {"B": BATCH, "T": TOKENS, "H": HEADS, "D": SIZE, "mamba_state": STATE},
        "memory_tokens": MEMORY_TOKENS,
        "dtype": "float32" if device.kind == "cpu" else "bfloat16",
        "intervals_ms": intervals,
        "other_cpus_busy": round(meter.others_busy(), 2),
    }
    report = {"benchmark": "kernels", "results": results, "environment": environment}
    print(json.dumps(report, ensure_ascii=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operators", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each operator")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    return parser.parse_args()


def print_results(results: dict[str, dict[str, float | str]], intervals: dict[str, str]) -> None:
    table = Table(title=f"forward + backward, B={BATCH} T={TOKENS} H={HEADS} D={SIZE}")
    columns = ("operator", "ours, ms", "other, ms", "ratio", "95 %, ms", "peak, MiB", "other")
    for column in columns:
        table.add_column(column, justify="left" if column in ("operator", "other") else "right")
    for name, row in results.items():
        peaks = (row.get("ours_peak_mib"), row.get("other_peak_mib"))
        table.add_row(
            name,
            *(str(row[key]) for key in ("ours_ms", "other_ms", "ratio")),
            intervals[name],
            "" if None in peaks else f"{peaks[0]} / {peaks[1]}",
            str(row["other"]),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
