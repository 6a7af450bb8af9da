"""How much memory a model takes while it decodes, and how much there is."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from latency.device import Device

PROCESS = Path("/proc/self")


class PeakMemory:
    """The most memory in use at one time; on a CPU, beyond what was in use at the beginning.

    CUDA: of torch's allocator. CPU: resident memory of the process.

    bytes: None while it is measured, and where the system does not tell.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None

    @contextmanager
    def measured(self, device: Device) -> Iterator[Callable[[], object]]:
        """Measure what is done meanwhile.

        Gives a function that begins the peak anew: what is in use then still counts, not what was
        before.
        """
        if device.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield torch.cuda.reset_peak_memory_stats
            self.bytes = torch.cuda.max_memory_allocated()
            return
        before = _reset_peak_resident_bytes()
        yield _reset_peak_resident_bytes
        if before is not None:
            self.bytes = max(0, _status_bytes("VmHWM") - before)


def available_bytes(device: Device) -> int:
    """What could be allocated now."""
    if device.kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + cached
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo: no MemAvailable")


def _reset_peak_resident_bytes() -> int | None:
    """Begin a new peak; what is resident now, None where the system does not allow it."""
    gc.collect()
    # Of what was freed, glibc keeps some: what uses it again would not show.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{PROCESS / 'status'}: no {name}")
