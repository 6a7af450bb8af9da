"""The delta rule: a matrix memory that corrects the value stored under a key.

    S_t = S_{t-1} + k_t ⊗ β_t (v_t − S_{t-1}ᵀ k_t),    o_t = S_tᵀ q_t / √K

Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length".

Letters: B rows, T tokens, H heads, K key size, V value size, C chunks, L tokens per chunk.
q, k [B, T, H, K], k of unit length; v [B, T, H, V]; beta [B, T, H]; states [B|1, H, K, V].
Everything is computed, and the state kept, in at least fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm.kernels.backend import fla_function, run_fla, use_fla
from slm.kernels.chunking import Chunks, initial_state
from slm.kernels.documents import Documents
from slm.kernels.precision import at_least_fp32
from slm.kernels.triangular import solve_unit_lower

FLA = "ops.delta_rule.chunk_delta_rule"
FLA_GATED = "ops.gated_delta_rule.chunk_gated_delta_rule"


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By fla on CUDA, by chunks elsewhere. Each of `documents` begins with `start`.

    Returns (o [B, T, H, V], the state after each row's last token).
    """
    run = fla_delta_rule if use_fla("delta_rule", q, FLA) else chunk_delta_rule
    return run(q, k, v, beta, start, documents)


@at_least_fp32
def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, V], final state)."""
    state = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    outputs = []
    for t in range(q.shape[1]):
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


@at_least_fp32
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: the same result with matrix products inside each chunk.

    Within a chunk that begins with the state S what is written are the values U − W S, where
    (I + tril(diag(β) K Kᵀ, −1)) [U, W] = diag(β) [V, K] for all chunks at once.
    """
    initial = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    chunks = Chunks(q.shape[1], chunk_size, documents, q.device)
    q, k, v, beta = (chunks.split(x) for x in (q * q.shape[-1] ** -0.5, k, v, beta[..., None]))

    beta_k = beta * k
    scores, system = (chunks.mask(x @ k.mT) for x in (q, beta_k))
    corrected = solve_unit_lower(system, torch.cat([beta * v, beta_k], dim=-1))
    U, W = corrected.split([v.shape[-1], k.shape[-1]], dim=-1)
    written, states, final = chunks.correct(None, U, W, chunks.only_last(k), None, initial)
    return chunks.join(chunks.read(q, states, initial) + scores @ written), final


def fla_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By the Triton kernels of fla; those of the gated rule for fp32, which its own refuse."""
    q, k, beta = q.to(v.dtype), k.to(v.dtype), beta.to(v.dtype)
    inputs = {"q": q, "k": k, "v": v, "beta": beta}
    if v.dtype != torch.float32:
        return run_fla(fla_function(FLA), inputs, start, documents)
    inputs["g"] = torch.zeros_like(beta)
    return run_fla(fla_function(FLA_GATED), inputs, start, documents)


@at_least_fp32
def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [B, H, K], v [B, H, V], beta [B, H]. Updates state in place; o [B, H, V]."""
    error = v - (k.unsqueeze(-2) @ state).squeeze(-2)
    state += k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2) * q.shape[-1] ** -0.5
