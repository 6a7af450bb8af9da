"""What candidates will come to, from what they and others have come to so far.

Short training favours small models and some operators, so the scores of a low rung rank candidates
wrongly. But what training from one rung to the next brings depends on what a model is made of, and
on its score so far: it is learned from those that went on (as freeze-thaw Bayesian optimization
does from curves, Swersky 2014; the chain of changes is Kennedy & O'Hagan's of 2000). Who was not
tried yet is forecast from what it is made of alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from search.gaussian_process import TINY, GaussianProcess, covariance
from search.genotype import Genotype

# Changes from rung to rung are forecast from at least so many.
NUM_CHANGES = 2


@dataclass(frozen=True)
class Forecast:
    """By candidate.

    means: of the score after the last rung, [N]. deviations: by how much that may turn out to be
    another for those that are trained further, [N]: by what the first rung will show of who was not
    tried yet, and by how little is known of what changes from rung to rung. What changes have that
    nothing explains is not in it: it is the same for all that were tried, and who hopes for it
    trains all. costs: the other objectives, [N, C].
    """

    means: np.ndarray
    deviations: np.ndarray
    costs: np.ndarray


def forecast(
    genotypes: Sequence[Genotype],
    scores: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float] | None],
    num_rungs: int,
) -> Forecast:
    """The scores after the last rung, and the costs.

    scores: of each genotype, after each rung that it is done with; at least one genotype has some.
    costs: of each genotype that has scores; those of the others are forecast.
    """
    features = feature_matrix(genotypes)
    done = np.array([len(each) for each in scores])
    common = covariance(features)
    reached = _reached(scores, done, 0)
    tried = np.flatnonzero(done)
    process = GaussianProcess(common, tried)
    first = process.predict(reached[tried])
    means, variances = first.means, first.variances + first.noise_variance
    means[tried], variances[tried] = reached[tried], 0.0
    for rung in range(1, num_rungs):
        went_on = np.flatnonzero(done > rung)
        before, reached = reached, _reached(scores, done, rung)
        changes = reached[went_on] - before[went_on]
        if len(went_on) >= NUM_CHANGES:
            alike = covariance(np.column_stack([features, means]))
            predicted = GaussianProcess(alike, went_on).predict(changes)
            change, variance = predicted.means, predicted.variances
        else:
            # Nothing says who gains more: as much as scores differ anyway.
            change = np.full(len(means), changes.mean() if len(changes) else 0.0)
            variance = np.full(len(means), means.var())
        means, variances = means + change, variances + variance
        means[went_on], variances[went_on] = reached[went_on], 0.0
    deviations = np.sqrt(variances)
    deviations[done < num_rungs] += TINY
    known = np.array([costs[place] for place in tried.tolist()], dtype=float)
    return Forecast(means, deviations, _costs(len(done), process, tried, known))


def _reached(scores: Sequence[Sequence[float]], done: np.ndarray, rung: int) -> np.ndarray:
    """The scores after a rung, NaN for those that were not there."""
    return np.array(
        [each[rung] if num > rung else np.nan for each, num in zip(scores, done, strict=True)]
    )


def _costs(
    num_candidates: int, process: GaussianProcess, tried: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """The costs of all, [N, C]: what a candidate is made of multiplies them. known: [n, C]."""
    found = np.empty((num_candidates, known.shape[1]))
    for place, column in enumerate(np.log(known).T):
        found[:, place] = np.exp(process.predict(column).means)
    found[tried] = known
    return found


def feature_matrix(genotypes: Sequence[Genotype]) -> np.ndarray:
    """What genotypes are made of, [N, F]."""
    found = [features(genotype) for genotype in genotypes]
    names = sorted({name for each in found for name in each})
    return np.array([[each.get(name, 0.0) for name in names] for each in found])


@lru_cache(maxsize=4096)
def features(genotype: Genotype) -> Mapping[str, float]:
    """What a genotype is made of, by name; what is not named is zero.

    How many operators of each kind and of each setting there are, and which comes first: what
    reads the embeddings matters more than any other place.
    """
    operators = genotype.operators
    found = {
        "depth": float(len(operators)),
        "blocks": float(len(genotype.pattern)),
        "meta tokens": float(np.log1p(genotype.meta_tokens)),
        "width": float(np.log(genotype.width or 1)),
    }
    for text in operators:
        for name in {text, text.partition("(")[0]}:
            found[name] = found.get(name, 0.0) + 1.0
    for name in {operators[0], operators[0].partition("(")[0]}:
        found[f"first: {name}"] = 1.0
    return found
