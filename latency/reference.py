"""What runs beside every measurement and says how fast the machine is at the moment.

A shared machine is not equally fast from minute to minute, and not for all alike: a model that the
core's own caches hold feels the clock, a larger one what neighbours do to the caches behind, too.
So two requests run in every round: one far smaller than those caches, and one that is like the
models that they do not hold. A model's time is a multiple of the small one's if a core's own cache
holds what its step reads, of the large one's if that is clearly more than the cache, and of what
lies between both on the way from the one to the other.

On a Xeon (cache of 2 MiB) ten models of 1.1 to 6.6 MB and both references were measured by 25
processes one after the other, in 54 rounds each. In these 16 minutes the models' medians varied by
4.8 % (standard deviation), as multiples of this by 1.4, of the large one's alone by 1.7, of the
small one's by 2.4. By 2.2 to 3.2 % they varied where more of both was what Python does for a prompt
and the large one was 9 steps that are all bandwidth (11 MB, two layers).

No reference in between: a model that just fills a cache is in it or is not, by where its pages lie.
Such a request's time as a multiple of those of ten models varied by 8 % from process to process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from latency.device import Device
from latency.lock import device_lock
from latency.request import Request, decoding
from latency.timer import Protocol, measure_interleaved, time_call
from latency.workload import Workload
from slm.architecture import Architecture
from slm.compile_ahead import Decoding
from slm.decoding_step import CompileUnit

SMALL, LARGE = "small reference", "large reference"

# Of the device's `cache_bytes`, what a step reads: up to the first share it feels what the small
# one feels, from the second on what the large one does.
KNEE = (0.4, 1.5)

# Half the 95 % interval of what moves a model's multiple of the references from one process to
# another: neither rounds nor placements of one process show it. Ten models measured again half an
# hour later (benchmarks/repeatability.py) had moved by 1.4 % (root mean square) on a shared machine
# that had become 9 to 18 % faster, and by 2.0 % when it had become 6 to 16 % slower; together by
# 0.9 and 1.1: a standard deviation of 1.2 % for a run, noise of rounds and placements included.
BETWEEN_RUNS_PERCENT = 2.0

# The same everywhere. A step of the small one reads what a core's own caches hold, of the large one
# twice as much and more. Almost all of both is decoding steps, as of the requests beside them.
REQUESTS = {
    SMALL: (
        Architecture.parse("width=64 vocab_size=256 | attention(head_dim=32) ffn"),
        Workload(prompt_tokens=1, new_tokens=48),
    ),
    LARGE: (
        Architecture.parse("width=128 vocab_size=4096 | " + 3 * "attention(head_dim=32) ffn "),
        Workload(prompt_tokens=1, new_tokens=32),
    ),
}


def reference_time(
    samples: Mapping[str, np.ndarray], footprint_bytes: float, cache_bytes: int
) -> np.ndarray:
    """What a reference of such a footprint would take, in each round of the references' samples.

    cache_bytes: of the device, see `latency.device.Device`.
    """
    low, high = (math.log(share * cache_bytes) for share in KNEE)
    large = np.clip((math.log(footprint_bytes) - low) / (high - low), 0.0, 1.0)
    time: np.ndarray = samples[SMALL] ** (1 - large) * samples[LARGE] ** large
    return time


@dataclass(frozen=True)
class ReferenceTimes:
    """What the references take at one machine speed, in ms by name; and the device's cache."""

    ms: dict[str, float]
    cache_bytes: int

    @classmethod
    def from_samples(cls, samples: Mapping[str, np.ndarray], cache_bytes: int) -> ReferenceTimes:
        """Their medians."""
        return cls({name: float(np.median(samples[name])) for name in REQUESTS}, cache_bytes)

    @classmethod
    def from_dict(cls, values: Any) -> ReferenceTimes:
        """What `to_dict` gave. Raises ValueError if it is not that."""
        names = [*REQUESTS, "cache_bytes"]
        if not isinstance(values, dict) or set(values) != set(names):
            raise ValueError(f"reference_times: expected {names}, got {values!r}")
        for name, value in values.items():
            kind = int if name == "cache_bytes" else float
            if type(value) is not kind or not 0 < value < math.inf:
                raise ValueError(f"reference_times.{name}: must be > 0, got {value!r}")
        return cls({name: values[name] for name in REQUESTS}, values["cache_bytes"])

    def at(self, footprint_bytes: float) -> float:
        """What a reference of such a footprint would take."""
        samples = {name: np.array(ms) for name, ms in self.ms.items()}
        return float(reference_time(samples, footprint_bytes, self.cache_bytes))

    def scale(
        self, request_ms: float, request_per_reference: float, footprint_bytes: float
    ) -> float:
        """By what times that were measured beside other references are multiplied to hold here."""
        return request_per_reference * self.at(footprint_bytes) / request_ms

    def slower(self, factor: float) -> ReferenceTimes:
        """What they take where everything takes `factor` times as long."""
        return replace(self, ms={name: factor * ms for name, ms in self.ms.items()})

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return self.ms | {"cache_bytes": self.cache_bytes}


class References:
    """The reference requests on a device, to be run beside what is measured.

    They are warmed up as that is: what ran before must not show in their times.
    """

    def __init__(self, device: Device, compile_unit: CompileUnit = "eager") -> None:
        requests = {
            name: Request(*request, device, compile_unit) for name, request in REQUESTS.items()
        }
        self.functions: dict[str, Callable[[], object]] = {
            name: request.run for name, request in requests.items()
        }
        self.prepare: dict[str, Callable[[], object]] = {
            name: request.warm_up for name, request in requests.items()
        }
        self._device = device

    def estimate_ms(self) -> float:
        """Roughly what they take in a round."""
        for prepare in self.prepare.values():
            prepare()
        functions = [*self.prepare.values(), *self.functions.values()]
        return sum(time_call(function, self._device).ms for function in functions)


def measure_references(device: Device, protocol: Protocol) -> ReferenceTimes:
    """What they take now."""
    with device_lock(name=device.lock_name):
        references = References(device, protocol.compile_unit)
        timing = measure_interleaved(
            references.functions, device, protocol, prepare=references.prepare
        )
    return ReferenceTimes.from_samples(timing.samples, device.cache_bytes)


def reference_decodings(device: Device, compile_unit: CompileUnit) -> list[Decoding]:
    """What the references decode, to be compiled before."""
    return [decoding(*request, device, compile_unit) for request in REQUESTS.values()]
