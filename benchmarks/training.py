"""Our training step against models of transformers: same weights, shape, data, dtype and threads.

A step is the forward pass, the loss, the backward pass, clipping of the gradients' norm and fused
AdamW, both eager. Models: attention (Llama), Mamba2, Gated DeltaNet (Qwen3-Next, all its layers
linear) and a hybrid of Mamba2 and attention (Bamba), with 4,096 tokens in the vocabulary and 2,048
in a step. Theirs runs at the fastest of its chunk sizes, chosen beforehand by the same steps.
float32 is float32 throughout; bfloat16 is torch.autocast round forward and loss on weights in
float32, for both, as the trainer's precision=bfloat16 has it.

`ratio` is our tokens per second over theirs. `gemm_fraction` is the time of the step's matrix
products with weights (of every linear map and of the head: one forward, two backward), run one
after the other on operands of the step's dtype, over the time of our step: what is lacking to 1 is
recurrences, attention, everything elementwise and the optimizer. All three run interleaved.

`packed_ratio` is our tokens per second where rows hold several documents over those where a row is
one, as theirs are.

python benchmarks/training.py
python benchmarks/training.py --models mamba2 --shapes d256 --dtypes bfloat16 --repeats 5
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from decode import ATTENTION, FFN, MAMBA2, hybrid, without_their_kernels
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from latency.device import Device
from latency.timer import CpuMeter, Protocol, measure_interleaved, quiet, time_call
from slm.architecture import Architecture
from slm.hub.native import to_transformers
from slm.model import LanguageModel
from slm.training.loss import next_token_loss
from slm.training.precision import Precision, autocast

VOCAB_SIZE, STEP_TOKENS = 4096, 2048
# Width and tokens of a row.
SHAPES = {"d256": (256, 512), "d512": (512, 1024)}
DTYPES: tuple[Precision, ...] = ("float32", "bfloat16")
HEAD_DIM = 64
GATED_DELTANET = f"gated_deltanet(head_dim={HEAD_DIM},expand_v=2.0)"
CHUNK_SIZES = (32, 64, 128, 256)
# Steps that choose theirs among them.
CHOOSING_STEPS = 2
# Documents that a packed row holds on average.
DOCUMENTS_PER_ROW = 4

console = Console(stderr=True)


@dataclass(frozen=True)
class Family:
    """Models that both have.

    layers: each one or two operators of ours. theirs: makes the model of transformers that has the
    weights of ours. chunk_sizes: of theirs; none where there are no chunks.
    """

    layers: list[str]
    theirs: Callable[[LanguageModel], Any] = to_transformers
    chunk_sizes: tuple[int, ...] = CHUNK_SIZES

    def architecture(self, width: int) -> Architecture:
        """Ours."""
        return Architecture.parse(
            f"width={width} vocab_size={VOCAB_SIZE} | {' '.join(self.layers)}"
        )


def to_qwen3_next(ours: LanguageModel) -> nn.Module:
    """Qwen3-Next with layers of Gated DeltaNet only, whose weights `ours` takes over."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    width, operators = ours.architecture.width, ours.architecture.operators
    heads, num_layers = width // HEAD_DIM, len(operators) // 2
    ffn: Any = operators[1]
    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            intermediate_size=ffn.hidden(width),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=HEAD_DIM,
            layer_types=["linear_attention"] * num_layers,
            linear_num_key_heads=heads,
            linear_num_value_heads=heads,
            linear_key_head_dim=HEAD_DIM,
            linear_value_head_dim=2 * HEAD_DIM,
            num_experts=0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )
    for layer in model.model.layers:
        layer.linear_attn.chunk_size = 64
        layer.linear_attn.register_forward_pre_hook(pass_chunk_size, with_kwargs=True)
    copy_qwen3_next(model, ours)
    return model


