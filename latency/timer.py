"""The measuring protocol: how a time becomes a number that can be trusted.

- Everything is run before it is timed (warm-up), and stays hot: weights that fit a cache are in it.
- What is compared runs interleaved (A B, B A, A B, …), so that a machine that gets slower or
  faster does so for all alike; paired differences cancel the drift.
- Rounds go on until the 95 % interval of the median is narrow enough, or time is up; the result
  says which. The interval comes from order statistics and assumes nothing about the noise but
  that rounds are independent; stopping as soon as it is narrow makes it slightly optimistic.
- A round in which something else took the CPU from us, or the GPU slowed itself down (heat, power),
  is left out. A measurement with too few other rounds is refused and repeated; one that never got
  enough says so.
- Where data lies in memory, and with it how caches serve it, is drawn anew every time a model is
  made, and makes a percent or two. A model that is quickly made is measured in several placements;
  the interval comes from how far these differ, which holds what lasts for seconds, too.
- While timing, the device lock is held exclusively, the CPU's thread count is pinned and Python's
  garbage collection is off.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from latency.clock import Clock, Sample, clock_of
from latency.device import Device
from latency.gpu_monitor import GpuConditions, GpuReading
from latency.lock import device_lock
from slm.compilation import compiler_problems
from slm.config import ConfigError, schema
from slm.decoding_step import CompileUnit
from slm.runtime import thread_count

# Fewer samples have no 95 % interval of the median: 2 · 0.5⁶ < 0.05 < 2 · 0.5⁵.
MIN_ROUNDS = 6
# Fewer placements are not enough for an interval: then there is one, with that of its rounds.
MIN_PLACEMENTS = 4
# A median whose interval is wider than this to each side has not converged, whatever was asked for.
WIDEST_PERCENT = 3.0

Samples = Mapping[str, np.ndarray]


@schema
class Protocol:
    """How long and how carefully to measure.

    max_interval_percent: half width of the median's 95 % interval at which a measurement is done.
    max_seconds: time for a measurement; after it, the record says that it did not converge.
    placements: how often at least the model that is measured is made anew, with up to
        `max_seconds` / `placements` for each; as often as there is time, or not at all, where
        making or running it takes longer.
    max_rounds: most samples of a measurement.
    max_repeats: how often a measurement that was disturbed is repeated, `max_seconds` each time.
    warmup_rounds: untimed rounds before the first sample.
    compile_unit: what the decoder that is timed compiles as one, see `slm.decoding_step`:
        'operator' lets all architectures share what is compiled, 'step' is what is delivered.
    max_request_seconds: a request that takes longer is not run whole: decoding steps are timed at
        `num_contexts` evenly spaced contexts and integrated.
    """

    max_interval_percent: float = 2.0
    max_seconds: float = 2.0
    placements: int = 8
    max_rounds: int = 2000
    max_repeats: int = 2
    warmup_rounds: int = 2
    compile_unit: CompileUnit = "eager"
    max_request_seconds: float = 1.0
    num_contexts: int = 8

    def __post_init__(self) -> None:
        problems = [
            f"{name}: must be > 0, got {getattr(self, name)}"
            for name in ("max_interval_percent", "max_seconds", "max_request_seconds")
            if getattr(self, name) <= 0
        ]
        problems += [
            f"{name}: must be >= {least}, got {getattr(self, name)}"
            for name, least in (
                ("placements", 1),
                ("max_rounds", MIN_ROUNDS),
                ("max_repeats", 0),
                ("warmup_rounds", 1),
                ("num_contexts", 1),
            )
            if getattr(self, name) < least
        ]
        if self.compile_unit != "eager":
            problems += compiler_problems("compile_unit", self.compile_unit)
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A median in milliseconds with its 95 % interval.

    iqr_ms: distance between the quartiles of the samples; n: number of samples.
    converged: whether the interval became as narrow as asked, and than WIDEST_PERCENT.
    quiet: whether the samples are of undisturbed rounds; if not, the figures are too high.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    iqr_ms: float
    n: int
    converged: bool
    quiet: bool

    @classmethod
    def from_samples(
        cls, samples: np.ndarray, max_interval_percent: float, quiet: bool = True
    ) -> Measurement:
        """The median of samples in ms; fewer than MIN_ROUNDS give their range, not converged."""
        low, high = median_interval(samples)
        lower_quartile, median, upper_quartile = np.quantile(samples, [0.25, 0.5, 0.75])
        is_narrow = (high - low) / 2 <= _narrow(max_interval_percent) * median
        return cls(
            median_ms=float(median),
            low_ms=low,
            high_ms=high,
            iqr_ms=float(upper_quartile - lower_quartile),
            n=len(samples),
            converged=bool(len(samples) >= MIN_ROUNDS and is_narrow),
            quiet=quiet,
        )

    @classmethod
    def from_placements(
        cls, placements: Sequence[Measurement], max_interval_percent: float
    ) -> Measurement:
        """One measurement from those of several placements: the mean of their medians.

        Its interval is Student's, from how far they differ; of one placement, that of its rounds.
        """
        from scipy.special import stdtrit

        if len(placements) == 1:
            return placements[0]
        medians = np.array([each.median_ms for each in placements])
        mean, count = medians.mean(), len(medians)
        half_width = stdtrit(count - 1, 0.975) * medians.std(ddof=1) / math.sqrt(count)
        return cls(
            median_ms=float(mean),
            low_ms=float(mean - half_width),
            high_ms=float(mean + half_width),
            iqr_ms=float(np.mean([each.iqr_ms for each in placements])),
            n=sum(each.n for each in placements),
            converged=bool(half_width <= _narrow(max_interval_percent) * mean),
            quiet=all(each.quiet for each in placements),
        )

    @classmethod
    def from_dict(cls, values: Any) -> Measurement:
        """What `to_dict` gave. Raises ValueError if it is not that."""
        names = {each.name for each in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"measurement: expected {sorted(names)}, got {values!r}")
        times = [values[name] for name in ("low_ms", "median_ms", "high_ms", "iqr_ms")]
        if not all(isinstance(time, int | float) and math.isfinite(time) for time in times):
            raise ValueError(f"measurement: not finite: {values!r}")
        if not values["low_ms"] <= values["median_ms"] <= values["high_ms"]:
            raise ValueError(f"measurement: median outside of its interval: {values!r}")
        return cls(**values)

    @property
    def half_width_percent(self) -> float:
        """Of the interval, as a share of the median; infinite where that is not above zero."""
        if self.median_ms <= 0:
            return math.inf
        return 100 * (self.high_ms - self.low_ms) / 2 / self.median_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def _narrow(max_interval_percent: float) -> float:
    """The share of a median that half its interval may be."""
    return min(max_interval_percent, WIDEST_PERCENT) / 100


def weighted_sum(terms: Iterable[tuple[float, Measurement]]) -> Measurement:
    """Σ weight · measurement; errors of different terms are taken as independent."""
    weights, parts = zip(*terms, strict=True)
    median = math.fsum(w * part.median_ms for w, part in zip(weights, parts, strict=True))

    def spread(distances: Iterable[float]) -> float:
        return math.hypot(*(w * d for w, d in zip(weights, distances, strict=True)))

    return Measurement(
        median_ms=median,
        low_ms=median - spread(part.median_ms - part.low_ms for part in parts),
        high_ms=median + spread(part.high_ms - part.median_ms for part in parts),
        iqr_ms=spread(part.iqr_ms for part in parts),
        n=min(part.n for part in parts),
        converged=all(part.converged for part in parts),
        quiet=all(part.quiet for part in parts),
    )


@functools.cache
def median_interval_rank(n: int) -> int | None:
    """Rank k, from 1, so that the k-th smallest and the k-th largest of n samples hold the median.

    The largest k with P(Binomial(n, ½) < k) <= 2.5 %, whatever the distribution of the samples;
    None if there is none.
    """
    rank, ways, total = 0, 1, 1
    # In integers, 2.5 % being 1 / 40: 2^n is beyond floats for large n.
    while 40 * total <= 2**n:
        rank += 1
        ways = ways * (n - rank + 1) // rank
        total += ways
    return rank or None


def median_interval(samples: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the median of independent samples; their range if they are too few."""
    ordered = np.sort(samples)
    rank = median_interval_rank(len(ordered)) or 1
    return float(ordered[rank - 1]), float(ordered[-rank])


