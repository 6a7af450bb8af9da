"""One architecture, whole, measured on this device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from latency.device import Device
from latency.request import Request, reference_request
from latency.timer import (
    CpuMeter,
    Measurement,
    Protocol,
    Samples,
    drift_percent,
    measure_interleaved,
    quiet,
    weighted_sum,
)
from latency.workload import Workload
from slm.architecture import Architecture

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a device does with an architecture under a workload.

    request_ms: from the prompt to the last new token.
    ttft_ms: time to first token: the prompt's prefill and the choice of a token.
    tpot_ms: time per output token, (request − ttft) / (new_tokens − 1).
    reference_ms: the fixed reference request that ran interleaved; drift_percent: by how much it
        became slower from the first half of the run to the second.
    request_per_reference: the request as a multiple of the reference in the same round: what can
        be compared between runs while the machine was not equally fast.
    method: 'whole' requests, or decoding steps 'sampled' at several contexts and integrated.
    compile_unit: what was compiled as one; 'eager' is nothing.
    state_bytes: of the whole batch, at the end of the request.
    peak_memory_bytes: of the device's allocator, weights included; None on a CPU.
    other_cpus_busy: CPUs that other processes kept busy meanwhile, on average.
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
    method: Literal["whole", "sampled"]
    compile_unit: Literal["eager"]
    parameters: int
    state_bytes: int
    peak_memory_bytes: int | None
    other_cpus_busy: float
    seed: int

    @property
    def tokens_per_s(self) -> tuple[float, float, float]:
        """New tokens of the whole batch per second of the request: median, low, high."""
        tokens = self.workload.batch_size * self.workload.new_tokens
        request = self.request_ms
        low, median, high = (
            1000 * tokens / ms for ms in (request.high_ms, request.median_ms, request.low_ms)
        )
        return median, low, high

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, value in values.items():
            if isinstance(value, Measurement):
                values[name] = value.to_dict()
            elif isinstance(value, Workload | Protocol):
                values[name] = dict(vars(value))
        values["architecture"] = str(self.architecture)
        values["digest"] = self.architecture.digest
        values["device"] = self.device.describe()
        values["tokens_per_s"] = dict(
            zip(("median", "low", "high"), self.tokens_per_s, strict=True)
        )
        return values


@dataclass(frozen=True)
class _Times:
    """What is common to both ways of measuring; `reference` are samples in ms."""

    request: Measurement
    ttft: Measurement
    tpot: Measurement
    reference: np.ndarray
    request_per_reference: float


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
    request = Request(architecture, workload, device, seed)
    reference = reference_request(device)
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with quiet(device):
        meter = CpuMeter()
        is_whole = request.estimate_ms() <= 1000 * protocol.max_request_seconds
        times = (_measure_whole if is_whole else _measure_sampled)(request, reference, protocol)
        other_cpus_busy = meter.others_busy()
    context = architecture.meta_tokens + workload.max_tokens
    state_bytes = architecture.state_bytes(context, BYTES_PER_VALUE[workload.dtype])
    return Profile(
        architecture=architecture,
        workload=workload,
        device=device,
        protocol=protocol,
        request_ms=times.request,
        ttft_ms=times.ttft,
        tpot_ms=times.tpot,
        reference_ms=Measurement.from_samples(
            times.reference, protocol.max_interval_percent, times.request.quiet
        ),
        drift_percent=drift_percent(times.reference),
        request_per_reference=times.request_per_reference,
        method="whole" if is_whole else "sampled",
        compile_unit="eager",
        parameters=architecture.parameters(),
        state_bytes=workload.batch_size * state_bytes,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if device.kind == "cuda" else None,
        other_cpus_busy=other_cpus_busy,
        seed=seed,
    )


def _measure_whole(request: Request, reference: Request, protocol: Protocol) -> _Times:
    """Whole requests; what is asked to converge is the request's time."""
    steps = request.workload.new_tokens - 1
    functions = {
        "reference": reference.run,
        "ttft": request.first_token,
        "request": request.run,
    }
    timing = measure_interleaved(
        functions, request.device, protocol, derive=lambda samples: {"request": samples["request"]}
    )
    samples = timing.samples

    def measurement(values: np.ndarray) -> Measurement:
        return Measurement.from_samples(values, protocol.max_interval_percent, timing.quiet)

    return _Times(
        timing.measurements["request"],
        measurement(samples["ttft"]),
        measurement((samples["request"] - samples["ttft"]) / steps),
        samples["reference"],
        float(np.median(samples["request"] / samples["reference"])),
    )


def _measure_sampled(request: Request, reference: Request, protocol: Protocol) -> _Times:
    """The phases of a request one after the other, each beside the reference."""
    phases = request.sampled(protocol.num_contexts)
    share = replace(protocol, max_seconds=protocol.max_seconds / len(phases))
    terms: list[tuple[float, Measurement]] = []
    references = []
    request_per_reference = 0.0

    def phase_only(samples: Samples) -> Samples:
        return {"phase": samples["phase"]}

    for phase in phases:
        timing = measure_interleaved(
            {"reference": reference.run, "phase": phase.run},
            request.device,
            share,
            prepare={"phase": phase.prepare},
            derive=phase_only,
        )
        terms.append((phase.weight, timing.measurements["phase"]))
        references.append(timing.samples["reference"])
        ratios = timing.samples["phase"] / timing.samples["reference"]
        request_per_reference += phase.weight * float(np.median(ratios))
    steps = request.workload.new_tokens - 1
    return _Times(
        weighted_sum(terms),
        terms[0][1],
        weighted_sum([(weight / steps, step) for weight, step in terms[1:]]),
        np.concatenate(references),
        request_per_reference,
    )
