"""Attention of one query per row, at the speed of the memory that keys and values lie in (CPU).

In a compiled step it is `decode_attention.cpp`: what the compiler makes of torch's operations takes
three to four times as long. On CUDA it is `slm.kernels.triton.decode_attention`.

Letters: B rows, H query heads, G key-value heads, N places, K head size.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)


def attend_places(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """y [B, H, K] of q [B, H, K] over the first `lengths` [B] places of k, v [B, N, G, K].

    None: all of them.
    """
    mask = None
    if lengths is not None:
        places = torch.arange(k.shape[1], device=k.device)
        mask = (places < lengths[:, None])[:, None, None]
    y = F.scaled_dot_product_attention(
        q.unsqueeze(2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[1] != k.shape[2],
    )
    return y.squeeze(2)


@torch.library.custom_op("slm::decode_attention_cpu", mutates_args=())
def decode_attention_cpu(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, threads: int) -> Tensor:
    """`attend_places` as the kernel computes it: y in fp32.

    q is fp32 and contiguous, keys and values are fp32 or bf16. Every row has at least one place;
    lengths above N mean all of them.
    """
    return attend_places(q, k.float(), v.float(), lengths).contiguous()


@decode_attention_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, threads: int) -> Tensor:
    return q.new_empty(q.shape)
