"""How long one call takes on a device, and whether anything disturbed it meanwhile."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from latency.device import Device
from latency.gpu_monitor import GpuMonitor, GpuReading

# Share of the time that our thread must have run for a call to count as undisturbed.
QUIET_SHARE = 0.95


@dataclass(frozen=True)
class Sample:
    """One call.

    is_quiet: whether the call was undisturbed; disturbance: the name of what disturbed it.
    """

    ms: float
    is_quiet: bool
    disturbance: str | None = None


class Clock(ABC):
    """What the measuring protocol knows of time: all of it, so that a test can make it up."""

    @abstractmethod
    def time(self, function: Callable[[], object]) -> Sample:
        """Time one call."""

    def now_s(self) -> float:
        """Seconds since some moment in the past, for time limits."""
        return time.monotonic()

    def read(self) -> GpuReading | None:
        """The state of the GPU that is timed; None where there is none."""
        return None


class CpuClock(Clock):
    """The wall clock, beside the time that our thread ran."""

    def time(self, function: Callable[[], object]) -> Sample:
        """Time one call; 'cpu_taken' disturbs it if our thread did not run nearly all the while."""
        begin, begin_own = time.perf_counter_ns(), time.thread_time_ns()
        function()
        own, elapsed = time.thread_time_ns() - begin_own, time.perf_counter_ns() - begin
        is_quiet = own >= QUIET_SHARE * elapsed
        return Sample(elapsed / 1e6, is_quiet, None if is_quiet else "cpu_taken")


class CudaClock(Clock):
    """Two events on the current stream, one before the call and one after it.

    uuid: of the current GPU, which `read` asks.
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid

    def time(self, function: Callable[[], object]) -> Sample:
        """Time one call. What disturbs it shows in readings around it, not in the call itself."""
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return Sample(float(start.elapsed_time(end)), is_quiet=True)

    def read(self) -> GpuReading:
        """The GPU now. Raises pynvml.NVMLError if the driver does not answer."""
        return self._monitor.read()

    @functools.cached_property
    def _monitor(self) -> GpuMonitor:
        return GpuMonitor(self._uuid)


@functools.cache
def clock_of(device: Device) -> Clock:
    """The clock of a device."""
    return CudaClock(device.uuid) if device.kind == "cuda" else CpuClock()
