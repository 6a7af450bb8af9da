"""Our decoder against `generate` of transformers: same weights, dtype and threads, interleaved.

Models of attention (Llama), of Mamba2 and of both (Bamba) at some 2, 20 and 100 million parameters.
`ratio` is our tokens per second over theirs, of whole requests. `bandwidth_fraction` is what a step
has to read and write at the least, over our median step, as a share of the best reading of a large
buffer that was timed in turn with it: 1 is what memory allows. Where memory is shared with other
machines its speed changes by the minute; the figures also hold the median of step against reading
in the same round, our step when nothing is compiled, after how many tokens compiling has paid, and
our step after LONG_CONTEXT tokens, where keys and values are a large part of what is read.

python benchmarks/decode.py
python benchmarks/decode.py --models llama --sizes 2M 20M --seconds 60
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from latency.device import Device
from latency.roofline import probe_buffer, step_bytes
from latency.timer import CpuMeter, Protocol, measure_interleaved
from latency.workload import Workload
from slm.architecture import Architecture
from slm.generation import Decoder
from slm.hub.native import to_transformers
from slm.model import LanguageModel

SIZES = ("2M", "20M", "100M")
HEAD_DIM, STATE_SIZE, RATIO = 64, 128, 3.0
ATTENTION = f"attention(head_dim={HEAD_DIM},query_groups=2)"
MAMBA2 = f"mamba2(head_dim={HEAD_DIM},state_size={STATE_SIZE})"
FFN = f"ffn(ratio={RATIO})"
# Read from end to end: no cache holds it.
READ_BYTES = 512 * 2**20
# Steps timed as one beside it.
BURST_STEPS = 8
# Tokens before a step that reads many keys and values.
LONG_CONTEXT = 4096

console = Console(stderr=True)


def without_their_kernels() -> None:
    """transformers takes functions of these packages where they are, whatever the device is."""
    for package in ("fla", "causal_conv1d", "mamba_ssm"):
        absent: Any = None
        sys.modules[package] = absent


def hybrid(count: int, every: int) -> list[str]:
    """Layers of Bamba: each `every`-th is attention."""
    return [
        f"{ATTENTION if number % every == every - 1 else MAMBA2} {FFN}" for number in range(count)
    ]


# By size: the width, the vocabulary and the layers, each one or two operators.
FAMILIES = {
    "llama": {
        "2M": (128, 4096, [f"{ATTENTION} {FFN}"] * 7),
        "20M": (384, 8192, [f"{ATTENTION} {FFN}"] * 10),
        "100M": (768, 8192, [f"{ATTENTION} {FFN}"] * 13),
    },
    "mamba2": {
        "2M": (128, 4096, [MAMBA2] * 12),
        "20M": (384, 8192, [MAMBA2] * 17),
        "100M": (768, 8192, [MAMBA2] * 25),
    },
    "bamba": {
        "2M": (128, 4096, hybrid(6, every=3)),
        "20M": (384, 8192, hybrid(8, every=4)),
        "100M": (768, 8192, hybrid(10, every=5)),
    },
}


@torch.no_grad()
def check_alike(theirs: nn.Module, ours: LanguageModel, tokens: Tensor) -> None:
    """Raise AssertionError unless both compute the same."""
    expected, actual = theirs(tokens).logits, ours(tokens)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"the two models differ by {error:.1e}"


def compare(
    architecture: Architecture, workload: Workload, device: Device, protocol: Protocol
) -> dict[str, Any]:
    """Ours and theirs, and the reading of a buffer, in turn."""
    torch.manual_seed(0)
    ours = LanguageModel(architecture).eval().to(device.torch_device)
    theirs = to_transformers(ours).to(device.torch_device)
    prompt = torch.randint(architecture.vocab_size, (1, workload.prompt_tokens))
    prompt = prompt.to(device.torch_device)
    check_alike(theirs, ours, prompt)
    max_tokens = max(workload.max_tokens, LONG_CONTEXT) + BURST_STEPS
    begin_s = time.monotonic()
    decoder = Decoder(ours, max_tokens, compile_unit="step")
    compile_s = time.monotonic() - begin_s
    buffer = probe_buffer(READ_BYTES, device)

    def generate(count: int) -> Tensor:
        return theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    def decode(count: int) -> list[Tensor]:
        return list(decoder.generate(prompt, count))

    new_tokens = workload.new_tokens
    functions = {"theirs": lambda: generate(new_tokens), "ours": lambda: decode(new_tokens)}
    timing = measure_interleaved(
        functions,
        device,
        protocol,
        derive=lambda samples: {"ratio": samples["theirs"] / samples["ours"]},
    )
    samples, ratio = timing.samples, timing.measurements["ratio"]

    context = workload.prompt_tokens + new_tokens // 2

    def steps(decoder: Decoder, context: int) -> None:
        decoder.pretend(context)
        tokens = prompt[:, -1]
        for _ in range(BURST_STEPS):
            tokens = decoder.greedy_step(tokens)

    plain = Decoder(ours, max_tokens)
    bandwidth = measure_interleaved(
        {
            "steps": partial(steps, decoder, context),
            "plain": partial(steps, plain, context),
            "long": partial(steps, decoder, LONG_CONTEXT),
            "read": buffer.sum,
        },
        device,
        protocol,
        # Only the first step of a burst finds the caches as the reading left them.
        derive=lambda samples: {"paired": samples["read"] / samples["steps"]},
    )
    step_ms, plain_ms, long_ms = (
        float(np.median(bandwidth.samples[name])) / BURST_STEPS
        for name in ("steps", "plain", "long")
    )
    step, long_step = (
        step_bytes(architecture, workload, tokens + BURST_STEPS // 2)
        for tokens in (context, LONG_CONTEXT)
    )
    read_ms = bandwidth.samples["read"]
    paired = bandwidth.measurements["paired"]
    # Of what was read per time: both sides of the ratio in bytes.
    scale = BURST_STEPS * step / READ_BYTES
    return {
        "parameters": architecture.parameters(),
        "ratio": round(ratio.median_ms, 3),
        "ratio_interval": [round(ratio.low_ms, 3), round(ratio.high_ms, 3)],
        "rounds": ratio.n,
        "quiet": ratio.quiet,
        "ours_tokens_per_s": round(1000 * new_tokens / float(np.median(samples["ours"])), 1),
        "theirs_tokens_per_s": round(1000 * new_tokens / float(np.median(samples["theirs"])), 1),
        "step_ms": round(step_ms, 4),
        "not_compiled_step_ms": round(plain_ms, 4),
        "compile_s": round(compile_s, 1),
        "compiling_pays_after_tokens": round(1000 * compile_s / (plain_ms - step_ms)),
        "bytes_per_s": 1000 * step / step_ms,
        "best_read_bytes_per_s": 1000 * READ_BYTES / float(read_ms.min()),
        "median_read_bytes_per_s": 1000 * READ_BYTES / float(np.median(read_ms)),
        "bandwidth_fraction": round(step / step_ms / READ_BYTES * float(read_ms.min()), 3),
        "long_context_step_ms": round(long_ms, 4),
        "long_context_bandwidth_fraction": round(
            long_step / long_ms / READ_BYTES * float(read_ms.min()), 3
        ),
        "paired_bandwidth_fraction": round(scale * paired.median_ms, 3),
        "paired_interval": [round(scale * paired.low_ms, 3), round(scale * paired.high_ms, 3)],
    }


def main() -> None:
    arguments = parse_arguments()
    without_their_kernels()
    device = Device.current(threads=arguments.threads, kind="cpu")
    workload = Workload(prompt_tokens=arguments.prompt, new_tokens=arguments.new)
    protocol = Protocol(max_seconds=arguments.seconds, max_interval_percent=1.0, max_repeats=0)
    meter = CpuMeter()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Where nothing has been compiled: how long that takes is asked, too.
        os.environ["SLM_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name in arguments.models:
            for size in arguments.sizes:
                console.print(f"{name} of {size}")
                width, vocab_size, layers = FAMILIES[name][size]
                text = f"width={width} vocab_size={vocab_size} | {' '.join(layers)}"
                row = compare(Architecture.parse(text), workload, device, protocol)
                found.setdefault(name, {})[size] = row
    print_results(found)
    results = {
        name: {
            size: {name: row[name] for name in ("ratio", "bandwidth_fraction")}
            for size, row in sizes.items()
        }
        for name, sizes in found.items()
    }
    environment = {
        **device.describe(),
        "transformers_version": version("transformers"),
        "workload": str(workload),
        "figures": found,
        "other_cpus_busy": round(meter.others_busy(), 2),
    }
    line = {"benchmark": "decode", "results": results, "environment": environment}
    print(json.dumps(line, ensure_ascii=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="time for each of two per model"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    return parser.parse_args()


def print_results(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    table = Table(title="tokens per second; a step's bytes against reading a buffer")
    for column in (
        "model",
        "parameters",
        "ours",
        "theirs",
        "ratio",
        "95 %",
        "step, ms",
        "GB/s",
        "of the best",
        "paired",
        f"after {LONG_CONTEXT:,}, ms",
        "of the best",
        "compiled in, s",
        "pays after",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, sizes in found.items():
        for row in sizes.values():
            low, high = row["ratio_interval"]
            table.add_row(
                name,
                f"{row['parameters']:,}",
                f"{row['ours_tokens_per_s']:.0f}",
                f"{row['theirs_tokens_per_s']:.0f}",
                f"{row['ratio']:.2f}",
                f"{low:.2f} – {high:.2f}",
                f"{row['step_ms']:.3f}",
                f"{row['bytes_per_s'] / 1e9:.1f}",
                f"{row['bandwidth_fraction']:.2f}",
                f"{row['paired_bandwidth_fraction']:.2f}",
                f"{row['long_context_step_ms']:.3f}",
                f"{row['long_context_bandwidth_fraction']:.2f}",
                f"{row['compile_s']:.0f}",
                f"{row['compiling_pays_after_tokens']:,} tokens",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
