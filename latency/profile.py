"""One architecture, whole, measured on this device."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from latency.device import Device
from latency.gpu_monitor import GpuConditions
from latency.lock import device_lock
from latency.memory import PeakMemory
from latency.request import BURST_STEPS, Request, reference_request
from latency.roofline import Peaks, Roofline, roofline
from latency.timer import (
    MIN_PLACEMENTS,
    MIN_ROUNDS,
    CpuMeter,
    Measurement,
    Protocol,
    Samples,
    Timing,
    drift_percent,
    measure_interleaved,
    quiet,
    weighted_sum,
)
from latency.workload import Workload
from slm.architecture import Architecture
from slm.decoding_step import CompileUnit


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a device does with an architecture under a workload.

    request_ms: from the prompt to the last new token.
    ttft_ms: time to first token: the prompt's prefill and the choice of a token.
    tpot_ms: time per output token, (request − ttft) / (new_tokens − 1).
    reference_ms: the fixed reference request that ran interleaved; drift_percent: by how much it
        became slower from the first half of the run to the second.
    request_per_reference: the request as a multiple of the reference in the same round: what can
        be compared between runs while the machine was not equally fast; and the 95 % interval of
        that.
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
    reference_ms: Measurement
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
    def middle_context(self) -> int:
        """Tokens that the step in the middle of the answer sees, meta tokens included."""
        return (
            self.architecture.meta_tokens
            + self.workload.prompt_tokens
            + (self.workload.new_tokens + 1) // 2
        )

    @property
    def tokens_per_s(self) -> tuple[float, float, float]:
        """New tokens of the whole batch per second of the request: median, low, high."""
        tokens = self.workload.batch_size * self.workload.new_tokens
        request = self.request_ms
        low, median, high = (
            1000 * tokens / ms for ms in (request.high_ms, request.median_ms, request.low_ms)
        )
        return median, low, high

    def roofline(self, peaks: Peaks) -> Roofline:
        """The time per output token beside what the device could do at best."""
        return roofline(
            self.architecture,
            self.workload,
            self.middle_context,
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
        values["gpu"] = [each.to_dict() for each in self.gpu]
        values["request_per_reference_interval"] = list(self.request_per_reference_interval)
        values["architecture"] = str(self.architecture)
        values["digest"] = self.architecture.digest
        values["device"] = self.device.describe()
        values["tokens_per_s"] = dict(
            zip(("median", "low", "high"), self.tokens_per_s, strict=True)
        )
        return values


@dataclass(frozen=True)
class _Times:
    """What one placement gives, in both ways of measuring; `reference` are samples in ms.

    ratio: of the request to the reference in the same round, a number and no time.
    timings: what it was measured in.
    """

    request: Measurement
    ttft: Measurement
    tpot: Measurement
    reference: np.ndarray
    ratio: Measurement
    timings: list[Timing]


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
    protocol = protocol or Protocol()
    unit = protocol.compile_unit
    # What is compiled is compiled under the lock too: it would disturb others that measure.
    with device_lock(name=device.lock_name):
        reference = reference_request(device, unit)
        if unit != "eager":
            # Once for the compiler, whose memory is not the model's.
            Request(architecture, workload, device, unit, seed)
        memory = PeakMemory()
        with memory.measured(device) as restart, quiet(device):
            begin_s = time.monotonic()
            request = Request(architecture, workload, device, unit, seed)
            # Building takes more: weights are drawn in fp32.
            restart()
            is_whole = request.estimate_ms() <= 1000 * protocol.max_request_seconds
            measure = _measure_whole if is_whole else _measure_sampled
            placements = _num_placements(request, is_whole, time.monotonic() - begin_s, protocol)
            share = _share(protocol, placements)
            meter = CpuMeter()
            begin_s = time.monotonic()
            times = [measure(request, reference, share)]
        # Kept until as many others were made, so that each gets memory of its own.
        held = deque([(request, reference)], maxlen=placements)
        with quiet(device):
            while len(times) < placements or (
                placements > 1
                and time.monotonic() - begin_s < protocol.max_seconds
                and not _is_narrow(times, protocol.max_interval_percent)
            ):
                request = Request(architecture, workload, device, unit, seed)
                held.append((request, reference_request(device, unit)))
                times.append(measure(*held[-1], share))
            other_cpus_busy = meter.others_busy()
    context = architecture.meta_tokens + workload.max_tokens
    state_bytes = architecture.state_bytes(context, workload.torch_dtype.itemsize)
    percent = protocol.max_interval_percent
    request_ms, ratio = _pooled(times, "request", percent), _pooled(times, "ratio", percent)
    reference_samples = np.concatenate([each.reference for each in times])
    timings = [timing for each in times for timing in each.timings]
    return Profile(
        architecture=architecture,
        workload=workload,
        device=device,
        protocol=protocol,
        request_ms=request_ms,
        ttft_ms=_pooled(times, "ttft", percent),
        tpot_ms=_pooled(times, "tpot", percent),
        reference_ms=Measurement.from_samples(reference_samples, percent, request_ms.quiet),
        drift_percent=drift_percent(reference_samples),
        request_per_reference=ratio.median_ms,
        request_per_reference_interval=(ratio.low_ms, ratio.high_ms),
        method="whole" if is_whole else "sampled",
        compile_unit=unit,
        parameters=architecture.parameters(),
        state_bytes=workload.batch_size * state_bytes,
        peak_memory_bytes=memory.bytes,
        other_cpus_busy=other_cpus_busy,
        placements=len(times),
        repeats=sum(timing.repeats for timing in timings),
        disturbed_rounds=dict(
            sum((Counter(timing.disturbed_rounds) for timing in timings), Counter())
        ),
        gpu=tuple(timing.gpu for timing in timings if timing.gpu),
        seed=seed,
    )


def _num_placements(
    request: Request, is_whole: bool, seconds_to_make: float, protocol: Protocol
) -> int:
    """As many as the protocol asks for and there is time for; one if that is too few to compare."""
    round_ms = request.estimate_ms()
    if is_whole:
        # The reference and the first token come to less than another request.
        round_ms *= 2
    else:
        steps = request.workload.new_tokens - 1
        round_ms *= min(1.0, protocol.num_contexts * BURST_STEPS / steps)
    rounds = MIN_ROUNDS + protocol.warmup_rounds
    seconds = seconds_to_make + rounds * round_ms / 1000
    count = min(protocol.placements, int(protocol.max_seconds / seconds))
    return count if count >= MIN_PLACEMENTS else 1


def _share(protocol: Protocol, placements: int) -> Protocol:
    """How carefully to measure in each of so many placements.

    Errors of rounds average out between placements: half of what is left for the interval is for
    them, the rest for what differs between placements.
    """
    return replace(
        protocol,
        max_seconds=protocol.max_seconds / placements,
        max_interval_percent=protocol.max_interval_percent * max(1.0, math.sqrt(placements) / 2),
    )


def _pooled(times: list[_Times], name: str, max_interval_percent: float) -> Measurement:
    """One of the quantities, over all placements."""
    return Measurement.from_placements(
        [getattr(each, name) for each in times], max_interval_percent
    )


def _is_narrow(times: list[_Times], max_interval_percent: float) -> bool:
    """Whether request and ratio are known as well as asked."""
    return all(
        _pooled(times, name, max_interval_percent).converged for name in ("request", "ratio")
    )


def _measure_whole(request: Request, reference: Request, protocol: Protocol) -> _Times:
    """Whole requests; they, and their ratio to the reference, are asked to converge."""
    steps = request.workload.new_tokens - 1
    functions = {
        "reference": reference.run,
        "ttft": request.first_token,
        "request": request.run,
    }
    timing = measure_interleaved(
        functions,
        request.device,
        protocol,
        prepare={"reference": reference.run},
        derive=lambda samples: {
            "request": samples["request"],
            "ratio": samples["request"] / samples["reference"],
        },
    )
    samples = timing.samples

    def measurement(values: np.ndarray) -> Measurement:
        return Measurement.from_samples(values, protocol.max_interval_percent, timing.quiet)

    return _Times(
        timing.measurements["request"],
        measurement(samples["ttft"]),
        measurement((samples["request"] - samples["ttft"]) / steps),
        samples["reference"],
        timing.measurements["ratio"],
        [timing],
    )


def _measure_sampled(request: Request, reference: Request, protocol: Protocol) -> _Times:
    """The phases of a request one after the other, each beside the reference."""
    phases = request.sampled(protocol.num_contexts)
    share = replace(protocol, max_seconds=protocol.max_seconds / len(phases))
    terms: list[tuple[float, Measurement]] = []
    timings = []
    ratios: list[tuple[float, Measurement]] = []

    def wanted(samples: Samples) -> Samples:
        return {"phase": samples["phase"], "ratio": samples["phase"] / samples["reference"]}

    for phase in phases:
        timing = measure_interleaved(
            {"reference": reference.run, "phase": phase.run},
            request.device,
            share,
            prepare={"reference": reference.run, "phase": phase.prepare},
            derive=wanted,
        )
        terms.append((phase.weight, timing.measurements["phase"]))
        timings.append(timing)
        ratios.append((phase.weight, timing.measurements["ratio"]))
    steps = request.workload.new_tokens - 1
    return _Times(
        weighted_sum(terms),
        terms[0][1],
        weighted_sum([(weight / steps, step) for weight, step in terms[1:]]),
        np.concatenate([timing.samples["reference"] for timing in timings]),
        weighted_sum(ratios),
        timings,
    )
