"""Root mean square norm (Zhang and Sennrich 2019) with a backward pass of few passes over memory.

    y = w x / √(mean_d x_d² + ε)

Letters: D channels.
x [..., D]; weight [D]. Computed in at least fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y [..., D] in the dtype of x."""
    if torch.is_grad_enabled() and x.device.type == "cpu":
        # On a CPU torch composes it of elementary steps, each differentiated by itself.
        return _RMSNorm.apply(x, weight, eps)
    # torch's fused kernels want one dtype; it composes the norm of steps for two.
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms(x) and ∂u = w ∂y: ∂x = r ∂u − x r³ mean_d(x ∂u) and ∂w = Σ r x ∂y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `rms_norm`."""
        wide = x.to(accumulation_dtype(x))
        r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and weight."""
        x, weight, r = ctx.saved_tensors
        wide, dy = x.to(r.dtype), dy.to(r.dtype)
        du = dy * weight
        products = du * wide
        shift = products.mean(-1, keepdim=True).mul_(r.pow(3))
        d_weight = torch.mul(dy, wide, out=products).mul_(r).sum_to_size(weight.shape)
        dx = du.mul_(r).addcmul_(wide, shift, value=-1)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None
