import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from search.noise import is_difference, seed_noise

score = st.integers(-1000, 1000).map(lambda tenths: tenths / 10)


def test_published_quantiles() -> None:
    """Two groups, worked by hand; quantiles out of a table of chi-square and t for 3 degrees."""
    noise = seed_noise([[1.0, 2.0, 3.0], [7.0], [10.0, 12.0]])
    assert noise.degrees_of_freedom == 3
    assert noise.deviation == pytest.approx(math.sqrt((2 + 2) / 3))
    assert noise.low == pytest.approx(math.sqrt(4 / 9.348), rel=1e-3)
    assert noise.high == pytest.approx(math.sqrt(4 / 0.216), rel=1e-3)
    assert noise.least_difference == pytest.approx(math.sqrt(2 * 4 / 3) * 3.182, rel=1e-3)


@given(
    st.lists(score, min_size=2, max_size=6, unique=True),
    st.lists(score, min_size=2, max_size=6, unique=True),
)
def test_the_deviation_is_that_of_a_two_sample_t_test(a: list[float], b: list[float]) -> None:
    """Two architectures are pooled as Student's test of their means pools them."""
    noise = seed_noise([a, b])
    error = noise.deviation * math.sqrt(1 / len(a) + 1 / len(b))
    expected = stats.ttest_ind(a, b)
    assert noise.degrees_of_freedom == expected.df
    difference = np.mean(a) - np.mean(b)
    assert difference / error == pytest.approx(expected.statistic, rel=1e-6, abs=1e-6)


@given(st.lists(st.lists(score, min_size=2, max_size=4), min_size=1, max_size=4), score)
def test_only_the_scatter_within_an_architecture_counts(
    scores: list[list[float]], shift: float
) -> None:
    noise = seed_noise(scores)
    moved = seed_noise([[x + shift * place for x in group] for place, group in enumerate(scores)])
    assert moved.deviation == pytest.approx(noise.deviation, abs=1e-9)


def test_intervals_and_differences_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    num_rounds, deviation = 2000, 0.3
    covered = different = found = 0
    for _ in range(num_rounds):
        means = rng.normal(size=(4, 1))
        noise = seed_noise(rng.normal(means, deviation, size=(4, 3)).tolist())
        covered += noise.low <= deviation <= noise.high
        a, b = rng.normal(0, deviation, size=2)
        different += is_difference(a, b, noise)
        found += is_difference(a, b + 3.0, noise)
    # Four standard errors of a share of 0.05 in 2,000 rounds.
    assert covered / num_rounds == pytest.approx(0.95, abs=0.02)
    assert different / num_rounds == pytest.approx(0.05, abs=0.02)
    assert found > 0.99 * num_rounds


def test_a_difference_is_more_than_the_noise() -> None:
    noise = seed_noise([[1.0, 2.0, 3.0], [10.0, 12.0]])
    assert not is_difference(5.0, 5.0 + 0.999 * noise.least_difference, noise)
    assert is_difference(5.0, 5.0 - 1.001 * noise.least_difference, noise)
    silent = seed_noise([[1.0, 1.0]])
    assert not is_difference(2.0, 2.0, silent)
    assert is_difference(2.0, 2.1, silent)


def test_scores_that_tell_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="two scores or more"):
        seed_noise([[1.0], [2.0], []])
    with pytest.raises(ValueError, match="not finite"):
        seed_noise([[1.0, math.inf]])
