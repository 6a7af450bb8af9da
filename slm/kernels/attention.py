"""Softmax attention over keys that carry their positions, and rotary embeddings.

Letters: B rows, T queries, N keys, H query heads, G key-value heads, K head size.
q [B, T, H, K]; k, v [B, N, G, K]. A position of −1 marks an empty place.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.kernels.chunking import accumulation_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention [B, T, H, K]; `visible` [B|1, T, N] bool, None for plain causal."""
    mask = None if visible is None else visible.unsqueeze(1)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def attention_step(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """One query per row, q [B, H, K], over k, v [B, N, G, K]; `visible` [B, N] or None for all."""
    mask = None if visible is None else visible[:, None, None]
    y = F.scaled_dot_product_attention(
        q.unsqueeze(2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[1] != k.shape[2],
    )
    return y.squeeze(2)


def visible_keys(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """[B|1, T, N] bool: causal, and not further back than `window` tokens, itself included."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    visible = (distance >= 0) & (key_positions >= 0).unsqueeze(-2)
    return visible if window is None else visible & (distance < window)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (Su et al. 2021), rotate-half form: x [..., H, K], positions [...]."""
    frequencies = _frequencies(x.shape[-1], theta, x.device)
    angles = positions[..., None, None] * frequencies  # [..., 1, K / 2]
    cos, sin = angles.cos(), angles.sin()
    left, right = x.to(accumulation_dtype(x)).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    # Not a module buffer: those are garbage after initialisation on the meta device.
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return theta**-exponents
