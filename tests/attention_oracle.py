"""Attention of one query per row, by torch in fp64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_of_places(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """y [B, H, K] of q [B, H, K] over the first lengths [B] places of k, v [B, N, G, K]."""
    places = torch.arange(k.shape[1], device=k.device)
    return F.scaled_dot_product_attention(
        q.double().unsqueeze(2),
        k.double().transpose(1, 2),
        v.double().transpose(1, 2),
        attn_mask=(places < lengths[:, None])[:, None, None],
        enable_gqa=True,
    ).squeeze(2)
