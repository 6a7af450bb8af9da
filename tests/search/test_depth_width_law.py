"""The law of depth and width: its fit, its intervals, and when it is not to be trusted."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import curve_fit

from search.depth_width_law import (
    Law,
    Observations,
    bootstrap,
    fit_law,
    interval,
    relative_errors,
)
from search.depth_width_trust import doubts, extrapolate, largest_sizes

DEPTHS, WIDTHS, BUDGETS = (2, 4, 8, 12), (96, 128, 192, 256), (1e5, 2e5, 4e5, 8e5)
# At width 192, from 2 to 12 blocks, perplexity falls by a sixth; at 8 blocks, over the widths, by a
# fifth.
LAW = Law(offset=60.0, coefficients=(40.0, 4000.0), exponents=(0.9, 1.0))
WITH_TOKENS = Law(offset=20.0, coefficients=(40.0, 4000.0, 9000.0), exponents=(0.9, 1.0, 0.5))


def observe(
    expected: Callable[[np.ndarray], np.ndarray],
    *,
    noise: float = 0.0,
    seed: int = 0,
    num_seeds: int = 2,
    grid: tuple[tuple[float, ...], ...] = (DEPTHS, WIDTHS),
    misfit: float = 0.0,
) -> Observations:
    """A grid's perplexities: each seed's relative error is normal, and so is each point's own."""
    rng = np.random.default_rng(seed)
    points = np.array(list(itertools.product(*grid)), dtype=float)
    factors = np.repeat(points, num_seeds, axis=0)
    errors = rng.normal(0, misfit, len(points)).repeat(num_seeds) + rng.normal(
        0, noise, len(factors)
    )
    _, sizes = np.unique(factors[:, :2], axis=0, return_inverse=True)
    seeds = np.tile(np.arange(num_seeds), len(points))
    return Observations(factors, expected(factors) * (1 + errors), sizes.reshape(-1), seeds)


def test_known_constants_are_recovered() -> None:
    found = fit_law(observe(LAW.perplexity)).constants()
    assert found == pytest.approx(LAW.constants(), rel=1e-3)
    assert set(found) == {"L0", "a", "α", "b", "β"}


def test_known_constants_are_recovered_with_tokens() -> None:
    observations = observe(WITH_TOKENS.perplexity, grid=(DEPTHS, WIDTHS, BUDGETS))
    assert fit_law(observations).constants() == pytest.approx(WITH_TOKENS.constants(), rel=1e-2)


def test_constants_under_noise_lie_in_their_intervals() -> None:
    observations = observe(LAW.perplexity, noise=0.002, num_seeds=3)
    law = fit_law(observations)
    resampled = bootstrap(observations, law, seed=0, num_resamples=100)
    for name, true in LAW.constants().items():
        low, high = interval(np.array([each.constants()[name] for each in resampled]))
        assert low <= true <= high


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_that_of_all_constants_at_once(seed) -> None:
    """SciPy's own bounded fit of five constants, begun at the true ones, gets no nearer."""
    observations = observe(LAW.perplexity, noise=0.005, seed=seed)

    def model(factors, offset, a, b, alpha, beta):
        return Law(offset, (a, b), (alpha, beta)).perplexity(factors)

    start = [LAW.offset, *LAW.coefficients, *LAW.exponents]
    bounds = ([1, 0, 0, 0.05, 0.05], [np.inf, np.inf, np.inf, 5, 5])
    constants, _ = curve_fit(
        model,
        observations.factors,
        observations.perplexity,
        start,
        sigma=observations.perplexity,
        bounds=bounds,
        x_scale=start,
    )
    theirs = model(observations.factors, *constants) / observations.perplexity - 1
    law = fit_law(observations)
    ours = law.perplexity(observations.factors) / observations.perplexity - 1
    assert np.square(ours).sum() <= np.square(theirs).sum() * (1 + 1e-6)


