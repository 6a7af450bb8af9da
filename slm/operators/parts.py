"""What several operators share.

Letters: K head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slm.kernels.norm import rms_norm
from slm.kernels.precision import accumulation_dtype


class RMSNorm(nn.RMSNorm):
    """torch's module, of one axis, by the kernel `rms_norm`."""

    weight: nn.Parameter
    eps: float

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last axis of x [..., D]."""
        return rms_norm(x, self.weight, self.eps)


def unit(x: Tensor) -> Tensor:
    """x [..., K] scaled to unit length, in at least fp32."""
    x = x.to(accumulation_dtype(x))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@torch.no_grad()
def reset_step_sizes(bias: Tensor) -> None:
    """Set `bias`, in place, so that softplus(bias) is log-uniform in [0.001, 0.1].

    Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces".
    """
    dt = bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
    # The inverse of softplus.
    dt.add_(torch.log(-torch.expm1(-dt)))


def no_tail(matrix: Tensor) -> Tensor:
    """The empty tail of a mixer without a convolution, for as many rows as `matrix` has."""
    return matrix.new_empty(matrix.shape[0], 0, 0)
