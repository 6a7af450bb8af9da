"""The gated delta rule: the delta rule on a memory that decays, one rate per head and token.

    S_t = exp(g_t) S_{t-1} + k_t ⊗ β_t (v_t − exp(g_t) S_{t-1}ᵀ k_t),    o_t = S_tᵀ q_t / √K

Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks".

Letters: B rows, T tokens, H heads, K key size, V value size, C chunks, L tokens per chunk.
q, k [B, T, H, K], k of unit length; v [B, T, H, V]; g [B, T, H], <= 0; beta [B, T, H];
states [B|1, H, K, V].
Everything is computed, and the state kept, in at least fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.backend import fla_function, run_fla, use_fla
from slm.kernels.chunking import Chunks, add_product, initial_state
from slm.kernels.decay import ChunkDecays, between, without_first
from slm.kernels.documents import Documents
from slm.kernels.precision import at_least_fp32
from slm.kernels.triangular import invert_unit_lower

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
    if start is None:
        g = without_first(g)
    return _ChunkGatedDeltaRule.apply(q * q.shape[-1] ** -0.5, k, v, g, beta, initial, chunks)


class _ChunkGatedDeltaRule(torch.autograd.Function):
    """A loop over chunks there and back, so that what belongs to one stays in the cache.

    In a chunk that begins with the state S, with D_ij the decay between tokens, zero where j is not
    visible to i, and γ that since the chunk or the document began,

        E = V − γ K S,    (I + β tril(K Kᵀ D, −1)) Y = β E,    R = γ Q S + (Q Kᵀ D) Y

    and Y is written, R is read. Queries stand above keys in one matrix X, so that one product
    serves both. What depends on the sums of log decays a is multiplied with exp(a_i) and exp(−a_j);
    so ∂a is the sum of P ∂P for every such product P of token i, less those of token j.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial: Tensor,
        chunks: Chunks,
    ) -> tuple[Tensor, Tensor]:
        """See `chunk_gated_delta_rule`; initial [B, H, K, V]."""
        decays = ChunkDecays.of(g, chunks)
        X = torch.stack([chunks.split(q), chunks.split(k)], dim=3)  # [C, B, H, 2, L, K]
        V, beta = chunks.split(v), chunks.split(beta.unsqueeze(-1))
        Q, K = X.unbind(3)
        system = (K @ K.mT).mul_(between(decays.sums, chunks.visible)).mul_(beta)
        inverse = invert_unit_lower(system)
        E, Y, R = (torch.empty_like(V) for _ in range(3))
        S = v.new_empty(chunks.num_chunks + 1, *initial.shape)
        S[0] = initial
        for c in range(chunks.num_chunks):
            x = (X[c] * decays.begin[c].unsqueeze(2)).flatten(2, 3)
            read = x @ S[c]
            if chunks.fresh is not None:
                read = torch.where(chunks.fresh[c].repeat(1, 1, 2, 1), x @ S[0], read)
            by_query, by_key = read.split(chunks.chunk_size, dim=2)
            torch.sub(V[c], by_key, out=E[c])
            torch.matmul(inverse[c], beta[c] * E[c], out=Y[c])
            scores = (Q[c] @ K[c].mT).mul_(between(decays.sums[c], chunks.visible_in(c)))
            torch.add(by_query, scores @ Y[c], out=R[c])

            torch.mul(S[c], decays.old[c], out=S[c + 1])
            if decays.initial is not None:
                S[c + 1].addcmul_(decays.initial[c], S[0])
            add_product(S[c + 1], (K[c] * decays.end[c]).mT, Y[c])
        ctx.save_for_backward(X, beta, E, Y, S, inverse, *decays)
        ctx.chunks = chunks
        return chunks.join(R), S[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        """Of q, k, v, g, beta and the initial state."""
        X, beta, E, Y, S, inverse, *saved = ctx.saved_tensors
        decays, chunks = ChunkDecays(*saved), ctx.chunks
        dR = chunks.split(d_output)
        dX, dV, d_beta, d_sums, ends = map(torch.empty_like, (X, Y, beta, decays.sums, decays.old))
        d_initial = torch.zeros_like(S[0])
        dS = d_final.contiguous()  # of the state after chunk c
        for c in reversed(range(chunks.num_chunks)):
            K, x = X[c, :, :, 1], X[c].flatten(2, 3)
            decay = between(decays.sums[c], chunks.visible_in(c))
            products = (x @ K.mT).unflatten(2, (2, -1))
            dY = (products[:, :, 0] * decay).mT @ dR[c]
            add_product(dY, K * decays.end[c], dS)
            d_right = inverse[c].mT @ dY
            torch.mul(beta[c], d_right, out=dV[c])

            # Of what Y is multiplied with, Q Kᵀ D above β K Kᵀ D.
            d_read = torch.cat([dR[c], -d_right], dim=2)
            d_products = (d_read @ Y[c].mT).view_as(products).mul_(decay.unsqueeze(2))
            d_products[:, :, 1].tril_(-1)
            weighted = products.mul_(d_products)
            d_beta[c] = (d_right * E[c]).sum(-1, keepdim=True)
            d_beta[c] += weighted[:, :, 1].sum(-1, keepdim=True)
            weighted[:, :, 1] *= beta[c]
            d_products[:, :, 1] *= beta[c]
            d_sums[c] = weighted.sum((2, 4)).sub_(weighted.sum((2, 3))).unsqueeze(-1)

            # Of what γ S is, [Q; −K].
            torch.neg(dV[c], out=d_read[:, :, chunks.chunk_size :])
            begin = decays.begin[c].repeat(1, 1, 2, 1)
            decayed, dx = x * begin, d_read @ S[c].mT
            dS_c = dS * decays.old[c]
            if decays.initial is None:
                add_product(dS_c, decayed.mT, d_read)
            else:
                fresh = chunks.fresh[c].repeat(1, 1, 2, 1)
                dx = torch.where(fresh, d_read @ S[0].mT, dx)
                add_product(dS_c, decayed.masked_fill(fresh, 0.0).mT, d_read)
                add_product(d_initial, decayed.masked_fill(~fresh, 0.0).mT, d_read)
                d_initial.addcmul_(decays.initial[c], dS)
            dx *= begin
            d_sums[c] += (x * dx).sum(-1, keepdim=True).unflatten(2, (2, -1)).sum(2)
            add_product(dx, d_products.flatten(2, 3), K)
            dK = (Y[c] @ dS.mT).mul_(decays.end[c])
            d_sums[c] -= (K * dK).sum(-1, keepdim=True)
            add_product(dK, d_products.flatten(2, 3).mT, x)
            dX[c] = dx.view_as(X[c])
            dX[c, :, :, 1] += dK
            ends[c] = (S[c + 1] * dS).sum((-2, -1), keepdim=True)
            dS = dS_c

        dq, dk = (chunks.join(x) for x in dX.unbind(3))
        dg = decays.gradient(d_sums, ends, chunks)
        d_initial += dS
        return dq, dk, chunks.join(dV), dg, chunks.join(d_beta).squeeze(-1), d_initial, None


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
