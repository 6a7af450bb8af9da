"""Kimi Delta Attention: the delta rule on a memory whose every key channel decays at its own rate.

    S'_t = diag(exp(g_t)) S_{t-1}
    S_t = S'_t + k_t ⊗ β_t (v_t − S'_tᵀ k_t),    o_t = S_tᵀ q_t / √K

Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture".

Letters: B rows, T tokens, H heads, K key size, V value size, C chunks, L tokens per chunk.
q, k [B, T, H, K], k of unit length; v [B, T, H, V]; g [B, T, H, K], <= 0; beta [B, T, H];
states [B|1, H, K, V].
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
from slm.kernels.triangular import solve_unit_lower

FLA = "ops.kda.chunk_kda"


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By fla on CUDA, by chunks elsewhere. Each of `documents` begins with `start`.

    Returns (o [B, T, H, V], the state after each row's last token).
    """
    run = fla_kda if use_fla("kda", q, FLA) else chunk_kda
    return run(q, k, v, g, beta, start, documents)


@at_least_fp32
def recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, V], final state)."""
    state = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


@at_least_fp32
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, as `chunk_delta_rule`, with each channel's decay in the products."""
    initial = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    chunks = Chunks(q.shape[1], chunk_size, documents, q.device)
    q, k, v, g = (chunks.split(x) for x in (q * q.shape[-1] ** -0.5, k, v, g))
    beta = chunks.split(beta[..., None])

    decay = g.cumsum(dim=-2)  # [C, B, H, L, K], from the chunk's first token on
    since_begin = chunks.since_begin(decay, decay - g).exp()
    beta_k = beta * k
    queries, column = torch.stack([q, beta_k], dim=-2), decay.unsqueeze(-2)
    products = decayed_products(
        queries, column.expand_as(queries), k.unsqueeze(-2), column
    ).squeeze(-1)
    scores, system = products.masked_fill(~chunks.visible.unsqueeze(-2), 0.0).unbind(-2)
    corrected = solve_unit_lower(system, torch.cat([beta * v, beta_k * since_begin], dim=-1))
    U, W = corrected.split([v.shape[-1], k.shape[-1]], dim=-1)
    keys = chunks.only_last(k * (decay[..., -1:, :] - decay).exp())
    decays = since_begin[..., -1, :].unsqueeze(-1)
    written, states, final = chunks.correct(decays, U, W, keys, None, initial)

    # Between a token and itself nothing decays.
    own = (q * k).sum(-1, keepdim=True) * written
    read = chunks.read(q * since_begin, states, initial)
    return chunks.join(read + scores @ written + own), final


def fla_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By the Triton kernels of fla."""
    q, k, beta = q.to(v.dtype), k.to(v.dtype), beta.to(v.dtype)
    inputs = {"q": q, "k": k, "v": v, "g": g.float(), "beta": beta}
    return run_fla(fla_function(FLA), inputs, start, documents)


@at_least_fp32
def kda_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """One token: q, k, g [B, H, K], v [B, H, V], beta [B, H]. Updates state in place; o as v."""
    state *= g.exp().unsqueeze(-1)
    error = v - (k.unsqueeze(-2) @ state).squeeze(-2)
    state += k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2) * q.shape[-1] ** -0.5
