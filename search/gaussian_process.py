"""Regression by a Gaussian process, for some hundred candidates (Rasmussen & Williams 2006).

A linear part says what each feature adds, a smooth part what the linear one misses. How much is
noise is chosen by the evidence. Nothing is random.
"""

from __future__ import annotations

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
    features = np.unique(features, axis=1)
    deviation = features.std(0)
    varies = deviation > TINY * (1 + np.abs(features).max(0, initial=0.0))
    scale = deviation[varies] * np.sqrt(max(1, varies.sum()))
    standardised = (features[:, varies] - features[:, varies].mean(0)) / scale
    linear = standardised @ standardised.T
    squares = np.diag(linear)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * linear, 0.0)
    return linear + SMOOTH_SHARE * np.exp(-distances / 2)


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

    def predict(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of a new observation of each candidate, [N] each. values: [n]."""
        mean = values.mean()
        rotated = self._vectors.T @ (values - mean)
        evidences, num_values = [], len(values)
        for noise in NOISES:
            spectrum = self._eigenvalues.clip(0) + noise
            scatter = float(np.sum(rotated**2 / spectrum)) + TINY
            # Log evidence, the prior's variance at its likeliest, without what all have in common.
            evidence = -0.5 * (np.log(spectrum).sum() + num_values * np.log(scatter))
            evidences.append((evidence, noise, scatter / num_values))
        _, noise, prior_variance = max(evidences)
        spectrum = self._eigenvalues.clip(0) + noise
        predicted = mean + self._projections @ (rotated / spectrum)
        explained = (self._projections**2 / spectrum).sum(1)
        variances = prior_variance * (self._prior_variances - explained + noise)
        return predicted, np.maximum(variances, TINY**2)
