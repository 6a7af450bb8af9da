"""The largest batch that fits a device's memory, and what the device does with it."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from latency.device import Device
from latency.lock import device_lock
from latency.memory import PeakMemory, available_bytes
from latency.profile import Profile, profile
from latency.request import Request
from latency.timer import Protocol
from latency.workload import Workload
from slm.architecture import Architecture
from slm.generation import PREFILL_TOKENS

log = logging.getLogger(__name__)

# Of the memory that is left: what the largest batch may take. Allocators lose some of it.
USABLE = 0.9
# What the smaller of two batches that a row's share is measured with remembers and passes on, and
# its most rows: much less drowns in what allocators keep. Between the two the weights drop out.
MEASURED_BYTES, MEASURED_ROWS = 32 * 2**20, 256
# Of a batch that did not fit after all: what is tried next.
SMALLER = 0.9


def max_batch_size(
    architecture: Architecture,
    workload: Workload,
    device: Device,
    limit_bytes: int | None = None,
) -> int:
    """Rows of the workload that fit into `limit_bytes`; None: what is available now.

    What a row takes is measured, prefill included, and taken as the same for every further one.
    Raises MemoryError if not even one fits, OSError where the system does not tell.
    """
    context = architecture.meta_tokens + workload.max_tokens
    state_bytes = architecture.state_bytes(context, workload.torch_dtype.itemsize)
    tokens = min(workload.prompt_tokens, PREFILL_TOKENS)
    least_bytes = state_bytes + tokens * architecture.width * workload.torch_dtype.itemsize
    few = min(MEASURED_ROWS, max(1, MEASURED_BYTES // least_bytes))
    more = 3 * few
    with device_lock(name=device.lock_name):
        limit_bytes = int(USABLE * available_bytes(device)) if limit_bytes is None else limit_bytes
        if few * least_bytes > limit_bytes:
            raise MemoryError(f"a row takes {least_bytes:,} bytes, there are {limit_bytes:,}")
        base = _peak_bytes(architecture, replace(workload, batch_size=few), device)
        further = _peak_bytes(architecture, replace(workload, batch_size=more), device) - base
    row_bytes = max(further / (more - few), least_bytes)
    if base - (few - 1) * row_bytes > limit_bytes:
        raise MemoryError(f"one row takes {base:,} bytes, there are {limit_bytes:,}")
    return max(1, few + math.floor((limit_bytes - base) / row_bytes))


def throughput(
    architecture: Architecture,
    workload: Workload,
    device: Device,
    protocol: Protocol | None = None,
    seed: int = 0,
    limit_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Profile:
    """Measure the workload with the largest batch that fits, see `max_batch_size`.

    Raises MemoryError if not even one row does.
    """
    batch_size = max_batch_size(architecture, workload, device, limit_bytes)
    while True:
        if progress:
            progress(f"throughput of a batch of {batch_size}")
        batch = replace(workload, batch_size=batch_size)
        try:
            with _memory_errors():
                return profile(architecture, batch, device, protocol, seed)
        except MemoryError:
            if batch_size == 1:
                raise
            batch_size = max(1, int(SMALLER * batch_size))
        _free(device)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Torch's ways of saying that memory does not suffice, as MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error).splitlines()[0]) from error
        raise


def _peak_bytes(architecture: Architecture, workload: Workload, device: Device) -> int:
    """Most memory of a request: of its prefill, beside the state of all its tokens."""
    _free(device)
    memory = PeakMemory()
    with _memory_errors(), memory.measured(device) as restart:
        request = Request(architecture, workload, device)
        restart()
        # Writes to all of the state, before the prompt.
        request.first_tokens()
    if memory.bytes is None:
        raise OSError("this system does not tell how much memory a process takes")
    return memory.bytes


def _free(device: Device) -> None:
    """Give back what nobody uses."""
    gc.collect()
    if device.kind == "cuda":
        torch.cuda.empty_cache()
