"""Matrix products of one token as multiply-and-sum, for the compiler to fuse and vectorise.

A product of a matrix with one vector reads the matrix once and is bound by memory. Libraries are
made for products of matrices: on a CPU their one-token products reach a third of the memory's
speed. Written as a sum, the compiler turns them into one loop over the matrix's rows, along with
what stands around them (norms, gates, states). Of several tokens the library is as fast or faster:
a feed-forward network of width 384 takes 0.25 ms for two either way, for four 0.30 ms by the
library and 0.45 ms as sums.

`DECOMPOSITIONS` rewrites an exported step so.

Letters: B rows, I inputs, O outputs, H query heads, G key-value heads, N places, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm.kernels.precision import accumulation_dtype

aten = torch.ops.aten


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [..., O] of x [..., I] and weight [O, I]; of one row as a sum."""
    if x.numel() == x.shape[-1]:
        wide = accumulation_dtype(x)
        y = (weight.to(wide) * x.flatten().to(wide)).sum(-1).to(x.dtype)
        y = y.expand(*x.shape[:-1], -1)
    else:
        y = (x.flatten(0, -2) @ weight.T).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[B, T, O] of a [B, T, I] and b [B, I, O]; of one token, T or O is one."""
    wide = accumulation_dtype(a)
    return (a.unsqueeze(-1).to(wide) * b.unsqueeze(1).to(wide)).sum(2).to(a.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Softmax attention of one query, q [B, H, 1, K], over k, v [B, G, N, K].

    mask: [B, 1 or H, 1, N], bool. Raises NotImplementedError for what else torch's takes.
    """
    has_other_mask = is_causal or (mask is not None and mask.dtype != torch.bool)
    if q.shape[2] != 1 or dropout or has_other_mask:
        raise NotImplementedError("a step attends with one query, and a mask of bools or none")
    wide = accumulation_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = q.squeeze(2).unflatten(1, (k.shape[1], -1)).to(wide)  # [B, G, H / G, K]
    scores = (heads.unsqueeze(3) * k.unsqueeze(2).to(wide)).sum(-1) * scale  # [B, G, H / G, N]
    if mask is not None:
        visible = mask.squeeze(2).expand(-1, q.shape[1], -1).unflatten(1, heads.shape[1:3])
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    y = (weights.unsqueeze(-1) * v.unsqueeze(2).to(wide)).sum(3)
    return y.flatten(1, 2).unsqueeze(2).to(q.dtype)


DECOMPOSITIONS = {
    aten.linear.default: linear,
    aten.bmm.default: batched_matmul,
    aten.scaled_dot_product_attention.default: attend,
}
