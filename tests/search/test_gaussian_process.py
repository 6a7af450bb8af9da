import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
    means, variances = GaussianProcess(common, observed).predict(values)

    centred = values - values.mean()
    among = common[np.ix_(observed, observed)]
    found = []
    for noise in NOISES:
        unscaled = among + noise * np.eye(7)
        scale = centred @ np.linalg.solve(unscaled, centred) / 7
        evidence = multivariate_normal(cov=scale * unscaled).logpdf(centred)
        found.append((evidence, noise, scale))
    _, noise, scale = max(found)
    # Conditioning the joint normal distribution, as in any textbook.
    inverse = np.linalg.inv(among + noise * np.eye(7))
    across = common[:, observed]
    expected = values.mean() + across @ inverse @ centred
    spread = scale * (np.diag(common - across @ inverse @ across.T) + noise)
    np.testing.assert_allclose(means, expected, rtol=1e-6)
    np.testing.assert_allclose(variances, spread, rtol=1e-5)


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
    means, variances = GaussianProcess(covariance(features), observed).predict(values)
    errors = np.abs(means - truth)[20:]
    assert np.sqrt(np.mean(errors**2)) < 0.15 * truth.std()
    assert errors.max() < 0.4 * truth.std()
    assert np.mean(errors < 2 * np.sqrt(variances[20:])) > 0.8


def test_one_value_says_the_same_of_all():
    means, variances = GaussianProcess(covariance(some_features(1)), np.array([3])).predict(
        np.array([2.5])
    )
    np.testing.assert_allclose(means, 2.5)
    assert np.all(np.isfinite(variances))
