"""The gate of a feed-forward network (Shazeer 2020), with a backward pass without copies.

    y = silu(gate) · up

Letters: I hidden channels. gate_up [..., 2 I]: gate, then up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate_up: Tensor) -> Tensor:
    """y [..., I]."""
    if torch.is_grad_enabled() and gate_up.device.type == "cpu":
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only, and writes the gradients of both halves where they belong."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """See `swiglu`."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """Of gate and up."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_up)
        d_gate, d_up = gradient.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return gradient
