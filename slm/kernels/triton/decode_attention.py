"""Attention of one query per row that costs what has been stored, not what could be (CUDA).

The number of stored places is read on the device, so one captured step serves every length. The
places of a row are shared out among programs (split keys and values, as in Flash-Decoding, Dao et
al. 2023), for one row alone would keep one multiprocessor busy.

Letters: B rows, H query heads, G key-value heads, R = H / G query heads per key-value head, N
places, K head size, S shares.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs per multiprocessor: enough that loads overlap.
PROGRAMS_PER_PROCESSOR = 4
# Places read at once.
BLOCK_PLACES = 64


@triton.jit
def _attend_share(  # type: ignore[no-untyped-def]
    q,  # [B, H, K], contiguous
    k,  # [B, N, G, K]
    v,  # [B, N, G, K]
    lengths,  # [B]
    sums,  # [B, G, S, R, K] fp32: weighted values
    totals,  # [B, G, S, R] fp32: of the weights
    largest,  # [B, G, S, R] fp32: score that weights are relative to
    scale,
    num_places,
    row_stride,
    place_stride,
    head_stride,
    G: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    R_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One share of one row's places, for the query heads of one key-value head."""
    group, share = tl.program_id(0), tl.program_id(1)
    row, head = group // G, group % G
    r, c = tl.arange(0, R_PADDED), tl.arange(0, K_PADDED)
    is_query = (r < R)[:, None] & (c < K)[None, :]
    query_at = (group * R + r)[:, None] * K + c[None, :]
    query = tl.load(q + query_at, mask=is_query, other=0.0)

    length = tl.minimum(tl.load(lengths + row), num_places).to(tl.int32)
    blocks = tl.cdiv(length, BLOCK)
    blocks_each = tl.cdiv(blocks, S)
    begin = share * blocks_each * BLOCK
    end = tl.minimum(begin + blocks_each * BLOCK, length)

    best = tl.full([R_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([R_PADDED], tl.float32)
    acc = tl.zeros([R_PADDED, K_PADDED], tl.float32)
    base = row.to(tl.int64) * row_stride + head * head_stride
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        is_stored = place < end
        at = base + place.to(tl.int64)[:, None] * place_stride + c[None, :]
        mask = is_stored[:, None] & (c < K)[None, :]
        keys = tl.load(k + at, mask=mask, other=0.0)
        scores = scale * tl.dot(query, tl.trans(keys), input_precision="ieee")  # [R, BLOCK]
        scores = tl.where(is_stored[None, :], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_best[:, None])
        shrink = tl.exp(best - new_best)
        values = tl.load(v + at, mask=mask, other=0.0)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        best = new_best

    out = (group * S + share) * R + r
    tl.store(sums + out[:, None] * K + c[None, :], acc, mask=is_query)
    tl.store(totals + out, total, mask=r < R)
    tl.store(largest + out, best, mask=r < R)


def num_shares(k: Tensor) -> int:
    """S: programs that share the places of a row and head of k [B, N, G, K]."""
    processors = torch.cuda.get_device_properties(k.device).multi_processor_count
    programs = PROGRAMS_PER_PROCESSOR * processors // (k.shape[0] * k.shape[2])
    return max(1, programs)


def attend_shares(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, shares: int, kernel: Any = _attend_share
) -> Tensor:
    """As `decode_attention`; `kernel` may be wrapped for tracing."""
    (batch_size, heads, size), (num_places, groups) = q.shape, k.shape[1:3]
    assert k.stride() == v.stride()
    assert k.stride(3) == 1
    repeats = heads // groups
    sums = q.new_empty((batch_size, groups, shares, repeats, size), dtype=torch.float32)
    totals, largest = (
        q.new_empty((batch_size, groups, shares, repeats), dtype=torch.float32) for _ in range(2)
    )
    kernel[(batch_size * groups, shares)](
        q.contiguous(),
        k,
        v,
        lengths,
        sums,
        totals,
        largest,
        size**-0.5,
        num_places,
        *k.stride()[:3],
        G=groups,
        S=shares,
        R=repeats,
        K=size,
        # A product of matrices takes sixteen at least.
        R_PADDED=max(16, triton.next_power_of_2(repeats)),
        K_PADDED=max(16, triton.next_power_of_2(size)),
        BLOCK=BLOCK_PLACES,
    )
    # A share with no places has −∞ and weighs nothing.
    weights = (largest - largest.amax(2, keepdim=True)).exp()  # [B, G, S, R]
    y = (sums * weights.unsqueeze(-1)).sum(2) / (totals * weights).sum(2).unsqueeze(-1)
    return y.flatten(1, 2).to(q.dtype)


@torch.library.triton_op("slm::decode_attention", mutates_args={})
def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """y [B, H, K] of q [B, H, K] over the first lengths [B] places of k, v [B, N, G, K].

    Every row has at least one place. Lengths above N mean all of them.
    """
    kernel = torch.library.wrap_triton(_attend_share)
    return attend_shares(q, k, v, lengths, num_shares(k), kernel)
