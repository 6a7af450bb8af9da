"""The state space dual of Mamba2: a matrix memory with one decay per head and token.

    S_t = exp(g_t) S_{t-1} + k_t ⊗ v_t,    o_t = S_tᵀ q_t

Dao and Gu 2024, "Transformers are SSMs". Mamba2 takes q = C, k = B (shared by all heads),
v = x Δ and g = Δ A.

Letters: B rows, T tokens, H heads, N state size, P head size, C chunks, L tokens per chunk.
q, k [B, T, N]; v [B, T, H, P]; g [B, T, H], <= 0; states [B|1, H, N, P].
Everything is computed, and the state kept, in at least fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.backend import fla_function, run_fla, use_fla
from slm.kernels.chunking import Chunks, initial_state
from slm.kernels.decay import ChunkDecays, between, without_first
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
    if start is None:
        g = without_first(g)
    return _ChunkSSD.apply(q, k, v, g, initial, chunks)


class _ChunkSSD(torch.autograd.Function):
    """A loop over chunks there and back, so that what belongs to one stays in the cache.

    Heads share keys and queries, so one product writes, and one reads, the states of them all
    [N, H P]. A decay that v_j meets on its way into y_i multiplies both alike: so the gradient of
    the sums of log decays is Σ_P (y ∂y − v ∂v).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        """See `chunk_ssd`; initial [B, H, N, P]."""
        q, k, v = (chunks.pad(x) for x in (q, k, v))
        decays = ChunkDecays.of(g, chunks)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        Q, K, V, Y = (chunks.cut(x) for x in (q, k, v, y))
        S = v.new_empty(chunks.num_chunks + 1, *initial.transpose(1, 2).shape)  # [.., B, N, H, P]
        S[0] = initial.transpose(1, 2)
        states = S.flatten(-2)
        for c in range(chunks.num_chunks):
            scores = (Q[c] @ K[c].mT).unsqueeze(1) * between(decays.sums[c], chunks.visible_in(c))
            read = Q[c] @ states[c]
            if chunks.fresh is not None:
                read = torch.where(chunks.fresh[c].squeeze(1), Q[c] @ states[0], read)
            torch.mul(read.view_as(Y[c]), _by_token(decays.begin[c]), out=Y[c])
            Y[c] += _by_token(scores @ _by_token(V[c]))

            torch.mul(S[c], _by_token(decays.old[c]), out=S[c + 1])
            if decays.initial is not None:
                S[c + 1].addcmul_(_by_token(decays.initial[c]), S[0])
            states[c + 1].baddbmm_(K[c].mT, (V[c] * _by_token(decays.end[c])).flatten(-2))
        ctx.save_for_backward(q, k, v, y, S, *decays)
        ctx.chunks = chunks
        return y[:, : chunks.num_tokens], S[-1].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        """Of q, k, v, g and the initial state."""
        q, k, v, y, S, *saved = ctx.saved_tensors
        decays, chunks = ChunkDecays(*saved), ctx.chunks
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        Q, K, V, Y, dY = (chunks.cut(x) for x in (q, k, v, y, chunks.pad(dy)))
        dQ, dK, dV = (chunks.cut(x) for x in gradients)
        states, d_initial = S.flatten(-2), torch.zeros_like(S[0])
        d_sums, ends = torch.empty_like(decays.sums), torch.empty_like(decays.old)
        # [B, N, H, P], of the state after chunk c; changed in place.
        dS = d_final.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        for c in reversed(range(chunks.num_chunks)):
            decay = between(decays.sums[c], chunks.visible_in(c))
            v_c, dy_c = _by_token(V[c]), _by_token(dY[c])
            scores = (Q[c] @ K[c].mT).unsqueeze(1) * decay
            d_products = ((dy_c @ v_c.mT) * decay).sum(1)
            d_read = (dY[c] * _by_token(decays.begin[c])).flatten(-2)
            written = (V[c] * _by_token(decays.end[c])).flatten(-2)
            d_written = (K[c] @ dS.flatten(-2)).view_as(V[c]) * _by_token(decays.end[c])

            dq, old = d_read @ states[c].mT, Q[c]
            if decays.initial is not None:
                fresh = chunks.fresh[c].squeeze(1)
                dq = torch.where(fresh, d_read @ states[0].mT, dq)
                old = Q[c].masked_fill(fresh, 0.0)
                d_initial.flatten(-2).baddbmm_((Q[c] - old).mT, d_read)
                d_initial.addcmul_(_by_token(decays.initial[c]), dS)
            dQ[c] = torch.baddbmm(dq, d_products, K[c])
            dK[c] = torch.baddbmm(written @ dS.flatten(-2).mT, d_products.mT, Q[c])
            torch.add(d_written, _by_token(scores.mT @ dy_c), out=dV[c])
            d_sums[c] = _by_token((Y[c] * dY[c]).sub_(V[c] * dV[c]).sum(-1, keepdim=True))
            ends[c] = _by_token((S[c + 1] * dS).sum((1, 3), keepdim=True))
            dS *= _by_token(decays.old[c])
            dS.flatten(-2).baddbmm_(old.mT, d_read)

        d_initial += dS
        dq, dk, dv = (x[:, : chunks.num_tokens] for x in gradients)
        dg = decays.gradient(d_sums, ends, chunks)
        return dq, dk, dv, dg, d_initial.transpose(1, 2), None


def _by_token(x: Tensor) -> Tensor:
    """[B, H, L, ...] -> [B, L, H, ...], and back."""
    return x.transpose(1, 2)


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
