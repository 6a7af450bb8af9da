"""How well a short training ranks candidates: as a long one does, or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_CANDIDATES = 4
NUM_RESAMPLES = 5_000


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho over n candidates, with its 95 % interval."""

    rho: float
    low: float
    high: float
    n: int


def rank_correlation(
    short: Sequence[float], long: Sequence[float], seed: int
) -> RankCorrelation | None:
    """Spearman's rho of the scores of candidates after a short and after a long training.

    It says how far the short training can be trusted only if the candidates were drawn at random:
    among those that climbed, the range of scores is cut. The interval is the bootstrap's over
    candidates (percentiles). It is too narrow for fewer than ten of them, and nothing at all where
    the two rankings agree wholly, as every resample then does.

    None for fewer than four candidates, or if all are equal in one of the two. Raises ValueError if
    the numbers of scores differ, or if a score is not finite.
    """
    if len(short) != len(long):
        raise ValueError(
            f"rank correlation: {len(short)} candidates after the short training, "
            f"{len(long)} after the long one"
        )
    scores = np.array([short, long], dtype=np.float64)  # [2, N]
    if not np.isfinite(scores).all():
        raise ValueError("rank correlation: a score is not finite")
    n = scores.shape[1]
    if n < MIN_CANDIDATES or not np.ptp(scores, axis=1).all():
        return None
    chosen = np.random.default_rng(seed).integers(n, size=(NUM_RESAMPLES, n))
    # A resample without two different scores has no ranking.
    low, high = np.nanquantile(spearman(scores[:, chosen]), [0.025, 0.975])
    return RankCorrelation(float(spearman(scores)), float(low), float(high), n)


def spearman(scores: np.ndarray) -> np.ndarray:
    """Rho [...] of scores [2, ..., N]: the correlation of their ranks; NaN if one has no spread."""
    from scipy import stats

    ranks = stats.rankdata(scores, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    covariance = (ranks[0] * ranks[1]).sum(axis=-1)
    spread = np.sqrt(np.square(ranks).sum(axis=-1).prod(axis=0))
    return np.divide(covariance, spread, out=np.full_like(spread, np.nan), where=spread > 0)
