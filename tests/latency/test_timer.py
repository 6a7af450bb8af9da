import gc
import json
import math
from collections.abc import Callable, Iterable
from itertools import cycle

import numpy as np
import pytest
import torch
from scipy.stats import binom

from latency.clock import Clock
from latency.gpu_monitor import GpuReading
from latency.timer import (
    MIN_ROUNDS,
    Measurement,
    Protocol,
    Round,
    Sample,
    _evaluate,
    drift_percent,
    measure_interleaved,
    median_interval,
    median_interval_rank,
    weighted_sum,
)
from slm.config import ConfigError, read


def measurement(median: float, low: float, high: float, **changes) -> Measurement:
    values = {"iqr_ms": 0.0, "n": 9, "converged": True, "quiet": True} | changes
    return Measurement(median_ms=median, low_ms=low, high_ms=high, **values)


class FakeClock(Clock):
    """Time as the timed functions tell it: each returns its own sample, and nothing sleeps.

    gpu_at: from seconds to the GPU's state.
    """

    def __init__(self, gpu_at: Callable[[float], GpuReading | None] = lambda seconds: None):
        self.seconds = 0.0
        self.gpu_at = gpu_at

    def time(self, function: Callable[[], Sample]) -> Sample:
        sample = function()
        self.seconds += sample.ms / 1000
        return sample

    def now_s(self) -> float:
        return self.seconds

    def read(self) -> GpuReading | None:
        return self.gpu_at(self.seconds)


def taking(times_ms: Iterable[float], quiet: Iterable[bool] = cycle([True])):
    """A function for the fake clock: its n-th call takes the n-th time."""
    calls = zip(times_ms, quiet, strict=False)

    def call() -> Sample:
        ms, is_quiet = next(calls)
        return Sample(ms, is_quiet, None if is_quiet else "cpu_taken")

    return call


def gpu(*reasons: str, clock: int = 1980, temperature: int = 60) -> GpuReading:
    return GpuReading(
        sm_clock_mhz=clock,
        temperature_c=temperature,
        power_w=500.0,
        reasons=frozenset(reasons),
        other_processes=0,
    )


# No time limit that matters, no interval that is narrow enough: as many rounds as are asked for.
def rounds_of(number: int, **changes) -> Protocol:
    values = {"max_interval_percent": 1e-9, "max_seconds": 1e9, "warmup_rounds": 1} | changes
    return Protocol(max_rounds=number, **values)


# Published ranks of the 95 % interval of a median (Conover, Practical Nonparametric Statistics).
@pytest.mark.parametrize(
    ("n", "rank"), [(5, None), (6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (30, 10)]
)
def test_ranks_are_those_of_the_tables(n, rank):
    assert median_interval_rank(n) == rank


@pytest.mark.parametrize("n", [*range(1, 60), 100, 999, 2000, 5000])
def test_ranks_are_the_largest_with_the_coverage(n):
    rank = median_interval_rank(n)
    if rank is None:
        assert binom.cdf(0, n, 0.5) > 0.025
    else:
        assert binom.cdf(rank - 1, n, 0.5) <= 0.025 < binom.cdf(rank, n, 0.5)


def test_interval_takes_order_statistics_whatever_their_order():
    assert median_interval(np.array([9.0, 1, 8, 2, 7, 3, 6, 4, 5, 10])) == (2.0, 9.0)
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)


def test_interval_covers_the_median_of_a_skewed_distribution():
    draws = np.random.default_rng(0).lognormal(size=(4000, 25))
    intervals = np.array([median_interval(samples) for samples in draws])
    covered = (intervals[:, 0] <= 1) & (intervals[:, 1] >= 1)
    # Exactly 1 − 2 P(Binomial(25, ½) < 8) = 0.9567; four standard errors.
    assert abs(covered.mean() - 0.9567) < 0.013


