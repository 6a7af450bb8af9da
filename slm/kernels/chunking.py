"""What the chunked forms share: cutting rows into chunks, and carrying the state along them.

Letters: B rows, T tokens, C chunks, L tokens per chunk, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype to accumulate in: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def initial_state(start: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The state to start from, for every row: `start` [B|1, ...], or zeros."""
    if start is None:
        return like.new_zeros(shape)
    return start.to(like.dtype).expand(shape)


class Chunks:
    """The chunks of rows of T tokens, and who sees whom inside each of them.

    A row may hold several documents. Tokens of a document that begins inside a chunk are
    *fresh*: they start from the initial state, the others from what the previous chunk left.

    visible: [C|1, B|1, 1, L, L] bool, token i sees token j <= i of its own document.
    fresh: [C, B, 1, L, 1] bool, and last: [C, B, 1, L, 1] bool, the token belongs to the
        document that its chunk ends with; both None when each row is one document.
    """

    def __init__(
        self, num_tokens: int, chunk_size: int, documents: Tensor | None, device: torch.device
    ) -> None:
        self.num_tokens = num_tokens
        self.chunk_size = min(chunk_size, num_tokens)
        self.num_chunks = math.ceil(num_tokens / self.chunk_size)
        self.padding = self.num_chunks * self.chunk_size - num_tokens
        ones = torch.ones(self.chunk_size, self.chunk_size, dtype=torch.bool, device=device)
        self.visible = ones.tril()[None, None, None]
        self.fresh = self.last = None
        if documents is not None:
            # Padding belongs to the last document, so that the last state passes through it.
            padded = torch.cat([documents, documents[:, -1:].expand(-1, self.padding)], dim=1)
            document = padded.unflatten(1, (self.num_chunks, self.chunk_size))
            document = document.transpose(0, 1)[:, :, None, :, None]  # [C, B, 1, L, 1]
            before = torch.cat([document[:1, ..., :1, :], document[:-1, ..., -1:, :]])
            self.visible = self.visible & (document == document.mT)
            self.fresh = document != before
            self.last = document == document[..., -1:, :]

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [C, B, H, L, D], padded with zeros; chunks first, to loop over."""
        x = F.pad(x, (0, 0, 0, 0, 0, self.padding))
        return x.unflatten(1, (self.num_chunks, self.chunk_size)).movedim(1, 0).transpose(2, 3)

    def join(self, outputs: list[Tensor]) -> Tensor:
        """C times [B, H, L, D] -> [B, T, H, D]."""
        return torch.cat(outputs, dim=2).transpose(1, 2)[:, : self.num_tokens]

    def read(self, c: int, x: Tensor, state: Tensor, initial: Tensor) -> Tensor:
        """Chunk c of x [C, B, H, L, K] times the state [B, H, K, V] its tokens start from."""
        if self.fresh is None:
            return x[c] @ state
        return torch.where(self.fresh[c], x[c] @ initial, x[c] @ state)

    def inherit(self, c: int, state: Tensor, initial: Tensor) -> Tensor:
        """The state that the document at the end of chunk c entered the chunk with."""
        if self.fresh is None:
            return state
        return torch.where(self.fresh[c, :, :, -1:], initial, state)

    def only_last(self, x: Tensor) -> Tensor:
        """Of x [C, B, H, L, D] only the tokens of the document that its chunk ends with."""
        return x if self.last is None else x * self.last

    def first_of_document(self) -> Tensor:
        """[C|1, B|1, 1, L, 1] int64: where in the chunk each token's own document begins."""
        place = torch.arange(1, self.chunk_size + 1, device=self.visible.device)
        return (place - self.visible.sum(-1)).unsqueeze(-1)