def test_the_derivatives_are_those_of_differences() -> None:
    factors = observe(WITH_TOKENS.perplexity, grid=(DEPTHS, WIDTHS, BUDGETS)).factors
    constants = np.array([WITH_TOKENS.offset, *WITH_TOKENS.coefficients, *WITH_TOKENS.exponents])

    def perplexity(values: np.ndarray) -> np.ndarray:
        return Law(values[0], tuple(values[1:4]), tuple(values[4:])).perplexity(factors)

    for place, column in enumerate(WITH_TOKENS.jacobian(factors).T):
        step = np.zeros_like(constants)
        step[place] = 1e-6 * constants[place]
        slope = (perplexity(constants + step) - perplexity(constants - step)) / (2 * step[place])
        assert column == pytest.approx(slope, rel=1e-5)


def test_intervals_of_predictions_cover_the_truth() -> None:
    """As often as they say, or somewhat more, and not by being endlessly wide."""
    size = np.array([6.0, 160.0])
    true = float(LAW.perplexity(size))
    num_covered, predictions, widths = 0, [], []
    for seed in range(60):
        observations = observe(LAW.perplexity, noise=0.004, seed=seed)
        law = fit_law(observations)
        resampled = bootstrap(observations, law, seed=seed, num_resamples=60)
        low, high = interval(np.array([each.perplexity(size) for each in resampled]))
        num_covered += low <= true <= high
        predictions.append(float(law.perplexity(size)))
        widths.append(high - low)
    # Of 60, at 95 %, fewer than 52 are covered once in a hundred times.
    assert num_covered >= 52
    assert np.mean(widths) < 2 * 3.92 * np.std(predictions)


def test_seeds_that_move_all_sizes_alike_widen_the_intervals() -> None:
    """Drawn for each point alone they would cancel out."""
    size = np.array([6.0, 160.0])
    widths = []
    for shift in (0.0, 0.02):
        plain = observe(LAW.perplexity, noise=0.002, num_seeds=3)
        shifts = 1 + shift * (plain.seeds - 1)
        moved = Observations(plain.factors, plain.perplexity * shifts, plain.sizes, plain.seeds)
        resampled = bootstrap(moved, fit_law(moved), seed=0, num_resamples=100)
        low, high = interval(np.array([each.perplexity(size) for each in resampled]))
        widths.append((high - low) / LAW.perplexity(size))
    # The mean of three draws from −2 %, 0 and 2 % has a standard deviation of 0.94 %.
    assert widths[0] < 0.01 < 0.025 < widths[1]


# Trust


def doubts_of(observations: Observations) -> list[str]:
    parameters = {
        int(size): int(depth * width**2)
        for size, (depth, width, *_) in zip(observations.sizes, observations.factors, strict=True)
    }
    held_out = extrapolate(observations, largest_sizes(parameters))
    return doubts(observations, fit_law(observations), held_out)


def test_what_the_law_made_is_trusted() -> None:
    """But for the few per cent that the tests are wrong about."""
    found = [doubts_of(observe(LAW.perplexity, noise=0.003, seed=seed)) for seed in range(40)]
    assert sum(map(bool, found)) <= 4, found


def test_what_is_exact_is_trusted() -> None:
    """What rounding leaves has a structure, too."""
    assert doubts_of(observe(LAW.perplexity)) == []


def test_too_few_points_and_too_few_levels_are_named() -> None:
    found = doubts_of(observe(LAW.perplexity, grid=((2, 4), WIDTHS)))
    assert found[:2] == [
        "too few points for 5 constants: 8, where 10 would do",
        "too few different depths: 2, where 4 would do",
    ]
    few = observe(WITH_TOKENS.perplexity, grid=(DEPTHS, WIDTHS, BUDGETS[:2]))
    assert "too few different budgets: 2, where 4 would do" in doubts_of(few)


def test_depth_that_does_not_help_is_at_a_bound() -> None:
    found = doubts_of(observe(lambda x: 60 + 4000 / x[:, 1] + 0.1 * x[:, 0], noise=0.001))
    assert "a is at its bound 0: more depth lowers no perplexity" in found


