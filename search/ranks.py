"""The processes that train one candidate together, each on its share of every batch.

A process that trains alone is the only rank there is. `search.launch` starts several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Ranks:
    """This process among those of torch's process group, or alone where there is none."""

    def __init__(self) -> None:
        import torch.distributed as dist

        is_group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_group else 0
        self.size = dist.get_world_size() if is_group else 1

    @property
    def is_first(self) -> bool:
        """Whether this one validates, saves and reports for all."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """What of a batch this one reads."""
        return rows[self.rank :: self.size]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks: one transfer for all of them."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        means = flat.split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the first rank's."""
        import torch.distributed as dist

        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Until the block ends on every rank, no latency is measured on any of their devices.

        The first rank takes the locks for all. Were each to take its own, a timing that waits for
        one rank could keep the next from the step in which the one waits for it.
        """
        from latency.lock import device_lock

        names = self._lock_names
        with ExitStack() as locks:
            if self.is_first:
                for name in names:
                    locks.enter_context(device_lock(exclusive=False, name=name))
            self._wait_for_all()
            yield
            self._wait_for_all()

    @cached_property
    def _lock_names(self) -> list[str]:
        """Of the devices of all ranks, which ask for it together."""
        import torch.distributed as dist

        from latency.lock import current_lock_name

        names = [current_lock_name()] * self.size
        if self.size > 1:
            dist.all_gather_object(names, names[0])
        return sorted(set(names))

    def _wait_for_all(self) -> None:
        import torch.distributed as dist

        if self.size > 1:
            dist.barrier()
