"""Products of queries and keys that decay with the tokens between them.

With one decay per token, `gated_products`:

    P_ij = Σ_k x_ik y_jk exp(a_i − a_j)    where j is visible to i, else 0

With one for every channel, `decayed_products`:

    P_ij = Σ_k x_ik y_jk exp(a_ik − b_jk)    for j < i, else 0

a and b are sums of log decays along the tokens, so a_i <= b_j wherever j < i and the exponential is
at most one; exp(a) and exp(−b) on their own would leave the range of fp32. Therefore the tokens are
halved again and again: between the two halves of a block the decay passes through the point between
them, a_i − b_j = (a_i − m) + (m − b_j), both at most zero, and a matrix product does the rest.
Yang et al. 2023 (GLA) split chunks once for the same reason.

Letters: L tokens, for decays per channel a power of two; K channels; R and S vectors per token on
either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated_products(
    xs: tuple[Tensor, ...], y: Tensor, a: Tensor, visible: Tensor
) -> tuple[Tensor, ...]:
    """P [..., L, L] of each x [..., L, K] with y [..., L, K] and a [..., L, 1].

    visible: bool, broadcast to [..., L, L].
    """
    return _GatedProducts.apply(y, a, visible, *xs)


class _GatedProducts(torch.autograd.Function):
    """∂a follows from P ∂P, so neither the decays nor the bare products have to be kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, a: Tensor, visible: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        """See `gated_products`."""
        decay = between(a, visible)
        products = tuple((x @ y.mT) * decay for x in xs)
        ctx.save_for_backward(y, a, visible, *xs, *products)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of y, a, and every x."""
        y, a, visible, *saved = ctx.saved_tensors
        xs, products = saved[: len(gradients)], saved[len(gradients) :]
        decay = between(a, visible)
        da, dy, dxs = torch.zeros_like(a), torch.zeros_like(y), []
        for x, product, gradient in zip(xs, products, gradients, strict=True):
            weighted = gradient * product
            da += weighted.sum(-1, keepdim=True)
            da -= weighted.sum(-2).unsqueeze(-1)
            bare = torch.mul(gradient, decay, out=weighted)
            bare = bare.sum_to_size(*x.shape[:-1], y.shape[-2])
            dxs.append(bare @ y)
            dy += bare.mT @ x
        return dy, da, None, *dxs


def between(a: Tensor, visible: Tensor) -> Tensor:
    """exp(a_i − a_j) [..., L, L], zero where j is not visible to i."""
    return (a - a.mT).masked_fill_(~visible, -torch.inf).exp_()


def decayed_products(x: Tensor, a: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """P [..., L, R, L, S] of x and a [..., L, R, K], y [..., L, S, K] and b [..., L, 1, K]."""
    return _DecayedProducts.apply(x, a, y, b)


class _DecayedProducts(torch.autograd.Function):
    """Keeps its inputs only: what stands between is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, y: Tensor, b: Tensor) -> Tensor:
        """See `decayed_products`."""
        ctx.save_for_backward(x, a, y, b)
        products = x.new_zeros(*x.shape[:-1], *y.shape[-3:-1])
        for half in _halves(x.shape[-3]):
            later, earlier = _decays(a, b, half)
            late = (_late(x, half) * later).flatten(-3, -2)
            early = (_early(y, half) * earlier).flatten(-3, -2)
            corner = _corner(products, half)
            corner.copy_((late @ early.mT).view(corner.shape))
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """The decays' gradients follow from those of what they multiply: x ∂x and −y ∂y."""
        x, a, y, b = ctx.saved_tensors
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for half in _halves(x.shape[-3]):
            later, earlier = _decays(a, b, half)
            late, early = _late(x, half) * later, _early(y, half) * earlier
            corner = _corner(gradient, half).flatten(-4, -3).flatten(-2, -1)
            _late(dx, half).add_((corner @ early.flatten(-3, -2)).view_as(late) * later)
            _early(dy, half).add_((corner.mT @ late.flatten(-3, -2)).view_as(early) * earlier)
        return dx, x * dx, dy, -(y * dy).sum(-2, keepdim=True)


def _halves(num_tokens: int) -> Iterator[int]:
    """L / 2, L / 4, … 1."""
    half = num_tokens // 2
    while half:
        yield half
        half //= 2


def _late(x: Tensor, half: int) -> Tensor:
    """The second half [..., N, half, R, K] of every block of x [..., L, R, K]."""
    return x.unflatten(-3, (-1, 2, half)).select(-4, 1)


def _early(x: Tensor, half: int) -> Tensor:
    """The first half [..., N, half, R, K] of every block of x [..., L, R, K]."""
    return x.unflatten(-3, (-1, 2, half)).select(-4, 0)


def _decays(a: Tensor, b: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """exp(a − m) of the second halves and exp(m − b) of the first, m being b between them."""
    early = _early(b, half)
    middle = early[..., -1:, :, :]
    return (_late(a, half) - middle).exp_(), (middle - early).exp_()


def _corner(products: Tensor, half: int) -> Tensor:
    """The view [..., N, half, R, half, S] of [..., L, R, L, S]: second halves by first ones."""
    blocks = products.unflatten(-4, (-1, 2, half)).unflatten(-2, (-1, 2, half))
    corners = blocks.select(-7, 1).select(-3, 0)  # [..., N, half, R, N, half, S]
    return corners.diagonal(dim1=-6, dim2=-3).movedim(-1, -5)
