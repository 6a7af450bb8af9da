"""Many small unit lower triangular systems, solved with products of matrices.

LAPACK solves one system after the other, which on a CPU is ten times slower than the products that
the same number of operations would allow; nor does a GPU like it.

Letters: L unknowns, a power of two; D right-hand sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def solve_unit_lower(A: Tensor, B: Tensor) -> Tensor:
    """X [..., L, D] with (I + A) X = B; only what lies below A's diagonal [..., L, L] is read."""
    return _SolveUnitLower.apply(A, B)


class _SolveUnitLower(torch.autograd.Function):
    """∂B = (I + A)⁻ᵀ ∂X and ∂A = −∂B Xᵀ: the inverse serves both ways."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        """See `solve_unit_lower`."""
        inverse = invert_unit_lower(A)
        X = inverse @ B
        ctx.save_for_backward(inverse, X)
        return X

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of the strictly lower part of A, and of B."""
        inverse, X = ctx.saved_tensors
        dB = inverse.mT @ gradient
        return (dB @ X.mT).neg_().tril_(-1), dB


def invert_unit_lower(A: Tensor) -> Tensor:
    """(I + A)⁻¹ [..., L, L] of what lies below A's diagonal.

    Blocks of twice the size at every turn: the inverse of [[P, 0], [Q, R]] is
    [[P⁻¹, 0], [−R⁻¹ Q P⁻¹, R⁻¹]]. It is block forward substitution, and as stable.
    """
    size = A.shape[-1]
    inverse = torch.eye(size, dtype=A.dtype, device=A.device).expand_as(A).contiguous()
    half = 1
    while half < size:
        (upper, _), (corner, lower) = _quarters(inverse, half)
        Q = _quarters(A, half)[1][0]
        corner.copy_(-(lower @ Q) @ upper)
        half *= 2
    return inverse


def _quarters(x: Tensor, half: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Views [..., N, half, half] of the four quarters of every block on the diagonal."""
    blocks = x.unflatten(-2, (-1, 2 * half)).unflatten(-1, (-1, 2 * half))
    blocks = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    (a, b), (c, d) = ((y[..., :half], y[..., half:]) for y in blocks.split(half, dim=-2))
    return (a, b), (c, d)
