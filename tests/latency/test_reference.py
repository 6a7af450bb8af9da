import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency.reference import (
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
    lambda ms: ReferenceTimes(dict(zip(REQUESTS, ms, strict=True))),
    st.lists(MS, min_size=len(REQUESTS), max_size=len(REQUESTS)),
)
BYTES = st.integers(1, 10**12)
FOOTPRINTS = np.array([footprint_bytes(*request) for request in REQUESTS.values()])


def test_a_footprint_is_what_the_step_in_the_middle_of_the_answer_reads():
    architecture = Architecture.parse(
        "width=16 vocab_size=32 meta_tokens=3 | attention(head_dim=8) ffn"
    )
    workload = Workload(prompt_tokens=10, new_tokens=21)
    assert footprint_bytes(architecture, workload) == step_bytes(
        architecture, workload, 3 + 10 + 11
    )


def test_one_reference_is_smaller_than_caches_and_one_larger():
    small, large = FOOTPRINTS
    assert small < 2**19
    assert large > 2**23


@given(TIMES, BYTES)
def test_it_is_the_line_between_the_logarithms(times, footprint):
    slope, constant = np.polyfit(np.log(FOOTPRINTS), np.log(list(times.ms.values())), deg=1)
    inside = min(max(footprint, FOOTPRINTS[0]), FOOTPRINTS[-1])
    assert times.at(footprint) == pytest.approx(math.exp(constant + slope * math.log(inside)))


@given(TIMES, TIMES, BYTES)
def test_rounds_are_taken_each_by_itself(first, second, footprint):
    samples = {name: np.array([first.ms[name], second.ms[name]]) for name in REQUESTS}
    expected = [first.at(footprint), second.at(footprint)]
    assert reference_time(samples, footprint) == pytest.approx(expected)


@given(TIMES, MS, st.floats(-1, 1), st.floats(0.1, 10), BYTES)
def test_times_of_a_slower_machine_are_brought_to_the_speed_of_before(
    before, request_ms, power, factor, footprint
):
    """The more bytes a step reads, the more it feels the caches: slower by factor · bytes^power."""

    def slower(footprint_bytes):
        inside = min(max(footprint_bytes, FOOTPRINTS[0]), FOOTPRINTS[-1])
        return factor * (inside / FOOTPRINTS[0]) ** power

    now = ReferenceTimes(
        {
            name: ms * slower(own)
            for (name, ms), own in zip(before.ms.items(), FOOTPRINTS, strict=True)
        }
    )
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
        (dict.fromkeys(REQUESTS, 0.0), "must be > 0, got 0.0"),
        (dict.fromkeys(REQUESTS, math.nan), "must be > 0, got nan"),
        (dict.fromkeys(REQUESTS, "1"), "must be > 0, got '1'"),
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
    assert references.prepare == references.functions
    assert references.estimate_ms() > 0
