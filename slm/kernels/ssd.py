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

from slm.kernels.chunking import Chunks, accumulation_dtype, initial_state


def recurrent_ssd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, P], final state)."""
    q, k, v, g = (x.to(accumulation_dtype(x)) for x in (q, k, v, g))
    state = initial_state(start, (*g[:, 0].shape, k.shape[-1], v.shape[-1]), like=v).clone()
    outputs = []
    for t in range(q.shape[1]):
        write = torch.einsum("bn,bhp->bhnp", k[:, t], v[:, t])
        state = g[:, t, :, None, None].exp() * state + write
        outputs.append(torch.einsum("bhnp,bn->bhp", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def chunk_ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    start: Tensor | None = None,
    documents: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: the same result with matrix products inside each chunk.

    With `documents` [B, T] each document begins with `start`. Returns (o [B, T, H, P], the
    state after each row's last token).
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = (x.to(accumulation_dtype(x)) for x in (q, k, v, g))
        initial = initial_state(start, (*g[:, 0].shape, k.shape[-1], v.shape[-1]), like=v)
        chunks = Chunks(q.shape[1], chunk_size, documents, q.device)
        q, k, v, g = (chunks.split(x) for x in (q[:, :, None], k[:, :, None], v, g[..., None]))

        decay = g.cumsum(dim=-2)  # [C, B, H, L, 1], from the chunk's first token on
        between = (decay - decay.mT).masked_fill(~chunks.visible, -torch.inf).exp()
        local = (q @ k.mT * between) @ v
        writes = k.mT @ chunks.only_last(v * (decay[..., -1:, :] - decay).exp())
        if documents is not None:
            # A document that begins in the chunk decays from its own first token on.
            first = chunks.first_of_document().expand_as(decay)
            decay = decay - (decay - g).gather(-2, first)
        reads = q * decay.exp()
        total = decay[..., -1:, :].exp()

        state, outputs = initial, []
        for c in range(chunks.num_chunks):
            outputs.append(chunks.read(c, reads, state, initial) + local[c])
            state = total[c] * chunks.inherit(c, state, initial) + writes[c]
        return chunks.join(outputs), state


def ssd_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [B, N], v [B, H, P], g [B, H]. Updates state in place; o [B, H, P]."""
    state *= g.exp()[..., None, None]
    state += k[:, None, :, None] * v.unsqueeze(-2)
    return (q[:, None, None, :] @ state).squeeze(-2)