@dataclass(frozen=True)
class Timing:
    """What `measure_interleaved` found.

    samples: ms by function, one per round that counts; measurements: by quantity.
    quiet: whether the rounds that count were undisturbed.
    repeats: how often the measurement was refused and begun anew.
    disturbed_rounds: their number by what disturbed them, the refused attempts' included.
    gpu: the GPU meanwhile, in the attempt that counts; None on a CPU.
    """

    samples: Samples
    measurements: dict[str, Measurement]
    quiet: bool
    repeats: int = 0
    disturbed_rounds: dict[str, int] = field(default_factory=dict)
    gpu: GpuConditions | None = None


@dataclass(frozen=True)
class Round:
    """Every function timed once; readings: of the GPU before and after, none on a CPU."""

    samples: Mapping[str, Sample]
    readings: tuple[GpuReading, ...] = ()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing disturbed it."""
        is_slow = any(reading.slowdowns for reading in self.readings)
        return not is_slow and all(sample.is_quiet for sample in self.samples.values())

    @property
    def disturbances(self) -> set[str]:
        """Names of what disturbed it."""
        names = {sample.disturbance for sample in self.samples.values() if sample.disturbance}
        return names.union(*(reading.slowdowns for reading in self.readings))


def measure_interleaved(
    functions: Mapping[str, Callable[[], object]],
    device: Device,
    protocol: Protocol,
    *,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    derive: Callable[[Samples], Samples] | None = None,
    clock: Clock | None = None,
) -> Timing:
    """Time functions in turn, round by round, until every quantity is known well enough.

    prepare: by function, what runs, untimed, before each of its calls.
    derive: from samples by function to samples by quantity (a difference, say), whose medians are
        wanted; None: the functions' own times.
    clock: None takes the device's.
    """
    clock = clock or clock_of(device)
    prepare = prepare or {}
    attempts: list[list[Round]] = []
    with quiet(device):
        for number in range(protocol.warmup_rounds):
            _time_once(functions, prepare, clock, is_forward=number % 2 == 0)
        while True:
            rounds, timing = _attempt(functions, prepare, derive, protocol, clock)
            attempts.append(rounds)
            if timing.quiet or len(attempts) > protocol.max_repeats:
                break
    readings = [reading for each in rounds for reading in each.readings]
    every_round = itertools.chain.from_iterable(attempts)
    return replace(
        timing,
        repeats=len(attempts) - 1,
        disturbed_rounds=dict(Counter(name for each in every_round for name in each.disturbances)),
        gpu=GpuConditions.from_readings(readings) if readings else None,
    )


def _attempt(
    functions: Mapping[str, Callable[[], object]],
    prepare: Mapping[str, Callable[[], object]],
    derive: Callable[[Samples], Samples] | None,
    protocol: Protocol,
    clock: Clock,
) -> tuple[list[Round], Timing]:
    """Rounds until every quantity is known well enough or time is up, and what they say."""
    rounds: list[Round] = []
    before = clock.read()
    deadline_s = clock.now_s() + protocol.max_seconds
    while True:
        samples = _time_once(functions, prepare, clock, is_forward=len(rounds) % 2 == 0)
        after = clock.read()
        rounds.append(Round(samples, tuple(each for each in (before, after) if each)))
        before = after
        count = len(rounds)
        is_over = count >= protocol.max_rounds or clock.now_s() > deadline_s
        # Every round while they are few, then at every tenth more: looking costs time too.
        is_time_to_look = is_over or count % (1 + count // 10) == 0
        if count < MIN_ROUNDS or not is_time_to_look:
            continue
        timing = _evaluate(rounds, protocol, derive)
        is_done = timing.quiet and all(
            each.half_width_percent <= protocol.max_interval_percent
            for each in timing.measurements.values()
        )
        if is_done or is_over:
            return rounds, timing


def _time_once(
    functions: Mapping[str, Callable[[], object]],
    prepare: Mapping[str, Callable[[], object]],
    clock: Clock,
    is_forward: bool,
) -> dict[str, Sample]:
    """Every function once: A B or, backward, B A, so that none always runs in another's wake."""
    samples = {}
    for name in functions if is_forward else reversed(list(functions)):
        if name in prepare:
            prepare[name]()
        samples[name] = clock.time(functions[name])
    return samples


