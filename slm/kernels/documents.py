"""Which tokens of packed rows belong together.

Letters: B rows, T tokens, N documents of all rows together.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents:
    """Rows that hold documents one after the other.

    begins: [B, T] bool, the token is the first of its document; true for the first of each row.

    What follows from it is computed when it is first asked for, and then serves all operators.
    """

    def __init__(self, begins: Tensor) -> None:
        self.begins = begins

    @classmethod
    def from_ids(cls, ids: Tensor) -> Documents:
        """From ids [B, T] that change where a new document begins, whatever they change to."""
        return cls(F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True))

    @classmethod
    def in_rows(cls, ids: Tensor) -> Documents | None:
        """As `from_ids`; None if every row is one document. Waits for the device."""
        is_one = bool((ids == ids[:, :1]).all())
        return None if is_one else cls.from_ids(ids)

    @cached_property
    def numbers(self) -> Tensor:
        """[B, T] int64: which document of its row each token is of."""
        return self.begins.cumsum(dim=1)

    @cached_property
    def ages(self) -> Tensor:
        """[B, T] int64: tokens of the same document before each token."""
        place = torch.arange(self.begins.shape[1], device=self.begins.device)
        return place - torch.where(self.begins, place, 0).cummax(dim=1).values

    @cached_property
    def first_tokens(self) -> Tensor:
        """[N] int64: where documents begin in all rows laid end to end. Waits for the device."""
        return self.begins.flatten().nonzero().squeeze(1)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] int64: `first_tokens`, and the number of all tokens."""
        return F.pad(self.first_tokens, (0, 1), value=self.begins.numel())

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each of the N documents. Waits for the device."""
        return self.cu_seqlens.diff().tolist()

    @cached_property
    def last_of_rows(self) -> Tensor:
        """[B] int64: which of the N documents each row ends with."""
        return self.begins.sum(dim=1).cumsum(dim=0) - 1
