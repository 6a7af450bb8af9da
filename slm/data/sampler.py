"""The order of rows in training: shuffled, shared out over processes, and resumable."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler

from slm.data.dataset import PackedDataset
from slm.data.permutation import Permutation


class ShuffledSampler(DistributedSampler[Any]):
    """All rows in an order drawn from (seed, epoch) alone; each process takes its part of it.

    Every process finds its next row by itself: nothing is stored, whatever the number of rows. The
    rest, of fewer rows than there are processes, is left out.

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

    def __len__(self) -> int:
        return self.num_rows // self.num_replicas

    def order(self, epoch: int) -> Permutation:
        """The rows of all processes in an epoch, which take turns."""
        return Permutation(self.num_rows, self.seed, epoch)


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
        if self.position == len(self.sampler):
            raise StopIteration
        place = self.position * self.sampler.num_replicas + self.sampler.rank
        self.position += 1
        return self.order[place]

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
        self.order = self.sampler.order(epoch)
