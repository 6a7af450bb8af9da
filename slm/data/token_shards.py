"""Token ids of many files as one array."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

# Files mapped at a time: each takes a descriptor of the process's thousand or so.
MAX_OPEN_SHARDS = 128


class TokenShards:
    """Ids that lie one after another in memory-mapped files.

    paths, lengths: of each file, and how many ids it holds. Slices of step 1 are read; np.asarray
    reads everything.
    """

    def __init__(self, paths: Sequence[Path], lengths: Sequence[int], dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._paths = paths
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self._shard = lru_cache(MAX_OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        begin, end, step = place.indices(len(self))
        assert step == 1
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right").tolist()
        parts = [
            self._shard(index)[max(0, begin - start) : end - start]
            for index in range(first, last + 1)
            # A shard may have no document of this split, and an empty file cannot be mapped.
            if (start := int(self._starts[index])) < self._ends[index] and begin < end
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype)

    def _map(self, index: int) -> np.ndarray:
        return np.memmap(self._paths[index], self.dtype, mode="r")