def test_measurement_of_known_samples():
    found = Measurement.from_samples(np.array([100.0, 101, 99, 100, 102, 98]), 2.0)
    assert (found.median_ms, found.low_ms, found.high_ms, found.n) == (100.0, 98.0, 102.0, 6)
    assert found.iqr_ms == pytest.approx(1.5)
    assert found.converged
    assert not Measurement.from_samples(np.array([100.0, 101, 99, 100, 102, 98]), 1.9).converged
    assert not Measurement.from_samples(np.array([100.0] * 5), 2.0).converged
    wide = np.array([100.0, 104, 96, 100, 104, 96])
    assert not Measurement.from_samples(wide, 20.0).converged
    assert Measurement.from_samples(wide, 20.0).half_width_percent == pytest.approx(4.0)
    # A difference that is not above zero is known to no percentage of itself.
    assert not Measurement.from_samples(np.array([-1.0] * 9), 2.0).converged


def test_an_interval_over_placements_covers_what_differs_between_them():
    random = np.random.default_rng(0)
    covered = covered_by_rounds = 0
    for _ in range(1000):
        # Where a model lies makes 2 %, a round differs by 3 %.
        medians = 100 + 2 * random.normal(size=(8, 1))
        rounds = medians + 3 * random.normal(size=(8, 25))
        found = Measurement.from_placements(
            [Measurement.from_samples(samples, 2.0) for samples in rounds], 2.0
        )
        covered += found.low_ms <= 100 <= found.high_ms
        low, high = median_interval(rounds.ravel())
        covered_by_rounds += low <= 100 <= high
    # Four standard errors around 95 %.
    assert abs(covered / 1000 - 0.95) < 0.028
    assert covered_by_rounds < 700


def test_placements_are_averaged_and_one_is_left_as_it_is():
    parts = [measurement(10.0 + k, 9.0, 14.0, n=5, iqr_ms=1.0 + k) for k in range(4)]
    found = Measurement.from_placements(parts, 2.0)
    assert (found.median_ms, found.n, found.iqr_ms, found.quiet) == (11.5, 20, 2.5, True)
    # Student's 97.5 % quantile for 3 degrees of freedom, from the tables.
    half_width = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found.low_ms, found.high_ms) == pytest.approx((11.5 - half_width, 11.5 + half_width))
    assert not found.converged
    assert Measurement.from_placements([parts[0]] * 4, 2.0).converged
    assert Measurement.from_placements(parts[:1], 2.0) is parts[0]
    disturbed = [*parts[:3], measurement(10.0, 9.0, 14.0, quiet=False)]
    assert not Measurement.from_placements(disturbed, 2.0).quiet


def test_measurement_survives_json_and_refuses_what_it_is_not():
    original = measurement(2.0, 1.5, 2.5)
    assert Measurement.from_dict(original.to_dict()) == original
    for wrong in (
        None,
        {},
        {**original.to_dict(), "median_ms": math.nan},
        {**original.to_dict(), "median_ms": "2"},
        {**original.to_dict(), "low_ms": 2.1},
        {**original.to_dict(), "more": 1},
    ):
        with pytest.raises(ValueError, match="measurement"):
            Measurement.from_dict(wrong)


def test_weighted_sum_adds_medians_and_squares_errors():
    total = weighted_sum(
        [
            (1, measurement(10.0, 7.0, 11.0, n=20)),
            (2, measurement(5.0, 3.0, 5.0, n=8, converged=False)),
        ]
    )
    assert total.median_ms == 20.0
    assert total.low_ms == pytest.approx(20.0 - 5.0)
    assert total.high_ms == pytest.approx(20.0 + 1.0)
    assert (total.n, total.converged, total.quiet) == (8, False, True)


def test_rounds_are_interleaved_and_turn_around(device, protocol):
    calls = []

    def called(name: str) -> Sample:
        calls.append(name)
        return Sample(1.0, is_quiet=True)

    functions = {name: lambda name=name: called(name) for name in "AB"}
    prepare = {"B": lambda: calls.append("b")}
    timing = measure_interleaved(functions, device, protocol, prepare=prepare, clock=FakeClock())
    assert "".join(calls) == "AbB" + "AbBbBA" * 3
    assert len(timing.samples["A"]) == len(timing.samples["B"]) == MIN_ROUNDS


def test_quantities_are_derived_round_by_round(device, protocol):
    def difference(samples):
        return {"difference": samples["B"] - samples["A"]}

    functions = {"A": lambda: None, "B": lambda: sum(range(20000))}
    timing = measure_interleaved(functions, device, protocol, derive=difference)
    expected = np.median(timing.samples["B"] - timing.samples["A"])
    assert set(timing.measurements) == {"difference"}
    assert timing.measurements["difference"].median_ms == expected > 0


