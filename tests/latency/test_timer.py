import gc
import math
import time

import numpy as np
import pytest
import torch
from scipy.stats import binom

from latency.timer import (
    MIN_ROUNDS,
    Measurement,
    Protocol,
    Sample,
    _evaluate,
    drift_percent,
    measure_interleaved,
    median_interval,
    median_interval_rank,
    time_call,
    weighted_sum,
)
from slm.config import ConfigError, read


def measurement(median: float, low: float, high: float, **changes) -> Measurement:
    values = {"iqr_ms": 0.0, "n": 9, "converged": True, "quiet": True} | changes
    return Measurement(median_ms=median, low_ms=low, high_ms=high, **values)


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
    # A difference that is not above zero is known to no percentage of itself.
    assert not Measurement.from_samples(np.array([-1.0] * 9), 2.0).converged


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
    functions = {name: lambda name=name: calls.append(name) for name in "AB"}
    prepare = {"B": lambda: calls.append("b")}
    timing = measure_interleaved(functions, device, protocol, prepare=prepare)
    assert "".join(calls) == "AbB" + "AbBbBA" * 3
    assert len(timing.samples["A"]) == len(timing.samples["B"]) <= MIN_ROUNDS


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
    assert timing.measurements["A"].converged
    strict = Protocol(max_interval_percent=1e-9, max_seconds=60, max_rounds=20)
    found = measure_interleaved({"A": lambda: sum(range(50000))}, device, strict).measurements["A"]
    assert not found.converged
    assert found.n <= 20


def test_disturbed_rounds_are_left_out_while_enough_are_left():
    good = [{"A": Sample(1.0, True), "B": Sample(2.0, True)}] * MIN_ROUNDS
    bad = [{"A": Sample(1.0, True), "B": Sample(50.0, False)}] * 20
    timing = _evaluate(good + bad, Protocol(), None)
    assert timing.quiet
    assert timing.measurements["B"].median_ms == 2.0
    assert timing.measurements["B"].n == MIN_ROUNDS
    timing = _evaluate(good[1:] + bad, Protocol(), None)
    assert not timing.quiet
    assert timing.measurements["B"].median_ms == 50.0
    assert not timing.measurements["B"].quiet


def test_a_call_during_which_our_thread_did_not_run_is_disturbed(device):
    sample = time_call(lambda: time.sleep(0.02), device)
    assert not sample.is_quiet
    assert sample.ms >= 20


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
        read(Protocol, {"max_seconds": 0, "max_rounds": 5, "warmup_rounds": 0, "num_contexts": 0})
    assert error.value.problems == [
        "max_seconds: must be > 0, got 0.0",
        "max_rounds: must be >= 6, got 5",
        "warmup_rounds: must be >= 1, got 0",
        "num_contexts: must be >= 1, got 0",
    ]
