"""The selective scan of Mamba: a diagonal state space whose step size, input and output vary.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t,    y_t = h_t C_t

Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces".

Letters: B rows, T tokens, I channels, N state size, C chunks, L tokens per chunk.
x, dt (Δ) [B, T, I]; A [I, N], < 0; B, C [B, T, N]; states [B|1, I, N].
Everything is computed, and the state kept, in at least fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.backend import use_fla
from slm.kernels.chunking import initial_state
from slm.kernels.documents import Documents
from slm.kernels.precision import at_least_fp32

CHUNK_SIZE = 64


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """By chunks, compiled on CUDA. Each of `documents` begins with `start`.

    Returns (y [B, T, I], the state after each row's last token).
    """
    use_fla("selective_scan", x, None)
    if x.is_cuda:
        # Chunks are whole, so that rows of any length share the compiled loop.
        return _compiled()(x, dt, A, B, C, start, documents)
    return chunk_selective_scan(x, dt, A, B, C, start, documents, min(CHUNK_SIZE, x.shape[1]))


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(chunk_selective_scan)


@at_least_fp32
def recurrent_selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the recurrence is written. Returns (y [B, T, I], final state)."""
    state = initial_state(start, (len(x), *A.shape), like=x)
    outputs = []
    for t in range(x.shape[1]):
        write = torch.einsum("bi,bn->bin", dt[:, t] * x[:, t], B[:, t])
        state = (dt[:, t, :, None] * A).exp() * state + write
        outputs.append(torch.einsum("bin,bn->bi", state, C[:, t]))
    return torch.stack(outputs, dim=1), state


@at_least_fp32
def chunk_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor | None = None,
    documents: Documents | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """All chunks at once, token by token: L steps on tensors of C chunks instead of T small ones.

    Each channel decays at N rates of its own, so there is no product of matrices to be had.
    """
    batch_size, num_tokens = x.shape[:2]
    padding = -num_tokens % chunk_size

    def split(y: Tensor) -> Tensor:
        """[B, T, D] -> [L, C, B, D], padded with zeros: a step size of zero changes nothing."""
        y = F.pad(y, (0, 0, 0, padding)) if padding else y
        return y.unflatten(1, (-1, chunk_size)).permute(2, 1, 0, 3)

    initial = initial_state(start, (batch_size, *A.shape), like=x)
    decays = (split(dt).unsqueeze(-1) * A).exp()  # [L, C, B, I, N]
    writes = split(dt * x).unsqueeze(-1) * split(B).unsqueeze(-2)
    if documents is not None:
        opens = split(documents.begins.unsqueeze(-1)).unsqueeze(-1)
        writes = writes + torch.where(opens, decays * initial, 0.0)
        decays = decays.masked_fill(opens, 0.0)

    states = _Scan.apply(decays, writes, initial)
    y = (states @ split(C).unsqueeze(-1)).squeeze(-1)
    return y.permute(2, 1, 0, 3).flatten(1, 2)[:, :num_tokens], states[-1, -1]


@at_least_fp32
def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> Tensor:
    """One token: x, dt [B, I], B, C [B, N]. Updates state in place; y [B, I]."""
    state *= (dt.unsqueeze(-1) * A).exp()
    state += (dt * x).unsqueeze(-1) * B.unsqueeze(-2)
    return (state @ C.unsqueeze(-1)).squeeze(-1)


class _Scan(torch.autograd.Function):
    """h_t = d_t h_{t-1} + w_t along chunks of L tokens; all states [L, C, B, I, N].

    Nothing is computed in place: `torch.compile` has to see through it.
    """

    @staticmethod
    def forward(ctx: Any, decays: Tensor, writes: Tensor, initial: Tensor) -> Tensor:
        """decays, writes [L, C, B, I, N]; initial [B, I, N]."""
        end, total = writes[0], decays[0]
        for decay, write in zip(decays[1:], writes[1:], strict=True):
            end, total = torch.addcmul(write, decay, end), total * decay
        starts = [initial]
        for c in range(len(end) - 1):
            starts.append(torch.addcmul(end[c], total[c], starts[-1]))
        before = torch.stack(starts)

        each = [before]
        for decay, write in zip(decays, writes, strict=True):
            each.append(torch.addcmul(write, decay, each[-1]))
        states = torch.stack(each[1:])
        ctx.save_for_backward(decays, states, before)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The adjoints a_t = d_{t+1} a_{t+1} + ∂h_t, from the last chunk to the first."""
        decays, states, before = ctx.saved_tensors
        length, num_chunks = decays.shape[:2]
        begin, total = gradients[-1], torch.ones_like(before)
        for t in reversed(range(length - 1)):
            begin = torch.addcmul(gradients[t], decays[t + 1], begin)
            total = total * decays[t + 1]
        # What each chunk's last state is worth to the chunks after it.
        afters = [torch.zeros_like(before[0])]
        for c in reversed(range(1, num_chunks)):
            afters.append(decays[0, c] * torch.addcmul(begin[c], total[c], afters[-1]))

        each = [gradients[-1] + torch.stack(afters[::-1])]
        for t in reversed(range(length - 1)):
            each.append(torch.addcmul(gradients[t], decays[t + 1], each[-1]))
        adjoints = torch.stack(each[::-1])
        # A second copy of all adjoints, which nothing reads any more.
        del each
        d_decays = adjoints * torch.cat([before.unsqueeze(0), states[:-1]])
        return d_decays, adjoints, decays[0, 0] * adjoints[0, 0]
