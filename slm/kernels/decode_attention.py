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


@torch.library.custom_op("slm::decode_attention_cpu", mutates_args=())
def decode_attention_cpu(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, threads: int) -> Tensor:
    """y [B, H, K] fp32 of q [B, H, K] over the first lengths [B] places of k, v [B, N, G, K].

    q is fp32 and contiguous, keys and values are fp32 or bf16. Every row has at least one place;
    lengths above N mean all of them. This is what the kernel computes.
    """
    visible = torch.arange(k.shape[1]) < lengths[:, None]
    y = F.scaled_dot_product_attention(
        q.unsqueeze(2),
        k.float().transpose(1, 2),
        v.float().transpose(1, 2),
        attn_mask=visible[:, None, None],
        enable_gqa=q.shape[1] != k.shape[2],
    )
    return y.squeeze(2).contiguous()


@decode_attention_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, threads: int) -> Tensor:
    return q.new_empty(q.shape)
