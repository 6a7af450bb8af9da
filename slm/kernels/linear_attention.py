"""Linear attention: a matrix memory that only adds.

    S_t = S_{t-1} + k_t ⊗ v_t,    o_t = S_tᵀ q_t / √K

Katharopoulos et al. 2020, "Transformers are RNNs", without the normaliser.

Letters: B rows, T tokens, H heads, K key size, V value size, C chunks, L tokens per chunk.
q, k [B, T, H, K]; v [B, T, H, V]; states [B|1, H, K, V].
Everything is computed, and the state kept, in at least fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm.kernels.backend import fla_function, run_fla, use_fla
from slm.kernels.chunking import Chunks, initial_state
from slm.kernels.documents import Documents
from slm.kernels.precision import at_least_fp32

FLA = "ops.linear_attn.chunk_linear_attn"


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """By fla on CUDA, by chunks elsewhere. Each of `documents` begins with `start`.

    Returns (o [B, T, H, V], the state after each row's last token).
    """
    run = fla_linear_attention if use_fla("linear_attention", q, FLA) else chunk_linear_attention
    return run(q, k, v, start, documents)


@at_least_fp32
def recurrent_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, V], final state)."""
    state = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    outputs = []
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


@at_least_fp32
def chunk_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: the same result with matrix products inside each chunk."""
    initial = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    chunks = Chunks(q.shape[1], chunk_size, documents, q.device)
    q, k, v = (chunks.split(x) for x in (q * q.shape[-1] ** -0.5, k, v))

    states, final = chunks.carry(None, chunks.only_last(k).mT @ v, initial)
    scores = chunks.mask(q @ k.mT)
    return chunks.join(chunks.read(q, states, initial) + scores @ v), final


def fla_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """By the Triton kernels of fla."""
    function = fla_function(FLA)
    q, k = q.to(v.dtype), k.to(v.dtype)
    return run_fla(function, {"q": q, "k": k, "v": v}, start, documents, normalize=False)


@at_least_fp32
def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [B, H, K], v [B, H, V]. Updates state in place; o [B, H, V]."""
    state += k.unsqueeze(-1) * v.unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2) * q.shape[-1] ** -0.5
