"""Architectures, whole, measured on this device."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from latency.device import Device
from latency.gpu_monitor import GpuConditions
from latency.lock import device_lock
from latency.memory import PeakMemory
from latency.placement import (
    Placement,
    is_narrow,
    measure_sampled,
    measure_whole,
    num_placements,
    pooled,
    sampled_round_ms,
    share_of,
    whole_round_ms,
)
from latency.reference import (
    BETWEEN_RUNS_PERCENT,
    REQUESTS,
    References,
    ReferenceTimes,
    reference_time,
)
from latency.request import Request
from latency.roofline import Peaks, Roofline, footprint_bytes, middle_context, roofline
from latency.timer import CpuMeter, Measurement, Protocol, drift_percent, quiet
from latency.workload import Workload
from slm.architecture import Architecture
from slm.decoding_step import CompileUnit


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a device does with an architecture under a workload.

    request_ms: from the prompt to the last new token.
    ttft_ms: time to first token: the prompt's prefill and the choice of a token.
    tpot_ms: time per output token, (request − ttft) / (new_tokens − 1).
    reference_times: of the references that ran interleaved, see `latency.reference`;
        reference_ms: between them, at the model's own `footprint_bytes`; drift_percent: by how much
        that became slower from the first half of the run to the second.
    request_per_reference: the request as a multiple of that in the same round: what can be compared
        between runs while the machine was not equally fast; and the 95 % interval of it, which
        holds what differs between runs, see `latency.reference`.
    method: 'whole' requests, or decoding steps 'sampled' at several contexts and integrated.
    compile_unit: what was compiled as one; 'eager' is nothing.
    state_bytes: of the whole batch, at the end of the request.
    peak_memory_bytes: the most that it took at one time, weights included, once they were there;
        see `latency.memory`.
    other_cpus_busy: CPUs that other processes kept busy meanwhile, on average.
    placements: how many times the model was made to be measured, see `Protocol`.
    repeats: how often a measurement was disturbed and begun anew; disturbed_rounds: rounds by what
        disturbed them.
    gpu: the GPU during each measurement; empty on a CPU.
    cache_state: 'hot': every weight had just been used, and what fits a cache was in it.
    """

    architecture: Architecture
    workload: Workload
    device: Device
    protocol: Protocol
    request_ms: Measurement
    ttft_ms: Measurement
    tpot_ms: Measurement
    reference_times: ReferenceTimes
    reference_ms: Measurement
    footprint_bytes: int
    drift_percent: float
    request_per_reference: float
    request_per_reference_interval: tuple[float, float]
    method: Literal["whole", "sampled"]
    compile_unit: CompileUnit
    parameters: int
    state_bytes: int
    peak_memory_bytes: int | None
    other_cpus_busy: float
    placements: int
    repeats: int
    disturbed_rounds: dict[str, int]
    gpu: tuple[GpuConditions, ...]
    seed: int
    cache_state: Literal["hot"] = "hot"

    @property
    def tokens_per_s(self) -> tuple[float, float, float]:
        """New tokens of the whole batch per second of the request: median, low, high."""
        tokens = self.workload.batch_size * self.workload.new_tokens
        request = self.request_ms
        low, median, high = (
            1000 * tokens / ms for ms in (request.high_ms, request.median_ms, request.low_ms)
        )
        return median, low, high

    def scale(self, reference_times: ReferenceTimes) -> float:
        """By what its times are multiplied to hold at the machine speed of other references."""
        return reference_times.scale(
            self.request_ms.median_ms, self.request_per_reference, self.footprint_bytes
        )

    def roofline(self, peaks: Peaks) -> Roofline:
        """The time per output token beside what the device could do at best."""
        return roofline(
            self.architecture,
            self.workload,
            middle_context(self.architecture, self.workload),
            self.tpot_ms.median_ms,
            peaks,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, value in values.items():
            if isinstance(value, Measurement):
                values[name] = value.to_dict()
            elif isinstance(value, Workload | Protocol):
                values[name] = dict(vars(value))
        values["reference_times"] = self.reference_times.to_dict()
        values["gpu"] = [each.to_dict() for each in self.gpu]
        values["request_per_reference_interval"] = list(self.request_per_reference_interval)
        values["architecture"] = str(self.architecture)
        values["digest"] = self.architecture.digest
        values["device"] = self.device.describe()
        values["tokens_per_s"] = dict(
            zip(("median", "low", "high"), self.tokens_per_s, strict=True)
        )
        return values


def profile(
    architecture: Architecture,
    workload: Workload,
    device: Device,
    protocol: Protocol | None = None,
    seed: int = 0,
) -> Profile:
    """Measure a whole model by the Decoder, with random weights and random tokens.

    A request that takes longer than `protocol.max_request_seconds` is sampled, not run.
    """
    (found,) = profile_in_turn([architecture], workload, device, protocol, seed)
    return found


def profile_in_turn(
    architectures: Iterable[Architecture],
    workload: Workload,
    device: Device,
    protocol: Protocol | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Profile]:
    """Measure several models, a placement of each after the other, until all are known.

    What changes on the machine for seconds or minutes is then in all figures alike, and in their
    intervals, where models that are measured one by one have each their own minute. `progress` is
    told which is about to be measured for the first time.
    """
    protocol = protocol or Protocol()
    every = [_Profiling(each, workload, device, protocol, seed) for each in architectures]
    # Kept until as many others were made, so that each gets memory of its own.
    held: deque[object] = deque(maxlen=protocol.placements)
    for number, each in enumerate(every, start=1):
        if progress:
            progress(f"whole model {number} of {len(every)}: {each.architecture}")
        made = each.begin()
        if not each.is_done:
            held.append(made)
    with quiet(device):
        while unknown := [each for each in every if not each.is_done]:
            for each in unknown:
                held.append(each.go_on())
    return [each.result() for each in every]


class _Profiling:
    """A model that is being measured, placement by placement."""

    def __init__(
        self,
        architecture: Architecture,
        workload: Workload,
        device: Device,
        protocol: Protocol,
        seed: int,
    ) -> None:
        self.architecture, self.workload, self.device = architecture, workload, device
        self.protocol, self.seed = protocol, seed
        self.memory, self.placements = PeakMemory(), list[Placement]()
        # Spent on its placements, all else that is done meanwhile not counted.
        self.seconds = 0.0

    def begin(self) -> object:
        """Measure in the first placement; what occupies it."""
        unit = self.protocol.compile_unit
        # What is compiled is compiled under the lock too: it would disturb others that measure.
        with device_lock(name=self.device.lock_name):
            references = References(self.device, unit)
            if unit != "eager":
                # Once for the compiler, whose memory is not the model's.
                self._request()
            with self.memory.measured(self.device) as restart, quiet(self.device):
                begin_s = time.monotonic()
                request = self._request()
                # Building takes more: weights are drawn in fp32.
                restart()
                first_token_ms, steps_ms = request.estimate_ms()
                limit_ms = 1000 * self.protocol.max_request_seconds
                self.is_whole = first_token_ms + steps_ms <= limit_ms
                if self.is_whole:
                    round_ms = whole_round_ms(first_token_ms, steps_ms, references)
                else:
                    steps = self.workload.new_tokens - 1
                    round_ms = sampled_round_ms(
                        first_token_ms, steps_ms, references, steps, self.protocol
                    )
                seconds = time.monotonic() - begin_s
                self.num_placements = num_placements(round_ms, seconds, self.protocol)
                self.meter = CpuMeter()
                return self._measure(request, references)

    def go_on(self) -> object:
        """Measure in one more placement; what occupies it."""
        unit = self.protocol.compile_unit
        return self._measure(self._request(), References(self.device, unit))

    @property
    def is_done(self) -> bool:
        """Whether it is known as well as asked, or its time is up."""
        if len(self.placements) < self.num_placements:
            return False
        return (
            self.num_placements == 1
            or self.seconds >= self.protocol.max_seconds
            or is_narrow(self.placements, self.protocol.max_interval_percent)
        )

    def _request(self) -> Request:
        unit = self.protocol.compile_unit
        return Request(self.architecture, self.workload, self.device, unit, self.seed)

    def _measure(self, request: Request, references: References) -> object:
        measure = measure_whole if self.is_whole else measure_sampled
        begin_s = time.monotonic()
        share = share_of(self.protocol, self.num_placements)
        self.placements.append(measure(request, references, share))
        self.seconds += time.monotonic() - begin_s
        return request, references

    def result(self) -> Profile:
        """What all placements say."""
        architecture, workload = self.architecture, self.workload
        percent = self.protocol.max_interval_percent
        request_ms, ttft_ms, tpot_ms, ratio = (
            pooled(self.placements, name, percent) for name in ("request", "ttft", "tpot", "ratio")
        )
        samples = {
            name: np.concatenate([each.references[name] for each in self.placements])
            for name in REQUESTS
        }
        footprint = footprint_bytes(architecture, workload)
        reference_samples = reference_time(samples, footprint, self.device.cache_bytes)
        context = architecture.meta_tokens + workload.max_tokens
        state_bytes = architecture.state_bytes(context, workload.torch_dtype.itemsize)
        timings = [timing for each in self.placements for timing in each.timings]
        return Profile(
            architecture=architecture,
            workload=workload,
            device=self.device,
            protocol=self.protocol,
            request_ms=request_ms,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            reference_times=ReferenceTimes.from_samples(samples, self.device.cache_bytes),
            reference_ms=Measurement.from_samples(reference_samples, percent, request_ms.quiet),
            footprint_bytes=footprint,
            drift_percent=drift_percent(reference_samples),
            request_per_reference=ratio.median_ms,
            request_per_reference_interval=_between_runs(ratio),
            method="whole" if self.is_whole else "sampled",
            compile_unit=self.protocol.compile_unit,
            parameters=architecture.parameters(),
            state_bytes=workload.batch_size * state_bytes,
            peak_memory_bytes=self.memory.bytes,
            other_cpus_busy=self.meter.others_busy(),
            placements=len(self.placements),
            repeats=sum(timing.repeats for timing in timings),
            disturbed_rounds=dict(
                sum((Counter(timing.disturbed_rounds) for timing in timings), Counter())
            ),
            gpu=tuple(timing.gpu for timing in timings if timing.gpu),
            seed=self.seed,
        )


def _between_runs(ratio: Measurement) -> tuple[float, float]:
    """The interval of a multiple of the references, to be compared with that of another run."""
    between = BETWEEN_RUNS_PERCENT / 100 * ratio.median_ms
    low, high = (
        math.hypot(each - ratio.median_ms, between) for each in (ratio.low_ms, ratio.high_ms)
    )
    return ratio.median_ms - low, ratio.median_ms + high
