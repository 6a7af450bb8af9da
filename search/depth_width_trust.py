"""Whether a fitted law is to be believed: how it extrapolates, and what speaks against it.

What is looked for: too few sizes, or too few different depths and widths, for its constants; a
constant at a bound, which then says where the bound is and nothing else; points that miss the law
by more than seeds explain (the F test for lack of fit) and by much; residuals that bend with depth
or width or depend on how the two go together, of which the law knows nothing; held-out points that
are predicted no better than by a constant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from search.depth_width_law import (
    FACTORS,
    Array,
    Law,
    Observations,
    fit_law,
    relative_errors,
)

# For each constant of the law.
POINTS_PER_CONSTANT = 2
# Three depths would fit any power with its offset exactly.
MIN_LEVELS = 4
# Of a test, at which residuals are said to have structure.
SIGNIFICANCE = 0.01
# Of what points differ by (standard deviation), that they may miss the law by, whatever the reason.
TOLERABLE = 0.1
# Root mean square of relative errors below which nobody minds their structure.
NEGLIGIBLE = 1e-4
# Of a sum of squares, below which a term is a combination of those of the law.
TINY = 1e-12
# Of the sizes, the largest by parameters, which an extrapolation is judged by.
HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Extrapolation:
    """A law fitted without the largest sizes, and its relative errors at these.

    sizes: those held out. errors: of each, prediction / measured − 1, at the largest token budget.
    baseline: error of predicting the mean of the others, root mean square, as is `rms`.
    """

    law: Law
    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    baseline: float

    @property
    def largest(self) -> float:
        """Of the errors, by their absolute values."""
        return max(map(abs, self.errors))

    @property
    def mean(self) -> float:
        """Of the errors' absolute values."""
        return float(np.mean(np.abs(self.errors)))

    @property
    def rms(self) -> float:
        """Root mean square of the errors."""
        return float(np.sqrt(np.mean(np.square(self.errors))))


def largest_sizes(parameters: dict[int, int]) -> tuple[int, ...]:
    """Which sizes are held out: the largest quarter by parameters.

    parameters: of each size that was trained.
    """
    count = max(1, round(HELD_OUT_SHARE * len(parameters)))
    return tuple(sorted(parameters, key=lambda size: -parameters[size])[:count])


def extrapolate(observations: Observations, held_out: tuple[int, ...]) -> Extrapolation | None:
    """Fit without some sizes and predict them; None if the others are too few for a fit."""
    is_held_out = np.isin(observations.sizes, held_out)
    rest = observations.where(~is_held_out)
    if len(rest.points[0]) <= rest.num_constants:
        return None
    law = fit_law(rest)
    errors, baseline = [], []
    constant = float(np.exp(np.log(rest.perplexity).mean()))
    for size in held_out:
        its = observations.where(observations.sizes == size)
        # Without a third factor, all are of one budget.
        last = its.where((its.factors[:, 2:] == its.factors[:, 2:].max(axis=0)).all(axis=1))
        measured = last.perplexity.mean()
        errors.append(float(law.perplexity(last.factors)[0] / measured - 1))
        baseline.append(constant / measured - 1)
    return Extrapolation(law, held_out, tuple(errors), float(np.sqrt(np.mean(np.square(baseline)))))


def doubts(
    observations: Observations, law: Law | None, extrapolation: Extrapolation | None
) -> list[str]:
    """Why the law is not to be trusted, a sentence each; empty if nothing speaks against it.

    law: None where there were too few points to fit one.
    """
    found = _too_few(observations)
    if law is None:
        return found
    found += law.at_bounds()
    found += _lack_of_fit(observations, law)
    found += _structure(observations, law)
    if extrapolation is None:
        found.append("too few sizes to hold some out and predict them")
    elif extrapolation.rms >= extrapolation.baseline:
        found.append(
            f"held-out sizes are predicted no better (error {extrapolation.rms:.1%}) than by the "
            f"mean of the others ({extrapolation.baseline:.1%})"
        )
    return found


