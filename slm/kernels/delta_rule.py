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

from slm.kernels.chunking import Chunks, accumulation_dtype, initial_state


def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, V], final state)."""
    q, k, v, beta = (x.to(accumulation_dtype(x)) for x in (q, k, v, beta))
    state = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k).clone()
    outputs = []
    for t in range(q.shape[1]):
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    start: Tensor | None = None,
    documents: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: the same result with matrix products inside each chunk.

    Within a chunk the corrected values solve a unit lower triangular system,
    (I + tril(diag(β) K Kᵀ, −1)) [U, W] = diag(β) [V, K], for all chunks at once; a loop over
    chunks then carries the state. With `documents` [B, T] each document begins with `start`.
    Returns (o [B, T, H, V], the state after each row's last token).
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta = (x.to(accumulation_dtype(x)) for x in (q, k, v, beta))
        initial = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
        chunks = Chunks(q.shape[1], chunk_size, documents, q.device)
        q, k, v, beta = (chunks.split(x) for x in (q * q.shape[-1] ** -0.5, k, v, beta[..., None]))

        system = (beta * k @ k.mT).masked_fill(~chunks.visible, 0.0)
        # Only what lies below the diagonal is read: the ones on it are implied.
        corrected = torch.linalg.solve_triangular(
            system, beta * torch.cat([v, k], dim=-1), upper=False, unitriangular=True
        )
        U, W = corrected.split([v.shape[-1], k.shape[-1]], dim=-1)
        scores = (q @ k.mT).masked_fill(~chunks.visible, 0.0)
        keys = chunks.only_last(k).mT

        state, outputs = initial, []
        for c in range(chunks.num_chunks):
            values = U[c] - chunks.read(c, W, state, initial)
            outputs.append(chunks.read(c, q, state, initial) + scores[c] @ values)
            state = chunks.inherit(c, state, initial) + keys[c] @ values
        return chunks.join(outputs), state


def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [B, H, K], v [B, H, V], beta [B, H]. Updates state in place; o [B, H, V]."""
    error = v - (k.unsqueeze(-2) @ state).squeeze(-2)
    state += k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2) * q.shape[-1] ** -0.5
