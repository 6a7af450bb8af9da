"""Rows of packed tokens.

Letters: T sequence_tokens.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from slm.config import ConfigError
from slm.data.packing import PackedSplit


class PackedDataset(Dataset[dict[str, Tensor]]):
    """A split cut into rows of equal length, regardless of documents.

    Row i is {"tokens": [T + 1] int64, "documents": [T] int64}: rows overlap by one token, so that
    every token but the first is a target once. documents counts the documents inside the row; a
    row that begins inside a document begins at 0.
    """

    def __init__(self, split: PackedSplit, sequence_tokens: int) -> None:
        self.split = split
        self.sequence_tokens = sequence_tokens
        self.num_rows = (len(split) - 1) // sequence_tokens
        if self.num_rows < 1:
            raise ConfigError(
                [
                    f"sequence_tokens: {sequence_tokens} and the target after them are more than "
                    f"the {len(split)} tokens of the {split.name} split"
                ]
            )

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        begin = index * self.sequence_tokens
        end = begin + self.sequence_tokens
        tokens = self.split.tokens[begin : end + 1].astype(np.int64)
        starts = self.split.document_starts
        first, last = np.searchsorted(starts, [begin + 1, end])
        is_start = np.zeros(self.sequence_tokens, np.int64)
        is_start[starts[first:last] - begin] = 1
        return {
            "tokens": torch.from_numpy(tokens),
            "documents": torch.from_numpy(is_start.cumsum()),
        }
