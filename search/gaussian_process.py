"""Regression by a Gaussian process, for some hundred candidates (Rasmussen & Williams 2006).

A linear part says what each feature adds, a smooth part what the linear one misses. What all have
in common is not known before (section 2.7 there): of few values, little is known of it. How much is
noise is chosen by the evidence that is left then (restricted likelihood, Harville 1974). Nothing is
random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of the prior's variance, the part of the smooth kernel against the linear one's.
SMOOTH_SHARE = 1.0
# Noise as a share of the prior's variance; the likeliest is taken.
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Features and values that differ by less are the same.
TINY = 1e-9


def covariance(features: np.ndarray) -> np.ndarray:
    """What candidates have in common, [N, N]: a linear and a smooth part. features: [N, F].

    Every feature that differs counts the same; where features are copies of each other, one does.
    """
    features = np.array(list({each.tobytes(): each for each in features.T.copy()}.values())).T
    deviation = features.std(0)
    varies = deviation > TINY * (1 + np.abs(features).max(0, initial=0.0))
    scale = deviation[varies] * np.sqrt(max(1, varies.sum()))
    standardised = (features[:, varies] - features[:, varies].mean(0)) / scale
    linear = standardised @ standardised.T
    squares = np.diag(linear)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * linear, 0.0)
    return linear + SMOOTH_SHARE * np.exp(-distances / 2)


@dataclass(frozen=True)
class Prediction:
    """What a process says of each candidate.

    means: [N]. variances: of the means, [N]. noise_variance: by which a new observation differs
    from its mean besides, the same for all.
    """

    means: np.ndarray
    variances: np.ndarray
    noise_variance: float


class GaussianProcess:
    """Predictions for candidates of which some are observed.

    covariance: [N, N]. observed: places of those with values, [n].
    """

    def __init__(self, covariance: np.ndarray, observed: np.ndarray) -> None:
        self._prior_variances = np.diag(covariance)
        self._eigenvalues, vectors = np.linalg.eigh(covariance[np.ix_(observed, observed)])
        self._vectors = vectors
        # [N, n]
        self._projections = covariance[:, observed] @ vectors

    def predict(self, values: np.ndarray) -> Prediction:
        """What the values of those that are observed, [n], say of all."""
        rotated, ones = self._vectors.T @ values, self._vectors.sum(0)
        found, num_values = [], len(values)
        for noise in NOISES:
            spectrum = self._eigenvalues.clip(0) + noise
            # What all have in common, at its likeliest, and its variance.
            weight = float(np.sum(ones**2 / spectrum))
            mean = float(np.sum(ones * rotated / spectrum)) / weight
            scatter = float(np.sum((rotated - mean * ones) ** 2 / spectrum)) + TINY
            # Log evidence, the prior's variance at its likeliest, what all have in common
            # integrated out.
            freedom = max(1, num_values - 1)
            evidence = -0.5 * (np.log(spectrum).sum() + np.log(weight) + freedom * np.log(scatter))
            found.append((evidence, noise, mean, weight, scatter / freedom))
        _, noise, mean, weight, prior_variance = max(found)
        spectrum = self._eigenvalues.clip(0) + noise
        predicted = mean + self._projections @ ((rotated - mean * ones) / spectrum)
        explained = (self._projections**2 / spectrum).sum(1)
        common = (1 - self._projections @ (ones / spectrum)) ** 2 / weight
        variances = prior_variance * (self._prior_variances - explained + common)
        return Prediction(predicted, np.maximum(variances, 0.0), prior_variance * noise)