def test_an_exponent_at_its_bound_is_named() -> None:
    """A fall by the logarithm is a power of zero."""
    found = doubts_of(observe(lambda x: 200 - 20 * np.log(x[:, 0]) + 4000 / x[:, 1], noise=0.001))
    assert any("is at its bound" in doubt for doubt in found)


def test_perplexity_that_would_fall_below_what_there_can_be_is_at_a_bound() -> None:
    """Powers as slow as these have fallen so far already that less than nothing would be left."""
    found = doubts_of(observe(lambda x: 60 / x[:, 0] ** 0.3 + 700 / x[:, 1] ** 0.5 - 20))
    assert "L0 is at its bound 1, the least a perplexity can be" in found


def test_a_best_depth_within_the_grid_bends_the_residuals() -> None:
    def bent(x: np.ndarray) -> np.ndarray:
        return LAW.perplexity(x) + 6 * np.log(x[:, 0] / 5) ** 2

    found = doubts_of(observe(bent, noise=0.003))
    assert any("they bend with depth" in doubt for doubt in found)


def test_depth_that_needs_width_is_an_interaction() -> None:
    def together(x: np.ndarray) -> np.ndarray:
        return LAW.perplexity(x) - 3 * np.log(x[:, 0] / 5) * np.log(x[:, 1] / 150)

    found = doubts_of(observe(together, noise=0.002))
    assert any("they depend on depth and width together" in doubt for doubt in found)


def test_points_that_scatter_more_than_seeds_do_are_named() -> None:
    found = doubts_of(observe(LAW.perplexity, noise=0.001, misfit=0.03))
    assert any("points miss the law by more than their seeds explain" in each for each in found)
    # One seed says nothing of what seeds explain.
    single = doubts_of(observe(LAW.perplexity, noise=0.001, misfit=0.03, num_seeds=1))
    assert not any("seeds" in each for each in single)
    # So little does not matter beside what sizes differ by; the intervals hold it.
    assert doubts_of(observe(LAW.perplexity, noise=0.0005, misfit=0.002)) == []


def test_noise_alone_is_predicted_no_better_than_by_its_mean() -> None:
    found = [
        doubts_of(observe(lambda x: np.full(len(x), 100.0), noise=0.01, seed=seed))
        for seed in range(10)
    ]
    assert all(found)


# Extrapolation


def test_a_law_extrapolates_to_what_it_was_not_fitted_to() -> None:
    observations = observe(LAW.perplexity)
    parameters = {size: 100 + size for size in range(16)}
    held_out = largest_sizes(parameters)
    assert held_out == (15, 14, 13, 12)
    found = extrapolate(observations, held_out)
    assert found is not None
    assert found.largest < 1e-4
    assert found.rms < found.baseline


def test_the_error_is_that_of_a_prediction_made_without_the_size() -> None:
    """The largest size is a tenth worse than the law, whatever the law makes of the others."""
    observations = observe(LAW.perplexity)
    worse = np.where(observations.sizes == 15, 1.1, 1.0)
    broken = Observations(
        observations.factors,
        observations.perplexity * worse,
        observations.sizes,
        observations.seeds,
    )
    found = extrapolate(broken, (15, 11))
    assert found is not None
    assert found.errors == pytest.approx((1 / 1.1 - 1, 0), abs=1e-3)
    assert found.largest == pytest.approx(0.1 / 1.1, abs=1e-3)
    assert found.mean == pytest.approx(0.05 / 1.1, abs=1e-3)


def test_nothing_is_held_out_where_the_rest_would_be_too_few() -> None:
    observations = observe(LAW.perplexity, grid=((2, 4), (96, 128, 192)))
    assert extrapolate(observations, (5,)) is None


def test_residuals_are_relative() -> None:
    observations = observe(lambda x: 1.02 * LAW.perplexity(x))
    assert relative_errors(observations, LAW) == pytest.approx(0.02)
