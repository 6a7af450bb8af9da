"""Which number format a device computes in; weights always stay in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def uses_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether to compute in bfloat16; 'auto' does so where the device has instructions for it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Context in which matrix products on `device` are computed as `precision` says."""
    if uses_bfloat16(device, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
