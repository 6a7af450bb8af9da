import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency.reference import (
    KNEE,
    LARGE,
    REQUESTS,
    SMALL,
    References,
    ReferenceTimes,
    measure_references,
    reference_time,
)
from latency.roofline import footprint_bytes, step_bytes
from latency.workload import Workload
from slm.architecture import Architecture

MS = st.floats(0.01, 1e4)
TIMES = st.builds(
    lambda small, large, cache_bytes: ReferenceTimes({SMALL: small, LARGE: large}, cache_bytes),
    MS,
    MS,
    st.sampled_from([2**19, 2**20, 2**21, 50 * 2**20]),
)
BYTES = st.integers(1, 10**12)
CACHE = {"cache_bytes": 2**20}


def test_a_footprint_is_what_the_step_in_the_middle_of_the_answer_reads():
    architecture = Architecture.parse(
        "width=16 vocab_size=32 meta_tokens=3 | attention(head_dim=8) ffn"
    )
    workload = Workload(prompt_tokens=10, new_tokens=21)
    assert footprint_bytes(architecture, workload) == step_bytes(
        architecture, workload, 3 + 10 + 11
    )


def test_one_reference_is_smaller_than_caches_and_one_larger():
    small, large = (footprint_bytes(*request) for request in REQUESTS.values())
    for cache_bytes in (2**20, 2**21):
        assert small < KNEE[0] * cache_bytes
        assert large > KNEE[1] * cache_bytes


@given(TIMES, BYTES)
def test_it_goes_from_the_small_one_to_the_large_one_on_a_line_of_logarithms(times, footprint):
    fitting, beyond = (share * times.cache_bytes for share in KNEE)
    slope, constant = np.polyfit(np.log([fitting, beyond]), np.log(list(times.ms.values())), deg=1)
    inside = min(max(footprint, fitting), beyond)
    assert times.at(footprint) == pytest.approx(math.exp(constant + slope * math.log(inside)))


@given(TIMES)
def test_what_the_cache_holds_is_as_the_small_one_and_what_it_does_not_as_the_large_one(times):
    assert times.at(KNEE[0] * times.cache_bytes / 2) == pytest.approx(times.ms[SMALL])
    assert times.at(KNEE[1] * times.cache_bytes * 2) == pytest.approx(times.ms[LARGE])


@given(TIMES, TIMES, BYTES)
def test_rounds_are_taken_each_by_itself(first, second, footprint):
    samples = {name: np.array([first.ms[name], second.ms[name]]) for name in REQUESTS}
    expected = [
        ReferenceTimes(each.ms, first.cache_bytes).at(footprint) for each in (first, second)
    ]
    assert reference_time(samples, footprint, first.cache_bytes) == pytest.approx(expected)


@given(TIMES, MS, st.floats(-1, 1), st.floats(0.1, 10), BYTES)
def test_times_of_a_slower_machine_are_brought_to_the_speed_of_before(
    before, request_ms, power, factor, footprint
):
    """The more of a step the cache does not hold, the more it is slowed down: by bytes^power."""
    fitting, beyond = (share * before.cache_bytes for share in KNEE)

    def slower(footprint_bytes):
        inside = min(max(footprint_bytes, fitting), beyond)
        return factor * (inside / fitting) ** power

    ms = {SMALL: before.ms[SMALL] * slower(fitting), LARGE: before.ms[LARGE] * slower(beyond)}
    now = ReferenceTimes(ms, before.cache_bytes)
    measured_ms = request_ms * slower(footprint)
    scale = before.scale(measured_ms, measured_ms / now.at(footprint), footprint)
    assert scale * measured_ms == pytest.approx(request_ms)


@given(TIMES)
def test_times_are_read_back(times):
    assert ReferenceTimes.from_dict(times.to_dict()) == times


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (None, "expected"),
        ({SMALL: 1.0}, "expected"),
        ({"reference_ms": 1.0}, "expected"),
        (dict.fromkeys(REQUESTS, 1.0), "expected"),
        (dict.fromkeys(REQUESTS, 0.0) | CACHE, "small reference: must be > 0, got 0.0"),
        (dict.fromkeys(REQUESTS, math.nan) | CACHE, "must be > 0, got nan"),
        (dict.fromkeys(REQUESTS, "1") | CACHE, "must be > 0, got '1'"),
        (dict.fromkeys(REQUESTS, 1.0) | {"cache_bytes": 0}, "cache_bytes: must be > 0, got 0"),
    ],
)
def test_what_are_no_times_is_refused(values, problem):
    with pytest.raises(ValueError, match=f"reference_times.*{problem}"):
        ReferenceTimes.from_dict(values)


def test_they_are_measured_in_turn(device, protocol):
    times = measure_references(device, protocol)
    assert all(ms > 0 for ms in times.ms.values())
    references = References(device)
    assert list(references.functions) == list(times.ms) == list(REQUESTS)
    # Each by its own request, as a model's is.
    assert references.prepare == {
        name: run.__self__.warm_up for name, run in references.functions.items()
    }
    assert references.estimate_ms() > 0
