"""The state space dual of Mamba2: a matrix memory with one decay per head and token.

    S_t = exp(g_t) S_{t-1} + k_t ⊗ v_t,    o_t = S_tᵀ q_t

Dao and Gu 2024, "Transformers are SSMs". Mamba2 takes q = C, k = B (shared by all heads),
v = x Δ and g = Δ A.

Letters: B rows, T tokens, H heads, N state size, P head size, C chunks, L tokens per chunk.
q, k [B, T, N]; v [B, T, H, P]; g [B, T, H], <= 0; states [B|1, H, N, P].
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

FLA = "ops.simple_gla.chunk_simple_gla"


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By fla on CUDA, by chunks elsewhere. Each of `documents` begins with `start`.

    Returns (o [B, T, H, P], the state after each row's last token).
    """
    run = fla_ssd if use_fla("ssd", q, FLA) else chunk_ssd
    return run(q, k, v, g, start, documents)


@at_least_fp32
def recurrent_ssd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, P], final state)."""
    state = initial_state(start, (*g[:, 0].shape, k.shape[-1], v.shape[-1]), like=v)
    outputs = []
    for t in range(q.shape[1]):
        write = torch.einsum("bn,bhp->bhnp", k[:, t], v[:, t])
        state = g[:, t, :, None, None].exp() * state + write
        outputs.append(torch.einsum("bhnp,bn->bhp", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


@at_least_fp32
def chunk_ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: the same result with matrix products inside each chunk."""
    initial = initial_state(start, (*g[:, 0].shape, k.shape[-1], v.shape[-1]), like=v)
    chunks = Chunks(q.shape[1], chunk_size, documents, q.device)
    q, k, v, g = (chunks.split(x) for x in (q[:, :, None], k[:, :, None], v, g[..., None]))

    decay = g.cumsum(dim=-2)  # [C, B, H, L, 1], from the chunk's first token on
    since_begin = chunks.since_begin(decay, decay - g)
    (scores,) = gated_products((q,), k, decay, chunks.visible)

    additions = k.mT @ chunks.only_last(v * (decay[..., -1:, :] - decay).exp())
    states, final = chunks.carry(since_begin[..., -1:, :].exp(), additions, initial)
    read = chunks.read(q, states, initial) * since_begin.exp()
    return chunks.join(read + scores @ v), final


def fla_ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By the Triton kernels of fla, which want keys and queries for every head.

    Values come multiplied with step sizes, in fp32; the kernels take all in the dtype of q and k.
    """
    q, k = (x.unsqueeze(2).expand(-1, -1, v.shape[2], -1) for x in (q, k))
    inputs = {"q": q, "k": k, "v": v.to(q.dtype), "g": g.float()}
    function = fla_function(FLA)
    return run_fla(function, inputs, start, documents, scale=1.0)


@at_least_fp32
def ssd_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [B, N], v [B, H, P], g [B, H]. Updates state in place; o [B, H, P]."""
    state *= g.exp()[..., None, None]
    state += k[:, None, :, None] * v.unsqueeze(-2)
    return (q[:, None, None, :] @ state).squeeze(-2)