def _too_few(observations: Observations) -> list[str]:
    """Of points, and of different values of each factor."""
    found = []
    distinct, _ = observations.points
    needed = POINTS_PER_CONSTANT * observations.num_constants
    if len(distinct) < needed:
        found.append(
            f"too few points for {observations.num_constants} constants: {len(distinct)}, where "
            f"{needed} would do"
        )
    for (factor, *_), values in zip(FACTORS, distinct.T, strict=False):
        count = len(np.unique(values))
        if count < MIN_LEVELS:
            noun = "budgets" if factor == "tokens" else f"{factor}s"
            found.append(f"too few different {noun}: {count}, where {MIN_LEVELS} would do")
    return found


def _lack_of_fit(observations: Observations, law: Law) -> list[str]:
    """Whether points miss the law by more than seeds explain, by the F test for lack of fit.

    Where they do so by little, intervals hold it (`bootstrap` draws residuals of points).
    """
    residuals = relative_errors(observations, law)
    distinct, point_of = observations.points
    misfit = observations.point_means(residuals)[point_of]
    missed = float(np.sqrt(np.square(misfit).mean()))
    free = len(distinct) - observations.num_constants
    repeats = len(residuals) - len(distinct)
    spread = float(np.log(law.perplexity(distinct)).std())
    if free < 1 or repeats < 1 or missed < max(NEGLIGIBLE, TOLERABLE * spread):
        return []
    by_misfit = float(np.square(misfit).sum()) / free
    by_seeds = float(np.square(residuals - misfit).sum()) / repeats
    probability = float(stats.f.sf(by_misfit / by_seeds, free, repeats)) if by_seeds else 0.0
    if probability >= SIGNIFICANCE:
        return []
    return [
        f"points miss the law by more than their seeds explain (F test for lack of fit, "
        f"p = {probability:.1g}): by {missed:.1%}, root mean square; they differ by {spread:.1%}"
    ]


def _structure(observations: Observations, law: Law) -> list[str]:
    """What of the residuals a term explains that the law does not have, if it is told from chance.

    Terms: the square of each factor's logarithm, and the product of two. Each is tested by itself,
    beside the law linearized at its constants, on means over seeds.
    """
    distinct, _ = observations.points
    residuals = observations.point_means(relative_errors(observations, law))
    free = len(distinct) - observations.num_constants - 1
    if free < 1 or np.sqrt(np.square(residuals).mean()) < NEGLIGIBLE:
        return []
    logs = np.log(distinct) - np.log(distinct).mean(axis=0)
    basis = law.jacobian(distinct) / law.perplexity(distinct)[:, None]
    left = _beside(basis, residuals)
    names = [factor for factor, *_ in FACTORS[: distinct.shape[1]]]
    places = range(len(names))
    pairs = list(itertools.combinations_with_replacement(places, 2))
    found = []
    for first, second in pairs:
        term = _beside(basis, logs[:, first] * logs[:, second])
        size = float(term @ term)
        explained = float(term @ left) ** 2 / size if size > TINY else 0.0
        rest = max(float(left @ left) - explained, 0.0)
        probability = float(stats.f.sf(explained / rest * free, 1, free)) if rest else 1.0
        if probability < SIGNIFICANCE / len(pairs):
            where = (
                f"bend with {names[first]}"
                if first == second
                else f"depend on {names[first]} and {names[second]} together"
            )
            share = explained / float(left @ left)
            found.append(
                f"residuals have structure: they {where}, which explains {share:.0%} of them "
                f"(p = {probability:.1g})"
            )
    return found


def _beside(basis: Array, values: Array) -> NDArray[np.float64]:
    """What of values [P] no combination of the columns of a basis [P, K] gives."""
    scales = np.linalg.norm(basis, axis=0)
    # A coefficient of zero leaves its exponent without effect.
    kept = basis[:, scales > 0] / scales[scales > 0]
    rest: NDArray[np.float64] = values - kept @ np.linalg.lstsq(kept, values, rcond=None)[0]
    return rest
