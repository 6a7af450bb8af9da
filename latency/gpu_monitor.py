"""What an NVIDIA GPU does to its own speed while something is timed on it.

Read through NVML, by the GPU's UUID, whatever CUDA_VISIBLE_DEVICES says. A reading is of one
moment, power of the driver's last interval: a slow-down that comes and goes between two readings
is not seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

# NVML's bits of what holds a GPU's clocks down at the moment.
REASONS = {
    0x001: "gpu_idle",
    0x002: "application_clocks",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake",
    0x100: "display_clocks",
}
# Those that make what is timed meanwhile worthless. Clocks that somebody has set are as they should
# be, and an idle GPU is what is seen between two calls.
SLOWDOWNS = frozenset(REASONS.values()) - {"gpu_idle", "application_clocks", "display_clocks"}


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """A GPU at one moment; None stands for what it does not tell.

    reasons: what holds its clocks down.
    other_processes: those that have a CUDA context there, besides this one; they need not compute.
    """

    sm_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    reasons: frozenset[str] | None
    other_processes: int | None

    @property
    def slowdowns(self) -> frozenset[str]:
        """The reasons that make a time measured now worthless."""
        return SLOWDOWNS & (self.reasons or frozenset())


@dataclass(frozen=True, kw_only=True)
class GpuConditions:
    """A GPU over a measurement; None stands for what it does not tell.

    reasons: all that held its clocks down at some time, sorted.
    """

    median_sm_clock_mhz: float | None
    max_temperature_c: int | None
    median_power_w: float | None
    reasons: tuple[str, ...] | None
    max_other_processes: int | None

    @classmethod
    def from_readings(cls, readings: Iterable[GpuReading]) -> GpuConditions:
        """The summary of readings, of which there may be none."""
        readings = list(readings)

        def told(name: str) -> list[Any]:
            values = (getattr(reading, name) for reading in readings)
            return [value for value in values if value is not None]

        clocks, powers, reasons = told("sm_clock_mhz"), told("power_w"), told("reasons")
        return cls(
            median_sm_clock_mhz=statistics.median(clocks) if clocks else None,
            max_temperature_c=max(told("temperature_c"), default=None),
            median_power_w=statistics.median(powers) if powers else None,
            reasons=tuple(sorted(frozenset().union(*reasons))) if reasons else None,
            max_other_processes=max(told("other_processes"), default=None),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = asdict(self)
        return values | {"reasons": None if self.reasons is None else list(self.reasons)}


class GpuMonitor:
    """Reads one GPU.

    uuid: as torch gives it, without 'GPU-'.

    Raises pynvml.NVMLError if there is no NVIDIA driver or no such GPU.
    """

    def __init__(self, uuid: str) -> None:
        import pynvml

        # For as long as the process lives: NVML counts those who use it.
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self) -> GpuReading:
        """The GPU now. Raises pynvml.NVMLError if the GPU is lost."""
        import pynvml

        power_mw = self._ask(pynvml.nvmlDeviceGetPowerUsage)
        reasons = self._ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons)
        processes = self._ask(pynvml.nvmlDeviceGetComputeRunningProcesses)
        return GpuReading(
            sm_clock_mhz=self._ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            temperature_c=self._ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1000,
            reasons=None if reasons is None else reason_names(reasons),
            # One of them is this process, under a number that may not be its own in a container.
            other_processes=None if processes is None else max(0, len(processes) - 1),
        )

    def _ask(self, question: Callable[..., Any], *arguments: int) -> Any:
        """The answer, or None where the GPU, the driver or the user's rights leave it out."""
        import pynvml

        try:
            return question(self._handle, *arguments)
        except (
            pynvml.NVMLError_NotSupported,
            pynvml.NVMLError_NoPermission,
            pynvml.NVMLError_FunctionNotFound,
        ):
            return None


def reason_names(bits: int) -> frozenset[str]:
    """NVML's bits as names; one without a name here by its number ('0x200')."""
    single = (1 << place for place in range(bits.bit_length()))
    return frozenset(REASONS.get(bit, f"{bit:#x}") for bit in single if bits & bit)