def test_it_stops_when_narrow_and_says_so(device):
    loose = Protocol(max_interval_percent=1e6, max_seconds=60, max_rounds=2000)
    timing = measure_interleaved({"A": lambda: sum(range(50000))}, device, loose)
    assert timing.measurements["A"].n < 2000
    strict = Protocol(max_interval_percent=1e-9, max_seconds=60, max_rounds=20)
    found = measure_interleaved({"A": lambda: sum(range(50000))}, device, strict).measurements["A"]
    assert not found.converged
    assert found.n <= 20


def test_disturbed_rounds_are_left_out_while_enough_are_left():
    good = [Round({"A": Sample(1.0, True), "B": Sample(2.0, True)})] * MIN_ROUNDS
    bad = [Round({"A": Sample(1.0, True), "B": Sample(50.0, False)})] * 20
    timing = _evaluate(good + bad, Protocol(), None)
    assert timing.quiet
    assert timing.measurements["B"].median_ms == 2.0
    assert timing.measurements["B"].n == MIN_ROUNDS
    timing = _evaluate(good[1:] + bad, Protocol(), None)
    assert not timing.quiet
    assert timing.measurements["B"].median_ms == 50.0
    assert not timing.measurements["B"].quiet


NUM_ROUNDS = 400


def noise(seed: int, number: int = NUM_ROUNDS) -> np.ndarray:
    """Half a percent, in warm-up as in what is timed."""
    return np.random.default_rng(seed).normal(1, 0.005, 1 + number)


# From the second half on, everything takes a fifth longer, or two milliseconds more.
DRIFTS = {
    "ratio": lambda ms, is_late: ms * np.where(is_late, 1.2, 1),
    "difference": lambda ms, is_late: ms + np.where(is_late, 2.0, 0),
}


@pytest.mark.parametrize(("quantity", "expected"), [("ratio", 1.5), ("difference", 5.0)])
def test_drift_cancels_between_what_is_paired_and_is_reported(device, quantity, expected):
    is_late = np.arange(1 + NUM_ROUNDS) > NUM_ROUNDS // 2
    functions = {
        name: taking(DRIFTS[quantity](ms * noise(seed), is_late))
        for seed, (name, ms) in enumerate({"A": 10.0, "B": 15.0}.items())
    }

    def derive(samples):
        paired = {
            "ratio": samples["B"] / samples["A"],
            "difference": samples["B"] - samples["A"],
        }
        return {quantity: paired[quantity], "A": samples["A"]}

    timing = measure_interleaved(
        functions, device, rounds_of(NUM_ROUNDS), derive=derive, clock=FakeClock()
    )
    found = timing.measurements[quantity]
    assert found.n == NUM_ROUNDS
    assert found.low_ms < expected < found.high_ms
    assert (found.high_ms - found.low_ms) / expected < 0.01
    # Alone, it is somewhere between the two speeds.
    alone = timing.measurements["A"]
    assert (alone.high_ms - alone.low_ms) / alone.median_ms > 0.1
    assert drift_percent(timing.samples["A"]) == pytest.approx(20, abs=0.5)


def test_outliers_move_neither_the_median_nor_its_interval(device):
    times = 10 * noise(seed=0)
    times[::10] *= 10
    timing = measure_interleaved(
        {"A": taking(times)}, device, rounds_of(NUM_ROUNDS), clock=FakeClock()
    )
    found = timing.measurements["A"]
    assert found.median_ms == pytest.approx(10, rel=0.003)
    assert 9.95 < found.low_ms < found.high_ms < 10.05
    # As a mean would not have it.
    assert timing.samples["A"].mean() > 18


def test_time_is_up_when_the_clock_says_so(device):
    clock = FakeClock()
    protocol = Protocol(max_seconds=30, warmup_rounds=2)
    timing = measure_interleaved({"A": taking(cycle([1000, 2000]))}, device, protocol, clock=clock)
    found = timing.measurements["A"]
    # After 3 s of warm-up the 20th round ends at 30 s, not yet beyond the limit.
    assert (found.n, clock.seconds) == (21, 34)
    assert (found.converged, found.quiet, timing.repeats) == (False, True, 0)


