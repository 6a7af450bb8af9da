"""Weights in huge pages, from which a CPU reads faster.

Memory comes in pages of 4 KiB, whose places a CPU has to look up as it goes and beyond whose ends
it does not read ahead. Decoding reads all weights for every token: in pages of 2 MiB, 100 million
of them take a fifth to a quarter less time. Virtual machines, which look up twice, gain most.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 * 2**20
# Where a weight begins: at a line of the caches.
LINE_BYTES = 64


def huge_memory(num_bytes: int) -> memoryview:
    """Zeros, in huge pages as far as the system has them.

    Freed with the last tensor that is made of it.
    """
    mapped = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        try:
            mapped.madvise(advice)
        except OSError as error:
            # A kernel that was built without them.
            log.info("no huge pages: %s", error)
    address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    begin = -address % HUGE_PAGE_BYTES
    return memoryview(mapped)[begin : begin + num_bytes]


@torch.inference_mode(False)
@torch.no_grad()
def move_to_huge_pages(model: nn.Module) -> None:
    """Put the weights that a CPU holds side by side, in the model's order.

    Parameters stay the same objects; where their values were before is free.
    """
    weights = [each for each in model.parameters() if _can_be_moved(each)]
    begins = [0]
    for weight in weights:
        begins.append(begins[-1] + -(-weight.nbytes // LINE_BYTES) * LINE_BYTES)
    if begins[-1] == 0 or _lie_at(weights, begins):
        return
    memory = huge_memory(begins[-1])
    for weight, begin in zip(weights, begins, strict=False):
        if weight.nbytes:
            place = torch.frombuffer(memory[begin : begin + weight.nbytes], dtype=weight.dtype)
            weight.data = place.view(weight.shape).copy_(weight)


def _can_be_moved(weight: Tensor) -> bool:
    """Tensors made in inference mode keep the memory that they have."""
    return weight.device.type == "cpu" and weight.is_contiguous() and not weight.is_inference()


def _lie_at(weights: Sequence[Tensor], begins: Sequence[int]) -> bool:
    """Whether they have been moved, and not elsewhere since."""
    first = weights[0].data_ptr()
    return first % HUGE_PAGE_BYTES == 0 and all(
        weight.data_ptr() == first + begin for weight, begin in zip(weights, begins, strict=False)
    )
