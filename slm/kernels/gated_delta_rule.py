"""The gated delta rule: the delta rule on a memory that decays, one rate per head and token.

    S_t = exp(g_t) S_{t-1} + k_t ⊗ β_t (v_t − exp(g_t) S_{t-1}ᵀ k_t),    o_t = S_tᵀ q_t / √K

Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks".

Letters: B rows, T tokens, H heads, K key size, V value size, C chunks, L tokens per chunk.
q, k [B, T, H, K], k of unit length; v [B, T, H, V]; g [B, T, H], <= 0; beta [B, T, H];
states [B|1, H, K, V].
Everything is computed, and the state kept, in at least fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm.kernels.backend import fla_function, run_fla, use_fla
from slm.kernels.chunking import Chunks, initial_state
from slm.kernels.decay import gated_products
from slm.kernels.documents import Documents
from slm.kernels.precision import at_least_fp32
from slm.kernels.triangular import solve_unit_lower

FLA = "ops.gated_delta_rule.chunk_gated_delta_rule"


def gated_delta_rule(
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
    run = fla_gated_delta_rule if use_fla("gated_delta_rule", q, FLA) else chunk_gated_delta_rule
    return run(q, k, v, g, beta, start, documents)


@at_least_fp32
def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, V], final state)."""
    state = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


@at_least_fp32
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, as `chunk_delta_rule`, with the decay between tokens in the products."""
    initial = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    chunks = Chunks(q.shape[1], chunk_size, documents, q.device)
    q, k, v = (chunks.split(x) for x in (q * q.shape[-1] ** -0.5, k, v))
    g, beta = chunks.split(g[..., None]), chunks.split(beta[..., None])

    decay = g.cumsum(dim=-2)  # [C, B, H, L, 1], from the chunk's first token on
    since_begin = chunks.since_begin(decay, decay - g).exp()
    beta_k = beta * k
    scores, system = gated_products((q, beta_k), k, decay, chunks.visible)
    corrected = solve_unit_lower(system, torch.cat([beta * v, beta_k * since_begin], dim=-1))
    U, W = corrected.split([v.shape[-1], k.shape[-1]], dim=-1)
    keys = chunks.only_last(k * (decay[..., -1:, :] - decay).exp())
    decays = since_begin[..., -1:, :]
    written, states, final = chunks.correct(decays, U, W, keys, None, initial)
    read = chunks.read(q * since_begin, states, initial)
    return chunks.join(read + scores @ written), final


def fla_gated_delta_rule(
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
    function = fla_function(FLA)
    return run_fla(function, inputs, start, documents)


@at_least_fp32
def gated_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """One token: q, k [B, H, K], v [B, H, V], g, beta [B, H]. Updates state in place; o as v."""
    state *= g.exp()[..., None, None]
    error = v - (k.unsqueeze(-2) @ state).squeeze(-2)
    state += k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2) * q.shape[-1] ** -0.5
