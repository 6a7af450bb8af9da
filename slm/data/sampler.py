"""The order of rows in training: shuffled, shared out over processes, and resumable."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from slm.data.dataset import PackedDataset


class ShuffledSampler(DistributedSampler[Any]):
    """A permutation per epoch, drawn from (seed, epoch) alone; each process takes its part of it.

    torchdata's own random sampler shares a generator with the loader, so that the epochs after a
    resumed one come out otherwise (0.11); and Lightning does not see that it shuffles, and shares
    the rows out in order. A DistributedSampler is left as it is.
    """

    def __init__(self, dataset: PackedDataset, *, seed: int, num_replicas: int, rank: int) -> None:
        self.num_rows = len(dataset)
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.next_epoch = 0

    def __iter__(self) -> Iterator[int]:
        return _Epoch(self)

    def indices(self, epoch: int) -> list[int]:
        """The rows of this process in an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return order[self.rank : self.total_size : self.num_replicas].tolist()


class _Epoch(Iterator[int]):
    """One pass over a sampler's rows; its state is the epoch and how far it is."""

    def __init__(self, sampler: ShuffledSampler) -> None:
        self.sampler = sampler
        self.epoch: int | None = None
        self.position = 0

    def __next__(self) -> int:
        if self.epoch is None:
            # Loaders make iterators that they never use; only one in use begins an epoch.
            self._begin(self.sampler.next_epoch)
        if self.position == len(self.rows):
            raise StopIteration
        self.position += 1
        return self.rows[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many rows it has given out."""
        epoch = self.sampler.next_epoch if self.epoch is None else self.epoch
        return {"epoch": epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._begin(state_dict["epoch"])
        self.position = state_dict["position"]

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.sampler.next_epoch = epoch + 1
        self.rows = self.sampler.indices(epoch)
