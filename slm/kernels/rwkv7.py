"""The recurrence of RWKV-7: a diagonal decay and a rank-one change of what the memory holds.

    S_t = diag(exp(w_t)) S_{t-1} + b_t ⊗ (S_{t-1}ᵀ a_t) + k_t ⊗ v_t,    o_t = S_tᵀ r_t

Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution".

Letters: B rows, T tokens, H heads, K key size, V value size, C chunks, L tokens per chunk.
r, k, a, b [B, T, H, K]; w [B, T, H, K], <= 0; v [B, T, H, V]; states [B|1, H, K, V].
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

FLA = "ops.rwkv7.chunk_rwkv7"


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By fla on CUDA, by chunks elsewhere. Each of `documents` begins with `start`.

    Returns (o [B, T, H, V], the state after each row's last token).
    """
    run = fla_rwkv7 if use_fla("rwkv7", r, FLA) else chunk_rwkv7
    return run(r, w, k, v, a, b, start, documents)


@at_least_fp32
def recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (o [B, T, H, V], final state)."""
    state = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    outputs = []
    for t in range(r.shape[1]):
        held = torch.einsum("bhkv,bhk->bhv", state, a[:, t])
        state = w[:, t].exp().unsqueeze(-1) * state
        state = state + torch.einsum("bhk,bhv->bhkv", b[:, t], held)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, r[:, t]))
    return torch.stack(outputs, dim=1), state


@at_least_fp32
def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: the same result with matrix products inside each chunk.

    Within a chunk that begins with the state S, what a_t finds in the memory is U_t + W_t S, where
    (I − A B) [U, W] = [A K V, A] with the decayed products A B and A K of a with the b and k before
    it.
    """
    initial = initial_state(start, (*k[:, 0].shape, v.shape[-1]), like=k)
    chunks = Chunks(r.shape[1], chunk_size, documents, r.device)
    r, w, k, v, a, b = (chunks.split(x) for x in (r, w, k, v, a, b))

    decay = w.cumsum(dim=-2)  # [C, B, H, L, K], from the chunk's first token on
    # a reads what the memory holds before the token's own decay.
    before = decay - w
    to_r, to_a = (chunks.since_begin(x, before).exp() for x in (decay, before))
    products = decayed_products(
        torch.stack([r, a], dim=-2),
        torch.stack([decay, before], dim=-2),
        torch.stack([k, b], dim=-2),
        decay.unsqueeze(-2),
    )  # [C, B, H, L, 2, L, 2]
    products = products.masked_fill(~chunks.visible[..., :, None, :, None], 0.0)
    (rk, rb), (ak, ab) = (x.unbind(-1) for x in products.unbind(-3))

    found = solve_unit_lower(-ab, torch.cat([ak @ v, a * to_a], dim=-1))
    U, W = found.split([v.shape[-1], k.shape[-1]], dim=-1)
    to_end = (decay[..., -1:, :] - decay).exp()
    last_b, last_k = (chunks.only_last(x * to_end) for x in (b, k))
    decays = to_r[..., -1, :].unsqueeze(-1)
    held, states, final = chunks.correct(decays, U, -W, last_b, last_k.mT @ v, initial)

    # Between a token and itself nothing decays.
    own = (r * b).sum(-1, keepdim=True) * held + (r * k).sum(-1, keepdim=True) * v
    read = chunks.read(r * to_r, states, initial)
    return chunks.join(read + rb @ held + rk @ v + own), final


def fla_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By the Triton kernels of fla, which want all but the decay in one dtype."""
    inputs = {"r": r, "w": w.float(), "k": k, "v": v, "a": a, "b": b}
    inputs = {name: x if name == "w" else x.to(v.dtype) for name, x in inputs.items()}
    return run_fla(fla_function(FLA), inputs, start, documents, scale=1.0)


@at_least_fp32
def rwkv7_step(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> Tensor:
    """One token: r, w, k, a, b [B, H, K], v [B, H, V]. Updates state in place; o [B, H, V]."""
    held = (a.unsqueeze(-2) @ state).squeeze(-2)
    state *= w.exp().unsqueeze(-1)
    state += b.unsqueeze(-1) * held.unsqueeze(-2)
    state += k.unsqueeze(-1) * v.unsqueeze(-2)
    return (r.unsqueeze(-2) @ state).squeeze(-2)
