"""How much of a device training uses: model FLOPs over what its data sheet promises (MFU).

MFU is that of PaLM (Chowdhery et al. 2022, appendix B): FLOPs that the model itself needs, so what
is computed again to save memory does not count. A step is three forward passes: the backward pass
multiplies by each matrix twice, once for the gradient of its input and once for its own.
"""

from __future__ import annotations

import re
from collections import Counter

from slm.architecture import Architecture

# FLOP/s of a GPU's dense matrix products, accumulated in fp32: in bf16, and of fp32 in TF32. Keys
# are patterns of the whole name that torch gives after 'NVIDIA '; a part of a GPU (MIG), a laptop's
# or one that is not here is unknown. Where a data sheet states sparse figures, half of them.
# H100, H200, GH200, A100, A10, A40, L4, L40, L40S: NVIDIA's data sheets. A10G: AWS' g5 page.
# B200: data sheet of the HGX B200. GeForce: appendix of the GA102, AD102 and GB202 white papers.
PEAKS: dict[str, tuple[float, float]] = {
    r"B200": (2250e12, 1125e12),
    r"H200|H100 80GB HBM3|GH200 480GB": (989.4e12, 494.7e12),
    r"H200 NVL|H100 NVL": (835.5e12, 417.5e12),
    r"H100 PCIe": (756e12, 378e12),
    r"A100-(SXM4|SXM|PCIE|PCIe)-\d+GB|A100 \d+GB PCIe": (312e12, 156e12),
    r"A40": (149.7e12, 74.8e12),
    r"A10": (125e12, 62.5e12),
    r"A10G": (70e12, 35e12),
    r"L40S": (362e12, 183e12),
    r"L40": (181e12, 90.5e12),
    r"L4": (121e12, 60e12),
    r"GeForce RTX 5090": (209.5e12, 104.8e12),
    r"GeForce RTX 4090": (165.2e12, 82.6e12),
    r"GeForce RTX 3090": (71e12, 35.6e12),
}


def training_flops_per_token(
    architecture: Architecture, sequence_tokens: int, *, causal: bool
) -> float:
    """Model FLOPs of a training token, forward and backward, in rows of `sequence_tokens` tokens.

    Every row sees the meta tokens as well; what they cost themselves, once per batch, is left out.
    causal: False takes every token as the last of its row, as torchtitan and nanochat do: of
        attention and ffn alone it is 6 N + 12 L H Q T (N weights of matrices, L layers, H heads of
        size Q, T tokens seen). True takes the mean over the row's tokens. Both respect windows, and
        neither the borders of documents within a row.
    """
    last = architecture.meta_tokens + sequence_tokens
    if not causal:
        return 3.0 * architecture.flops_per_token(last)
    contexts = range(architecture.meta_tokens + 1, last + 1)
    mixers = sum(
        count * sum(operator.flops_per_token(architecture.width, seen) for seen in contexts)
        for operator, count in Counter(architecture.operators).items()
    )
    return 3.0 * (architecture.head_flops_per_token() + mixers / sequence_tokens)


def peak_flops(device_name: str, *, bfloat16: bool) -> float | None:
    """FLOP/s that a GPU of this name is sold for, in bf16 or TF32; None where it is not known."""
    name = device_name.removeprefix("NVIDIA ")
    for pattern, (in_bfloat16, in_tf32) in PEAKS.items():
        if re.fullmatch(pattern, name):
            return in_bfloat16 if bfloat16 else in_tf32
    return None


def mfu(flops_per_token: float, tokens_per_s: float, peak: float | None) -> float | None:
    """Share of `peak`, the FLOP/s of all devices together; None where that is unknown."""
    return None if peak is None else flops_per_token * tokens_per_s / peak
