"""Gated linear attention: a matrix memory whose every key channel decays at its own rate.

    S_t = diag(exp(g_t)) S_{t-1} + k_t ⊗ v_t,    o_t = S_tᵀ q_t / √K

Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training".

Letters: B rows, T tokens, H heads, K key size, V value size, C chunks, L tokens per chunk.
q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K], <= 0; states [B|1, H, K, V].
Everything is computed, and the state kept, in at least fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm.kernels.backend import fla_function, run_fla, use_fla
from slm.kernels.chunking import Chunks, initial_state
from slm.kernels.decay import decayed_products
from slm.kernels.documents import Documents
from slm.kernels.precision import at_least_fp32

FLA = "ops.gla.chunk_gla"


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By fla on CUDA, by chunks elsewhere. Each of `documents` begins with `start`.

    Returns (o [B, T, H, V], the state after each row's last token).
    """
    run = fla_gla if use_fla("gla", q, FLA) else chunk_gla
    return run(q, k, v, g, start, documents)


@at_least_fp32
def recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, V], final state)."""
    state = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    outputs = []
    for t in range(q.shape[1]):
        write = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = g[:, t].exp().unsqueeze(-1) * state + write
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


@at_least_fp32
def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: the same result with matrix products inside each chunk."""
    initial = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    chunks = Chunks(q.shape[1], chunk_size, documents, q.device)
    q, k, v, g = (chunks.split(x) for x in (q * q.shape[-1] ** -0.5, k, v, g))

    decay = g.cumsum(dim=-2)  # [C, B, H, L, K], from the chunk's first token on
    since_begin = chunks.since_begin(decay, decay - g)
    rows, columns = (x.unsqueeze(-2) for x in (decay, decay))
    scores = decayed_products(q.unsqueeze(-2), rows, k.unsqueeze(-2), columns).squeeze((-3, -1))
    scores = scores.masked_fill(~chunks.visible, 0.0)

    additions = chunks.only_last(k * (decay[..., -1:, :] - decay).exp()).mT @ v
    decays = since_begin[..., -1, :].exp().unsqueeze(-1)
    states, final = chunks.carry(decays, additions, initial)
    # Between a token and itself nothing decays.
    own = (q * k).sum(-1, keepdim=True) * v
    read = chunks.read(q * since_begin.exp(), states, initial)
    return chunks.join(read + scores @ v + own), final


def fla_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By the Triton kernels of fla."""
    inputs = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "g": g.float()}
    return run_fla(fla_function(FLA), inputs, start, documents)


@at_least_fp32
def gla_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """One token: q, k, g [B, H, K], v [B, H, V]. Updates state in place; o [B, H, V]."""
    state *= g.exp().unsqueeze(-1)
    state += k.unsqueeze(-1) * v.unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2) * q.shape[-1] ** -0.5