def test_rounds_on_a_gpu_that_slows_itself_down_are_left_out(device):
    def gpu_at(seconds: float) -> GpuReading:
        if 0.105 < seconds < 0.205:
            return gpu("hw_thermal_slowdown", clock=1200, temperature=91)
        return gpu("gpu_idle")

    clock, times = FakeClock(gpu_at), cycle([9.0, 11.0])

    def call() -> Sample:
        return Sample(next(times) * (3 if gpu_at(clock.seconds).slowdowns else 1), is_quiet=True)

    timing = measure_interleaved({"A": call}, device, rounds_of(40), clock=clock)
    assert (timing.quiet, timing.repeats) == (True, 0)
    # The one in which it became hot, and the four that began so: at 109, 142, 169 and 202 ms.
    assert timing.disturbed_rounds == {"hw_thermal_slowdown": 5}
    assert len(timing.samples["A"]) == 35
    assert set(timing.samples["A"]) == {9.0, 11.0}
    assert json.loads(json.dumps(timing.gpu.to_dict())) == {
        "median_sm_clock_mhz": 1980,
        "max_temperature_c": 91,
        "median_power_w": 500.0,
        "reasons": ["gpu_idle", "hw_thermal_slowdown"],
        "max_other_processes": 0,
    }


@pytest.mark.parametrize("max_repeats", [0, 2])
def test_a_measurement_without_enough_quiet_rounds_is_repeated_and_then_says_so(
    device, max_repeats
):
    clock = FakeClock(lambda seconds: gpu("sw_power_cap"))
    protocol = Protocol(max_seconds=0.995, max_repeats=max_repeats, warmup_rounds=1)
    timing = measure_interleaved({"A": taking(cycle([10.0]))}, device, protocol, clock=clock)
    assert (timing.quiet, timing.measurements["A"].quiet) == (False, False)
    assert timing.repeats == max_repeats
    assert timing.disturbed_rounds == {"sw_power_cap": 100 * (1 + max_repeats)}
    assert timing.measurements["A"].n == 100
    assert clock.seconds == pytest.approx(0.01 + 1 + max_repeats)


def test_a_measurement_that_recovers_is_quiet_and_holds_the_second_attempt_alone(device):
    # The warm-up's round, the 20 of the first attempt but five, then nothing any more.
    is_quiet = [True] + [True] * 5 + [False] * 15 + [True] * 20
    times = [7.0] * 21 + [10.0] * 20
    timing = measure_interleaved(
        {"A": taking(times, is_quiet)}, device, rounds_of(20), clock=FakeClock()
    )
    assert (timing.quiet, timing.repeats, timing.gpu) == (True, 1, None)
    assert timing.disturbed_rounds == {"cpu_taken": 15}
    assert set(timing.samples["A"]) == {10.0}
    assert timing.measurements["A"].quiet


def test_threads_and_garbage_collection_are_as_before(device, protocol):
    torch.set_num_threads(2)
    seen = []

    def look() -> None:
        seen.append((torch.get_num_threads(), gc.isenabled()))

    measure_interleaved({"A": look}, device, protocol)
    assert set(seen) == {(1, False)}
    assert torch.get_num_threads() == 2
    assert gc.isenabled()


def test_drift_compares_the_halves():
    assert drift_percent(np.array([10.0, 10, 10, 11, 11, 11])) == pytest.approx(10.0)


def test_every_problem_of_a_protocol_is_named():
    with pytest.raises(ConfigError) as error:
        read(
            Protocol,
            {
                "max_seconds": 0,
                "max_rounds": 5,
                "placements": 0,
                "max_repeats": -1,
                "warmup_rounds": 0,
                "num_contexts": 0,
            },
        )
    assert error.value.problems == [
        "max_seconds: must be > 0, got 0.0",
        "placements: must be >= 1, got 0",
        "max_rounds: must be >= 6, got 5",
        "max_repeats: must be >= 0, got -1",
        "warmup_rounds: must be >= 1, got 0",
        "num_contexts: must be >= 1, got 0",
    ]
