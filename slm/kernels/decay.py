"""Decays between tokens, and products of queries and keys that decay with the tokens between them.

Decays between tokens i and j <= i are exp(a_i − a_j), a being sums of log decays along the tokens:
at most one, while exp(a) and exp(−a) on their own would leave the range of fp32. With one decay per
token, `between` makes a matrix of them. With one for every channel, `decayed_products`:

    P_ij = Σ_k x_ik y_jk exp(a_ik − b_jk)    for j < i, else 0

where a_i <= b_j. There the tokens are halved again and again: between the two halves of a block the
decay passes through the point between them, a_i − b_j = (a_i − m) + (m − b_j), both at most zero,
and a matrix product does the rest. Yang et al. 2023 (GLA) split chunks once for the same reason.

Letters: B rows, T tokens, H heads, C chunks, L tokens per chunk, for decays per channel a power of
two; K channels; R and S vectors per token on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.chunking import Chunks

# A product with less, 4e-31, counts for nothing; and before long with such products a CPU computes
# numbers below the smallest normal one, each of which takes it a hundred times as long.
SMALLEST_LOG = -70.0


def without_first(g: Tensor) -> Tensor:
    """Log decays g [B, T, H] of rows that begin with nothing.

    The first of each finds nothing to make less: its gradient is zero, not rounding.
    """
    return F.pad(g[:, 1:], (0, 0, 1, 0))


class ChunkDecays(NamedTuple):
    """Decays within chunks, [C, B, H, ...].

    sums: [..., L, 1], of log decays from the chunk's first token on. begin: [..., L, 1], from where
    the token's document or the chunk begins. end: [..., L, 1], to the chunk's end, zero for tokens
    of another document than the chunk ends with. old, initial: [..., 1, 1], of the state before
    the chunk and of the initial one in the state after it; no initial without documents.
    """

    sums: Tensor
    begin: Tensor
    end: Tensor
    old: Tensor
    initial: Tensor | None

    @classmethod
    def of(cls, g: Tensor, chunks: Chunks) -> ChunkDecays:
        """Of log decays g [B, T, H]."""
        g = chunks.split(g.unsqueeze(-1))
        sums = g.cumsum(dim=-2)
        begin = as_decay(chunks.since_begin(sums, sums - g))
        end = chunks.only_last(as_decay(sums[..., -1:, :] - sums))
        old = begin[..., -1:, :]
        if chunks.fresh is None:
            return cls(sums, begin, end, old, None)
        opens = chunks.fresh[..., -1:, :]
        return cls(sums, begin, end, old.masked_fill(opens, 0.0), old.masked_fill(~opens, 0.0))

    def gradient(self, d_sums: Tensor, ends: Tensor, chunks: Chunks) -> Tensor:
        """∂g [B, T, H]: Σ ∂a from each token to where its document or chunk ends, and ⟨S, ∂S⟩.

        d_sums: [C, B, H, L, 1], of the sums of log decays a. ends: [C, B, H, 1, 1], ⟨S, ∂S⟩ of the
        state S after the chunk, which has met all decays of the document that the chunk ends with.
        """
        visible = chunks.visible.squeeze(2).to(d_sums.dtype)
        later = (d_sums.squeeze(-1) @ visible).unsqueeze(-1)
        return chunks.join(later + chunks.only_last(ends.expand_as(d_sums))).squeeze(-1)


def between(a: Tensor, visible: Tensor) -> Tensor:
    """exp(a_i − a_j) [..., L, L], zero where j is not visible to i."""
    return as_decay((a - a.mT).masked_fill_(~visible, -torch.inf))


def as_decay(log: Tensor) -> Tensor:
    """exp(log), and zero below SMALLEST_LOG."""
    return F.threshold(log, SMALLEST_LOG, -torch.inf).exp_()


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
    return as_decay(_late(a, half) - middle), as_decay(middle - early)


def _corner(products: Tensor, half: int) -> Tensor:
    """The view [..., N, half, R, half, S] of [..., L, R, L, S]: second halves by first ones."""
    blocks = products.unflatten(-4, (-1, 2, half)).unflatten(-2, (-1, 2, half))
    corners = blocks.select(-7, 1).select(-3, 0)  # [..., N, half, R, N, half, S]
    return corners.diagonal(dim1=-6, dim2=-3).movedim(-1, -5)