def pass_chunk_size(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Theirs takes it with the call only."""
    return args, kwargs | {"chunk_size": module.chunk_size}


@torch.no_grad()
def copy_qwen3_next(theirs: nn.Module, ours: LanguageModel) -> None:
    """Their norms but the gated one scale by 1 + weight; their projections go head by head."""
    base: Any = theirs.base_model
    ours.embedding.weight.copy_(theirs.get_input_embeddings().weight)
    left = iter(ours.layers)
    for layer in base.layers:
        mixer, ffn = next(left), next(left)
        mixer.norm.weight.copy_(layer.input_layernorm.weight)
        mixer.operator.load_state_dict(gated_deltanet_weights(layer.linear_attn))
        ffn.norm.weight.copy_(layer.post_attention_layernorm.weight)
        gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        ffn.operator.gate_up_proj.weight.copy_(gate_up)
        ffn.operator.down_proj.weight.copy_(layer.mlp.down_proj.weight)
    ours.norm.weight.copy_(base.norm.weight)
    for module in (*ours.layers, ours):
        module.norm.weight.add_(1.0)


def gated_deltanet_weights(theirs: Any) -> dict[str, Tensor]:
    weights = theirs.state_dict()
    heads = theirs.num_k_heads
    sizes = [HEAD_DIM, HEAD_DIM, 2 * HEAD_DIM, 2 * HEAD_DIM]

    def by_part(weight: Tensor, sizes: list[int]) -> Tensor:
        parts = weight.unflatten(0, (heads, -1)).split(sizes, dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    return {
        "in_proj.weight": by_part(weights["in_proj_qkvz.weight"], sizes),
        "beta_decay_proj.weight": by_part(weights["in_proj_ba.weight"], [1, 1]),
        "convolution.weight": weights["conv1d.weight"],
        "A_log": weights["A_log"],
        "dt_bias": weights["dt_bias"],
        "o_norm.weight": weights["norm.weight"],
        "o_proj.weight": weights["out_proj.weight"],
    }


FAMILIES = {
    "attention": Family([f"{ATTENTION} {FFN}"] * 4, chunk_sizes=()),
    "mamba2": Family([MAMBA2] * 8),
    "gated_deltanet": Family([f"{GATED_DELTANET} {FFN}"] * 4, to_qwen3_next),
    "hybrid": Family(hybrid(4, every=4)),
}


def their_loss(theirs: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As their own, which would shift the tokens itself."""
    tokens = batch["tokens"]
    logits = theirs(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def check_alike(theirs: nn.Module, ours: LanguageModel, batch: dict[str, Tensor]) -> None:
    """Raise AssertionError unless parameters are as many, and losses and gradients are the same."""
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
    assert counts[0] == counts[1], f"{counts[0]} parameters, ours has {counts[1]}"
    losses = their_loss(theirs, batch), next_token_loss(ours, batch)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    embeddings = theirs.get_input_embeddings().weight, ours.embedding.weight
    expected, actual = (
        torch.autograd.grad(loss, weight)[0]
        for loss, weight in zip(losses, embeddings, strict=True)
    )
    error = (actual - expected).norm() / expected.norm()
    assert error < 1e-4, f"the gradients of the embedding differ by {error:.1e}"


def make_step(
    model: nn.Module, loss: Callable[[], Tensor], dtype: Precision
) -> Callable[[], object]:
    """One step of training."""
    device = next(model.parameters()).device
    # Weights hardly move: what is timed does not depend on how far training got.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)

    def step() -> None:
        with autocast(device, dtype):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def set_chunk_size(theirs: nn.Module, size: int) -> None:
    for module in theirs.modules():
        if hasattr(module, "chunk_size"):
            module.chunk_size = size


def make_gemms(ours: LanguageModel, dtype: Precision) -> Callable[[], object]:
    """The products of a step with the weights of linear maps and of the head."""
    device = ours.embedding.weight.device
    maps = [module.weight for module in ours.modules() if isinstance(module, nn.Linear)]
    operands = []
    for weight in (*maps, ours.head_weight):
        shapes = weight.shape, (STEP_TOKENS, weight.shape[1]), (STEP_TOKENS, weight.shape[0])
        operands.append([torch.randn(shape, device=device) for shape in shapes])
    if dtype == "bfloat16":
        operands = [[x.bfloat16() for x in each] for each in operands]

    def run() -> None:
        for weight, x, dy in operands:
            torch.mm(x, weight.T)
            torch.mm(dy, weight)
            torch.mm(dy.T, x)

    return run


def make_batches(num_tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same tokens as one document per row, and as several that begin anywhere."""
    generator = torch.Generator().manual_seed(0)
    rows = STEP_TOKENS // num_tokens
    # Bamba takes token 0 for padding, which is zero and has no gradient.
    tokens = torch.randint(1, VOCAB_SIZE, (rows, num_tokens + 1), generator=generator)
    draws = torch.rand(rows, num_tokens, generator=generator)
    # The first document of a row is one that begins before it.
    begins = draws < (DOCUMENTS_PER_ROW - 1) / num_tokens
    whole = {"tokens": tokens, "documents": torch.zeros(rows, num_tokens, dtype=torch.int64)}
    return whole, whole | {"documents": begins.cumsum(1)}


def fastest_chunk_size(
    theirs: nn.Module, step: Callable[[], object], sizes: tuple[int, ...], device: Device
) -> int:
    """The size at which the fastest of a few steps is the fastest."""
    best = {}
    with quiet(device):
        for size in sizes:
            set_chunk_size(theirs, size)
            step()
            best[size] = min(time_call(step, device).ms for _ in range(CHOOSING_STEPS))
    return min(sizes, key=lambda size: best[size])


def compare(
    family: Family, shape: str, dtype: Precision, device: Device, protocol: Protocol
) -> dict[str, Any]:
    """Ours, theirs and the bare products, in turn."""
    width, num_tokens = SHAPES[shape]
    architecture = family.architecture(width)
    torch.manual_seed(0)
    ours = LanguageModel(architecture).train()
    theirs = family.theirs(ours).train()
    whole, packed = make_batches(num_tokens)
    check_alike(theirs, ours, whole)

    our_step = make_step(ours, lambda: next_token_loss(ours, whole), dtype)
    packed_step = make_step(ours, lambda: next_token_loss(ours, packed), dtype)
    their_step = make_step(theirs, lambda: their_loss(theirs, whole), dtype)
    chunk_size = None
    if family.chunk_sizes:
        chunk_size = fastest_chunk_size(theirs, their_step, family.chunk_sizes, device)
        set_chunk_size(theirs, chunk_size)
    timing = measure_interleaved(
        {
            "ours": our_step,
            "theirs": their_step,
            "packed": packed_step,
            "gemm": make_gemms(ours, dtype),
        },
        device,
        protocol,
        derive=lambda samples: {
            "ratio": samples["theirs"] / samples["ours"],
            "packed": samples["ours"] / samples["packed"],
            "gemm": samples["gemm"] / samples["ours"],
        },
    )
    measured = timing.measurements
    medians = {name: float(np.median(ms)) for name, ms in timing.samples.items()}
    return {
        "parameters": architecture.parameters(),
        "ratio": round(measured["ratio"].median_ms, 3),
        "ratio_interval": [round(measured["ratio"].low_ms, 3), round(measured["ratio"].high_ms, 3)],
        "rounds": measured["ratio"].n,
        "quiet": timing.quiet,
        "tokens_per_s": round(1000 * STEP_TOKENS / medians["ours"]),
        "theirs_tokens_per_s": round(1000 * STEP_TOKENS / medians["theirs"]),
        "theirs_chunk_size": chunk_size,
        "gemm_fraction": round(measured["gemm"].median_ms, 3),
        "packed_ratio": round(measured["packed"].median_ms, 3),
    }


def main() -> None:
    arguments = parse_arguments()
    without_their_kernels()
    device = Device.current(threads=arguments.threads, kind="cpu")
    protocol = Protocol(
        max_seconds=arguments.seconds,
        max_rounds=arguments.repeats,
        max_interval_percent=1.0,
        max_repeats=0,
        warmup_rounds=1,
    )
    meter = CpuMeter()
    found: dict[str, dict[str, Any]] = {}
    for model in arguments.models:
        for shape in arguments.shapes:
            for dtype in arguments.dtypes:
                name = f"{model}_{shape}_{dtype}"
                row = compare(FAMILIES[model], shape, dtype, device, protocol)
                console.print(f"{name}: {row['tokens_per_s']} tokens/s, ratio {row['ratio']}")
                found[name] = row
    print_results(found)
    figures = ("ratio", "tokens_per_s", "gemm_fraction")
    environment = {
        **device.describe(),
        "transformers_version": version("transformers"),
        "shapes": {
            shape: {"width": width, "rows": STEP_TOKENS // tokens, "row_tokens": tokens}
            for shape, (width, tokens) in SHAPES.items()
        },
        "vocab_size": VOCAB_SIZE,
        "layers": {model: " ".join(FAMILIES[model].layers) for model in arguments.models},
        "documents_per_packed_row": DOCUMENTS_PER_ROW,
        "figures": found,
        "other_cpus_busy": round(meter.others_busy(), 2),
    }
    results = {name: {figure: row[figure] for figure in figures} for name, row in found.items()}
    report = {"benchmark": "training", "results": results, "environment": environment}
    print(json.dumps(report, ensure_ascii=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=15, help="most rounds, at least 6")
    parser.add_argument("--seconds", type=float, default=120.0, help="most time for them")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    return parser.parse_args()


def print_results(found: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"steps of {STEP_TOKENS:,} tokens, in tokens per second")
    columns = ("model", "parameters", "ours", "theirs", "ratio", "95 %", "products", "packed")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in found.items():
        low, high = row["ratio_interval"]
        table.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['tokens_per_s']:,}",
            f"{row['theirs_tokens_per_s']:,}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} – {high:.2f}",
            f"{row['gemm_fraction']:.2f}",
            f"{row['packed_ratio']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