def _evaluate(
    rounds: list[Round],
    protocol: Protocol,
    derive: Callable[[Samples], Samples] | None,
) -> Timing:
    undisturbed = [each.samples for each in rounds if each.is_quiet]
    is_quiet = len(undisturbed) >= MIN_ROUNDS
    counted = undisturbed if is_quiet else [each.samples for each in rounds]
    samples = {name: np.array([each[name].ms for each in counted]) for name in counted[0]}
    quantities = derive(samples) if derive else samples
    percent = protocol.max_interval_percent
    measurements = {
        name: Measurement.from_samples(x, percent, is_quiet) for name, x in quantities.items()
    }
    return Timing(samples, measurements, is_quiet)


def time_call(function: Callable[[], object], device: Device) -> Sample:
    """Time one call by the device's clock."""
    return clock_of(device).time(function)


@contextmanager
def quiet(device: Device) -> Iterator[None]:
    """The device for us alone: its lock, its thread count, no garbage collection."""
    with ExitStack() as stack:
        stack.enter_context(device_lock(name=device.lock_name))
        stack.enter_context(thread_count(device.threads))
        if gc.isenabled():
            gc.collect()
            gc.disable()
            stack.callback(gc.enable)
        yield


class CpuMeter:
    """How busy other processes keep the machine's CPUs from now on.

    Beside a busy neighbour a CPU is slower even where nothing takes it from us.
    """

    def __init__(self) -> None:
        self._begin = self._read()

    def others_busy(self) -> float:
        """CPUs busy with other processes, on average since the start."""
        elapsed, busy, own = (
            now - then for now, then in zip(self._read(), self._begin, strict=True)
        )
        return max(0.0, (busy - own) / elapsed)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: of the wall clock, of all CPUs' work, of this process's."""
        import psutil

        times = psutil.cpu_times()
        return time.monotonic(), times.user + times.system, time.process_time()


def drift_percent(samples: np.ndarray) -> float:
    """By how much the median of the second half of the samples is above that of the first."""
    first, second = np.array_split(samples, 2)
    return float((np.median(second) / np.median(first) - 1) * 100)
