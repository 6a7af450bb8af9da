"""FLOPs of training against torch's own count and the textbook's formula; MFU."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.training.throughput import mfu, peak_flops, training_flops_per_token

BATCH_SIZE, NUM_TOKENS = 2, 32


def architecture_of(operators: str, meta_tokens: int = 0) -> Architecture:
    return Architecture.parse(f"width=32 vocab_size=50 meta_tokens={meta_tokens} | {operators}")


def torchs_count(architecture: Architecture) -> tuple[float, dict[str, float]]:
    """FLOPs per token as torch counts them, forward and backward; and forward by module."""
    model = LanguageModel(architecture)
    tokens = torch.zeros(BATCH_SIZE, NUM_TOKENS, dtype=torch.int64)
    # Torch counts attention only where it is made of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(tokens)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    counts = forward.get_flop_counts().items()
    return total / tokens.numel(), {
        name.removeprefix("LanguageModel."): sum(flops.values()) / tokens.numel()
        for name, flops in counts
    }


@pytest.mark.parametrize(
    "operators",
    ["attention(head_dim=16,query_groups=2)", "ffn", "attention(head_dim=8) ffn(ratio=2.0)"],
)
def test_the_sum_over_operators_is_torchs_count(operators: str) -> None:
    architecture = architecture_of(operators)
    total, _ = torchs_count(architecture)
    assert training_flops_per_token(architecture, NUM_TOKENS, causal=False) == total


# FLOPs of a token in the forward pass that are no linear map's, at width 32 and 32 tokens: scores
# and sums of attention; convolution, and what decays, writes and reads the state.
CORES = {
    "attention(head_dim=16)": 4 * 32 * 32,
    "ffn": 0,
    "mamba2(head_dim=16,state_size=8)": 2 * 4 * (64 + 2 * 8) + 5 * 64 * 8,
    "deltanet(head_dim=16)": 2 * 4 * 96 + 6 * 32 * 16,
}


@pytest.mark.parametrize(("operator", "core"), CORES.items())
def test_linear_maps_are_counted_as_torch_does_and_cores_besides(operator: str, core: int) -> None:
    architecture = architecture_of(operator)
    _, by_module = torchs_count(architecture)
    linear_maps = [
        name
        for name, module in LanguageModel(architecture).named_modules()
        if isinstance(module, nn.Linear)
    ]
    forward = sum(by_module[name] for name in linear_maps) + core + 2 * 50 * 32
    assert training_flops_per_token(architecture, NUM_TOKENS, causal=False) == 3 * forward


def test_of_attention_and_ffn_it_is_the_textbooks_formula() -> None:
    architecture = architecture_of("attention(head_dim=8) ffn attention(head_dim=8) ffn")
    norms = 5 * 32
    weights = architecture.parameters() - norms
    layers, heads, head_dim = 2, 4, 8
    full = training_flops_per_token(architecture, 512, causal=False)
    assert full == 6 * weights + 12 * layers * heads * head_dim * 512
    # On average a token sees half the row, and itself.
    causal = training_flops_per_token(architecture, 512, causal=True)
    assert causal == 6 * weights + 12 * layers * heads * head_dim * (512 + 1) / 2


def test_meta_tokens_are_seen_by_all() -> None:
    """As if the row were longer, in what attention costs alone."""
    without, with_meta = (architecture_of("attention(head_dim=8)", meta) for meta in (0, 8))
    for causal in (False, True):
        more = training_flops_per_token(with_meta, 16, causal=causal)
        less = training_flops_per_token(without, 16, causal=causal)
        assert more - less == 3 * 4 * 32 * 8


def test_windows_show_no_more_than_they_do() -> None:
    window, full = (architecture_of(f"attention(head_dim=8{text})") for text in (",window=4", ""))
    projections = 3 * (2 * 50 * 32 + 2 * 4 * 32 * 32)
    per_seen = 3 * 4 * 32
    assert training_flops_per_token(window, 16, causal=False) == projections + per_seen * 4
    # 1, 2, 3, then 4 for the rest.
    mean = (1 + 2 + 3 + 13 * 4) / 16
    assert training_flops_per_token(window, 16, causal=True) == projections + per_seen * mean
    # A window as long as the row hides nothing.
    for causal in (False, True):
        assert training_flops_per_token(window, 4, causal=causal) == training_flops_per_token(
            full, 4, causal=causal
        )


@pytest.mark.parametrize("operators", ["ffn", "mamba2(head_dim=16)", "deltanet(head_dim=16)"])
def test_what_sees_no_context_costs_the_same_in_both(operators: str) -> None:
    architecture = architecture_of(operators)
    full, causal = (
        training_flops_per_token(architecture, 100, causal=causal) for causal in (False, True)
    )
    assert causal == pytest.approx(full, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "bfloat16", "tf32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("Intel(R) Xeon(R)", None, None),
        ("", None, None),
    ],
)
def test_peaks_are_of_exactly_the_device_named(
    name: str, bfloat16: float | None, tf32: float | None
) -> None:
    assert peak_flops(name, bfloat16=True) == bfloat16
    assert peak_flops(name, bfloat16=False) == tf32


def test_mfu() -> None:
    assert mfu(6e9, 50_000, 989.4e12) == pytest.approx(0.3032, abs=1e-4)
    assert mfu(6e9, 50_000, None) is None
