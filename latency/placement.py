"""A model measured where it lies in memory once: a whole request, or its phases one by one.

Several of these make a profile, see `latency.profile`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from latency.device import Device
from latency.reference import REQUESTS, References, reference_time
from latency.request import BURST_STEPS, Request
from latency.roofline import footprint_bytes
from latency.timer import (
    MIN_PLACEMENTS,
    MIN_ROUNDS,
    Measurement,
    Protocol,
    Samples,
    Timing,
    measure_interleaved,
    time_call,
    weighted_sum,
)


@dataclass(frozen=True)
class Placement:
    """What one placement gives, in both ways of measuring.

    references: their samples in ms; ratio: of the request to what is between them in the same
        round, a number and no time.
    timings: what it was measured in.
    """

    request: Measurement
    ttft: Measurement
    tpot: Measurement
    references: Samples
    ratio: Measurement
    timings: list[Timing]


def whole_round_ms(first_token_ms: float, steps_ms: float, references: References) -> float:
    """Roughly what a round of `measure_whole` takes: four first tokens, one with all steps."""
    return 4 * first_token_ms + steps_ms + references.estimate_ms()


def sampled_round_ms(
    first_token_ms: float, steps_ms: float, references: References, steps: int, protocol: Protocol
) -> float:
    """Roughly what a round of every phase of `measure_sampled` takes, each beside the references.

    steps: of the request, which take `steps_ms`.
    """
    share = min(1.0, protocol.num_contexts * BURST_STEPS / steps)
    phases = 1 + protocol.num_contexts
    return 2 * first_token_ms + share * steps_ms + phases * references.estimate_ms()


def interleaved_round_ms(
    functions: Mapping[str, Callable[[], object]],
    prepare: Mapping[str, Callable[[], object]],
    device: Device,
) -> float:
    """Roughly what a round of these functions takes; rather more, since they run cold."""

    def run() -> None:
        for name, function in functions.items():
            if name in prepare:
                prepare[name]()
            function()

    return time_call(run, device).ms


def num_placements(round_ms: float, seconds_to_make: float, protocol: Protocol) -> int:
    """As many as the protocol asks for and there is time for; one if that is too few to compare."""
    rounds = MIN_ROUNDS + protocol.warmup_rounds
    seconds = seconds_to_make + rounds * round_ms / 1000
    count = min(protocol.placements, int(protocol.max_seconds / seconds))
    return count if count >= MIN_PLACEMENTS else 1


def share_of(protocol: Protocol, placements: int) -> Protocol:
    """How carefully to measure in each of so many placements.

    Errors of rounds average out between placements: half of what is left for the interval is for
    them, the rest for what differs between placements.
    """
    return replace(
        protocol,
        max_seconds=protocol.max_seconds / placements,
        max_interval_percent=protocol.max_interval_percent * max(1.0, math.sqrt(placements) / 2),
    )


def pooled(times: Sequence[Placement], name: str, max_interval_percent: float) -> Measurement:
    """One of the quantities, over all placements."""
    return Measurement.from_placements(
        [getattr(each, name) for each in times], max_interval_percent
    )


def is_narrow(times: Sequence[Placement], max_interval_percent: float) -> bool:
    """Whether request and ratio are known as well as asked."""
    return all(pooled(times, name, max_interval_percent).converged for name in ("request", "ratio"))


def measure_whole(request: Request, references: References, protocol: Protocol) -> Placement:
    """Whole requests; they, and their ratio to the references, are asked to converge."""
    steps = request.workload.new_tokens - 1
    footprint = footprint_bytes(request.architecture, request.workload)
    cache_bytes = request.device.cache_bytes
    timing = measure_interleaved(
        references.functions | {"ttft": request.first_tokens, "request": request.run},
        request.device,
        protocol,
        prepare=references.prepare | dict.fromkeys(("ttft", "request"), request.warm_up),
        derive=lambda samples: {
            "request": samples["request"],
            "ratio": samples["request"] / reference_time(samples, footprint, cache_bytes),
        },
    )
    samples = timing.samples

    def measurement(values: np.ndarray) -> Measurement:
        return Measurement.from_samples(values, protocol.max_interval_percent, timing.quiet)

    return Placement(
        timing.measurements["request"],
        measurement(samples["ttft"]),
        measurement((samples["request"] - samples["ttft"]) / steps),
        samples,
        timing.measurements["ratio"],
        [timing],
    )


def measure_sampled(request: Request, references: References, protocol: Protocol) -> Placement:
    """The phases of a request one after the other, each beside the references."""
    phases = request.sampled(protocol.num_contexts)
    footprint = footprint_bytes(request.architecture, request.workload)
    share = replace(protocol, max_seconds=protocol.max_seconds / len(phases))
    terms: list[tuple[float, Measurement]] = []
    timings = []
    ratios: list[tuple[float, Measurement]] = []

    def wanted(samples: Samples) -> Samples:
        reference = reference_time(samples, footprint, request.device.cache_bytes)
        return {"phase": samples["phase"], "ratio": samples["phase"] / reference}

    for phase in phases:
        timing = measure_interleaved(
            references.functions | {"phase": phase.run},
            request.device,
            share,
            prepare=references.prepare | {"phase": phase.prepare},
            derive=wanted,
        )
        terms.append((phase.weight, timing.measurements["phase"]))
        timings.append(timing)
        ratios.append((phase.weight, timing.measurements["ratio"]))
    steps = request.workload.new_tokens - 1
    return Placement(
        weighted_sum(terms),
        terms[0][1],
        weighted_sum([(weight / steps, step) for weight, step in terms[1:]]),
        {name: np.concatenate([timing.samples[name] for timing in timings]) for name in REQUESTS},
        weighted_sum(ratios),
        timings,
    )
