import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.stats import multivariate_normal

from search.gaussian_process import NOISES, GaussianProcess, covariance


def some_features(seed, num=12, width=5):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 3, (num, width)).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_predictions_are_those_of_the_likeliest_normal_distribution(seed):
    rng = np.random.default_rng(seed)
    common = covariance(some_features(seed))
    observed = rng.permutation(12)[:7]
    values = rng.normal(3.0, 0.5, 7)
    predicted = GaussianProcess(common, observed).predict(values)

    among = common[np.ix_(observed, observed)]
    # Differences of the values know nothing of what all have in common.
    differences = null_space(np.ones((1, 7))).T
    found = []
    for noise in NOISES:
        unscaled = differences @ (among + noise * np.eye(7)) @ differences.T
        differing = differences @ values
        scale = differing @ np.linalg.solve(unscaled, differing) / 6
        evidence = multivariate_normal(cov=scale * unscaled).logpdf(differing)
        found.append((evidence, noise, scale))
    _, noise, scale = max(found)
    # Kriging with an unknown mean, as in any textbook.
    ones = np.ones((7, 1))
    system = np.block([[among + noise * np.eye(7), ones], [ones.T, np.zeros((1, 1))]])
    across = np.column_stack([common[:, observed], np.ones(12)])
    weights = np.linalg.solve(system, across.T)
    expected = values @ weights[:7]
    spread = scale * (np.diag(common) - (across.T * weights).sum(0))
    np.testing.assert_allclose(predicted.means, expected, rtol=1e-6)
    np.testing.assert_allclose(predicted.variances, spread, rtol=1e-5)
    assert predicted.noise_variance == pytest.approx(scale * noise)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-100, 100))
def test_units_of_features_and_copies_of_them_do_not_matter(seed, scale, shift):
    features = some_features(seed)
    changed = features.copy()
    changed[:, 0] = changed[:, 0] * scale + shift
    changed = np.column_stack([changed, features[:, 1], np.full(len(features), shift)])
    np.testing.assert_allclose(covariance(changed), covariance(features), atol=1e-6)


def test_what_adds_up_is_learned_from_a_few():
    rng = np.random.default_rng(0)
    features = some_features(0, num=60)
    truth = 4.0 + features @ np.array([-0.3, -0.1, 0.0, 0.2, 0.05])
    observed = np.arange(20)
    values = truth[observed] + rng.normal(0, 0.01, 20)
    predicted = GaussianProcess(covariance(features), observed).predict(values)
    errors = np.abs(predicted.means - truth)[20:]
    assert np.sqrt(np.mean(errors**2)) < 0.15 * truth.std()
    assert errors.max() < 0.4 * truth.std()
    variances = predicted.variances + predicted.noise_variance
    assert np.mean(errors < 2 * np.sqrt(variances[20:])) > 0.8


def test_one_value_says_the_same_of_all():
    process = GaussianProcess(covariance(some_features(1)), np.array([3]))
    predicted = process.predict(np.array([2.5]))
    np.testing.assert_allclose(predicted.means, 2.5)
    assert np.all(np.isfinite(predicted.variances))
