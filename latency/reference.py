"""What runs beside every measurement and says how fast the machine is at the moment.

A shared machine is not equally fast from minute to minute, and not for all alike: a model that the
core's own caches hold feels the clock, a larger one what neighbours do to the caches behind, too.
So two requests run in every round, one far smaller and one far larger than those caches. Between
their times, over the bytes that a step of each reads, goes a straight line, both scales being
logarithmic; where it is at a model's own bytes is the time that the model's is a multiple of.

None in between: a model that just fills a cache is in it or is not, by where its pages lie. On a
Xeon, such a request's time as a multiple of those of ten models varied by 8 % from process to
process, that of the large one by 3 %, and between small and large by 1.3 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from latency.device import Device
from latency.lock import device_lock
from latency.request import Request, decoding
from latency.roofline import footprint_bytes
from latency.timer import Protocol, measure_interleaved, time_call
from latency.workload import Workload
from slm.architecture import Architecture
from slm.compile_ahead import Decoding
from slm.decoding_step import CompileUnit

SMALL, LARGE = "small reference", "large reference"

# Half the 95 % interval of what moves all models alike, as multiples of the references, from one
# process to another: neither rounds nor placements of one process show it. Ten models measured
# again half an hour later (benchmarks/repeatability.py) had moved by 1.1 % on average while the
# machine's speed had changed by 3 to 9 %; by 5.9 % once while it had changed by 8 to 29 %.
BETWEEN_RUNS_PERCENT = 1.5

# The same everywhere. A step of the small one reads what a core's own caches hold, of the large one
# several times as much.
REQUESTS = {
    SMALL: (
        Architecture.parse("width=64 vocab_size=256 | attention(head_dim=32) ffn"),
        Workload(prompt_tokens=16, new_tokens=32),
    ),
    LARGE: (
        Architecture.parse("width=256 vocab_size=8192 | attention(head_dim=32) ffn"),
        Workload(prompt_tokens=1, new_tokens=9),
    ),
}


def reference_time(samples: Mapping[str, np.ndarray], footprint_bytes: float) -> np.ndarray:
    """What a reference of such a footprint would take, in each round of the references' samples.

    Below the small one's footprint as there, above the large one's as there.
    """
    logs = [
        weight * np.log(samples[name])
        for name, weight in zip(REQUESTS, _weights(footprint_bytes), strict=True)
    ]
    time: np.ndarray = np.exp(np.sum(logs, axis=0))
    return time


def _weights(footprint_bytes: float) -> np.ndarray:
    """Of the references' logarithmic times in the line between them."""
    small, large = _places()
    share = np.clip((math.log(footprint_bytes) - small) / (large - small), 0.0, 1.0)
    return np.array([1.0 - share, share])


@cache
def _places() -> np.ndarray:
    """Logarithms of the references' footprints."""
    return np.log([footprint_bytes(*request) for request in REQUESTS.values()])


@dataclass(frozen=True)
class ReferenceTimes:
    """What the references take at one machine speed, in ms by name."""

    ms: dict[str, float]

    @classmethod
    def from_samples(cls, samples: Mapping[str, np.ndarray]) -> ReferenceTimes:
        """Their medians."""
        return cls({name: float(np.median(samples[name])) for name in REQUESTS})

    @classmethod
    def from_dict(cls, values: Any) -> ReferenceTimes:
        """What `to_dict` gave. Raises ValueError if it is not that."""
        if not isinstance(values, dict) or set(values) != set(REQUESTS):
            raise ValueError(f"reference_times: expected {list(REQUESTS)}, got {values!r}")
        for name, ms in values.items():
            if not isinstance(ms, float) or not 0 < ms < math.inf:
                raise ValueError(f"reference_times.{name}: must be > 0, got {ms!r}")
        return cls(values)

    def at(self, footprint_bytes: float) -> float:
        """What a reference of such a footprint would take."""
        samples = {name: np.array(ms) for name, ms in self.ms.items()}
        return float(reference_time(samples, footprint_bytes))

    def scale(
        self, request_ms: float, request_per_reference: float, footprint_bytes: float
    ) -> float:
        """By what times that were measured beside other references are multiplied to hold here."""
        return request_per_reference * self.at(footprint_bytes) / request_ms

    def slower(self, factor: float) -> ReferenceTimes:
        """What they take where everything takes `factor` times as long."""
        return ReferenceTimes({name: factor * ms for name, ms in self.ms.items()})

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return dict(self.ms)


class References:
    """The reference requests on a device, to be run beside what is measured.

    What ran before must not show in their times: each runs twice, and the second time counts. Else
    the large one is the slower the more runs in a round and the more neighbours want of the cache
    that cores share: 10 to 13 ms in a busy hour of a Xeon, and 8 to 9 the second time.
    """

    def __init__(self, device: Device, compile_unit: CompileUnit = "eager") -> None:
        requests = {
            name: Request(*request, device, compile_unit) for name, request in REQUESTS.items()
        }
        self.functions: dict[str, Callable[[], object]] = {
            name: request.run for name, request in requests.items()
        }
        self.prepare = dict(self.functions)
        self._device = device

    def estimate_ms(self) -> float:
        """Roughly what they take in a round."""
        for run in self.functions.values():
            run()
        return sum(2 * time_call(run, self._device).ms for run in self.functions.values())


def measure_references(device: Device, protocol: Protocol) -> ReferenceTimes:
    """What they take now."""
    with device_lock(name=device.lock_name):
        references = References(device, protocol.compile_unit)
        timing = measure_interleaved(
            references.functions, device, protocol, prepare=references.prepare
        )
    return ReferenceTimes.from_samples(timing.samples)


def reference_decodings(device: Device, compile_unit: CompileUnit) -> list[Decoding]:
    """What the references decode, to be compiled before."""
    return [decoding(*request, device, compile_unit) for request in REQUESTS.values()]
