import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from search.rank_correlation import rank_correlation


def test_rho_by_hand() -> None:
    """No ties: 1 - 6 Σd² / (n (n² - 1)), here with d = 1, 1, 0, 1, 1."""
    found = rank_correlation([10.0, 20.0, 30.0, 40.0, 50.0], [2.0, 1.0, 3.0, 5.0, 4.0], seed=0)
    assert found is not None
    assert found.rho == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert found.n == 5
    assert -1 <= found.low < found.rho < found.high <= 1


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=12)


@given(pairs)
def test_rho_with_ties(scores: list[tuple[int, int]]) -> None:
    short, long = zip(*scores, strict=True)
    found = rank_correlation(short, long, seed=0)
    if len(set(short)) == 1 or len(set(long)) == 1:
        assert found is None
    else:
        assert found is not None
        assert found.rho == pytest.approx(stats.spearmanr(short, long).statistic, abs=1e-12)


def test_only_ranks_count() -> None:
    short = [3.1, 2.7, 2.9, 3.6, 2.2, 4.0]
    rising = rank_correlation(short, [math.exp(score) for score in short], seed=0)
    falling = rank_correlation(short, [1 / score for score in short], seed=0)
    assert rising is not None
    assert falling is not None
    assert (rising.rho, rising.low, rising.high) == pytest.approx((1, 1, 1))
    assert (falling.rho, falling.low, falling.high) == pytest.approx((-1, -1, -1))


def test_the_seed_decides_the_interval() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 12)).tolist()
    assert rank_correlation(*scores, seed=1) == rank_correlation(*scores, seed=1)
    assert rank_correlation(*scores, seed=1) != rank_correlation(*scores, seed=2)


def test_the_interval_is_scipys() -> None:
    """Both resample at random, so their ends differ a little."""
    scores = np.random.default_rng(3).multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 30).T
    found = rank_correlation(*scores.tolist(), seed=0)
    expected = stats.bootstrap(
        tuple(scores),
        lambda short, long: stats.spearmanr(short, long).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_the_interval_holds_as_often_as_it_says(correlation: float) -> None:
    """Of normal scores, rho is 6/π asin(correlation / 2) (Pearson 1907)."""
    rho = 6 / math.pi * math.asin(correlation / 2)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(150):
        covariance = [[1, correlation], [correlation, 1]]
        scores = rng.multivariate_normal([0, 0], covariance, 20).T.tolist()
        found = rank_correlation(*scores, seed=0)
        assert found is not None
        covered += found.low <= rho <= found.high
    assert covered / 150 > 0.89


def test_few_or_equal_candidates_have_no_correlation() -> None:
    assert rank_correlation([], [], seed=0) is None
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], seed=0) is None
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [7.0] * 4, seed=0) is None


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    with pytest.raises(ValueError, match="5 candidates after the short training, 4 after"):
        rank_correlation([1.0] * 5, [1.0] * 4, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        rank_correlation([1.0, 2.0, 3.0, math.nan], [1.0, 2.0, 3.0, 4.0], seed=0)
