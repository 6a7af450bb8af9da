"""What the chunked forms share: cutting rows into chunks, and carrying the state along them.

Letters: B rows, T tokens, C chunks, L tokens per chunk, H heads, K key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.documents import Documents


def initial_state(start: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The state to start from, for every row: `start` [B|1, ...], or zeros."""
    if start is None:
        return like.new_zeros(shape)
    return start.to(like.dtype).expand(shape)


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b [B, H, N, M], of a [B, H, N, K] and b [B, H, K, M], to `target` in place."""
    target.view(-1, *target.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


class Chunks:
    """The chunks of rows of T tokens, and who sees whom inside each of them.

    A row may hold several documents. Tokens of a document that begins inside a chunk are
    *fresh*: they start from the initial state, the others from what the previous chunk left.

    chunk_size: L, a power of two; no larger than the row needs.
    visible: [C|1, B|1, 1, L, L] bool, token i sees token j <= i of its own document.
    fresh: [C, B, 1, L, 1] bool, and last: [C, B, 1, L, 1] bool, the token belongs to the
        document that its chunk ends with; both None when each row is one document.
    """

    def __init__(
        self, num_tokens: int, chunk_size: int, documents: Documents | None, device: torch.device
    ) -> None:
        assert chunk_size & (chunk_size - 1) == 0, f"chunk_size {chunk_size}: no power of two"
        self.num_tokens = num_tokens
        self.chunk_size = min(chunk_size, 1 << (num_tokens - 1).bit_length())
        self.num_chunks = -(-num_tokens // self.chunk_size)
        self.padding = self.num_chunks * self.chunk_size - num_tokens
        ones = torch.ones(self.chunk_size, self.chunk_size, dtype=torch.bool, device=device)
        self.visible = ones.tril()[None, None, None]
        self.fresh = self.last = None
        if documents is not None:
            # Padding belongs to the last document, so that the last state passes through it.
            numbers = documents.numbers
            padded = torch.cat([numbers, numbers[:, -1:].expand(-1, self.padding)], dim=1)
            document = padded.unflatten(1, (self.num_chunks, self.chunk_size))
            document = document.transpose(0, 1)[:, :, None, :, None]  # [C, B, 1, L, 1]
            before = torch.cat([document[:1, ..., :1, :], document[:-1, ..., -1:, :]])
            self.visible = self.visible & (document == document.mT)
            self.fresh = document != before
            self.last = document == document[..., -1:, :]

    def pad(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, C L, ...], padded with zeros."""
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.padding)) if self.padding else x

    def cut(self, x: Tensor) -> Tensor:
        """[B, C L, ...] -> a view [C, B, L, ...]; chunks first, to loop over."""
        return x.unflatten(1, (self.num_chunks, self.chunk_size)).transpose(0, 1)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [C, B, H, L, D], padded with zeros."""
        return self.cut(self.pad(x)).transpose(2, 3).contiguous()

    def visible_in(self, c: int) -> Tensor:
        """`visible` of chunk c, [B|1, 1, L, L]."""
        return self.visible[c if len(self.visible) > 1 else 0]

    def join(self, x: Tensor) -> Tensor:
        """[C, B, H, L, D] -> [B, T, H, D]."""
        return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : self.num_tokens]

    def mask(self, products: Tensor) -> Tensor:
        """Products [C, B, H, L, L] made zero, in place, where token j is not visible to i."""
        return products.masked_fill_(~self.visible, 0.0)

    def only_last(self, x: Tensor) -> Tensor:
        """Of x [C, B, H, L, D] only the tokens of the document that its chunk ends with."""
        return x if self.last is None else x * self.last

    def since_begin(self, x: Tensor, before: Tensor) -> Tensor:
        """x − before [C, B, H, L, D], `before` being that of the first token of the same document.

        In chunk-long sums `x` that include the own token and `before` that do not, this is the sum
        from where the token's document, or the chunk, begins.
        """
        if self.fresh is None:
            return x
        place = torch.arange(1, self.chunk_size + 1, device=x.device)
        first = (place - self.visible.sum(-1)).unsqueeze(-1).expand_as(x)
        return x - before.gather(-2, first)

    def carry(
        self, decays: Tensor | None, additions: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The states [C, B, H, K, V] that chunks begin with, and the last one [B, H, K, V].

        From chunk to chunk S' = d S + A: decays d [C, B, H, K|1, 1], None for ones, and additions
        A [C, B, H, K, V], both of the document that a chunk ends with.
        """
        decays, additions = self._reopen(decays, additions, initial)
        return _Carry.apply(decays, additions, initial)

    def correct(
        self,
        decays: Tensor | None,
        values: Tensor,
        reads: Tensor,
        keys: Tensor,
        additions: Tensor | None,
        initial: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is written, [C, B, H, L, V], where that depends on the state; then as `carry`.

        From chunk to chunk S' = d S + Kᵀ Y + A, where Y = U − W S is written: values U, reads W and
        keys K [C, B, H, L, ·], of which keys are those of the document that a chunk ends with.
        """
        if self.fresh is not None:
            values = values - torch.where(self.fresh, reads @ initial, 0.0)
            reads = reads.masked_fill(self.fresh, 0.0)
            decays, additions = self._reopen(decays, additions, initial)
        return _Correct.apply(decays, values, reads, keys, additions, initial)

    def _reopen(
        self, decays: Tensor | None, additions: Any, initial: Tensor
    ) -> tuple[Tensor | None, Any]:
        """A document that begins inside a chunk does not know what was before it."""
        if self.fresh is None:
            return decays, additions
        opens = self.fresh[..., -1:, :]
        ones = initial.new_ones(())
        decays = ones.expand(opens.shape) if decays is None else decays
        begun = torch.where(opens, decays * initial, 0.0)
        additions = begun if additions is None else additions + begun
        return decays.masked_fill(opens, 0.0), additions

    def read(self, x: Tensor, states: Tensor, initial: Tensor) -> Tensor:
        """x [C, B, H, L, K] times the state [K, V] that each token's document starts from."""
        if self.fresh is None:
            return x @ states
        return torch.where(self.fresh, x @ initial, x @ states)


class _Carry(torch.autograd.Function):
    """S' = d S + A as one step of automatic differentiation, not one per chunk."""

    @staticmethod
    def forward(
        ctx: Any, decays: Tensor | None, additions: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The states that chunks begin with, and the last one."""
        states = torch.cat([initial.unsqueeze(0), additions])
        for c in range(len(additions)):
            _add_decayed(states[c + 1], decays, c, states[c])
        ctx.save_for_backward(decays, states)
        return states[:-1], states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        """The adjoint recurrence, from the last chunk to the first."""
        decays, states = ctx.saved_tensors
        adjoint = torch.cat([d_states, d_final.unsqueeze(0)])
        for c in reversed(range(len(adjoint) - 1)):
            _add_decayed(adjoint[c], decays, c, adjoint[c + 1])
        return _gradient_of_decays(decays, adjoint, states), adjoint[1:], adjoint[0]


class _Correct(torch.autograd.Function):
    """Y = U − W S and S' = d S + Kᵀ Y + A as one step of automatic differentiation."""

    @staticmethod
    def forward(
        ctx: Any,
        decays: Tensor | None,
        values: Tensor,
        reads: Tensor,
        keys: Tensor,
        additions: Tensor | None,
        initial: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is written, the states that chunks begin with, and the last one."""
        shape = (len(values) + 1, *initial.shape)
        states = values.new_zeros(shape)
        states[0] = initial
        if additions is not None:
            states[1:] = additions
        written = torch.empty_like(values, memory_format=torch.contiguous_format)
        U, W, K, Y, S = (x.flatten(1, 2) for x in (values, reads, keys, written, states))
        for c in range(len(U)):
            torch.baddbmm(U[c], W[c], S[c], alpha=-1, out=Y[c])
            _add_decayed(states[c + 1], decays, c, states[c])
            S[c + 1].baddbmm_(K[c].mT, Y[c])
        ctx.save_for_backward(decays, reads, keys, written, states)
        ctx.has_additions = additions is not None
        return written, states[:-1], states[-1]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_written: Tensor, d_states: Tensor, d_final: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The adjoint recurrence, from the last chunk to the first."""
        decays, reads, keys, written, states = ctx.saved_tensors
        d_written = d_written.clone(memory_format=torch.contiguous_format)
        adjoint = torch.cat([d_states, d_final.unsqueeze(0)])
        W, K, dY, a = (x.flatten(1, 2) for x in (reads, keys, d_written, adjoint))
        for c in reversed(range(len(K))):
            dY[c].baddbmm_(K[c], a[c + 1])
            _add_decayed(adjoint[c], decays, c, adjoint[c + 1])
            a[c].baddbmm_(W[c].mT, dY[c], alpha=-1)
        return (
            _gradient_of_decays(decays, adjoint, states),
            d_written,
            (d_written @ states[:-1].mT).neg_(),
            written @ adjoint[1:].mT,
            adjoint[1:] if ctx.has_additions else None,
            adjoint[0],
        )


def _add_decayed(target: Tensor, decays: Tensor | None, c: int, state: Tensor) -> None:
    """Add the state, decayed as in chunk c, to `target` in place."""
    if decays is None:
        target.add_(state)
    else:
        target.addcmul_(decays[c], state)


def _gradient_of_decays(decays: Tensor | None, adjoint: Tensor, states: Tensor) -> Tensor | None:
    if decays is None:
        return None
    return (adjoint[1:] * states[:-1]).sum(-1, keepdim=True).sum_to_size(decays.shape)
