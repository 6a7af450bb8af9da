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

    means, deviations: of the score after the last rung; [N]. Without deviation are those that have
    one. costs: the other objectives, [N, C].
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
    costs: of each genotype, or None where they are not known; at least one is.
    """
    features = feature_matrix(genotypes)
    done = np.array([len(each) for each in scores])
    common = covariance(features)
    reached = _reached(scores, done, 0)
    tried = np.flatnonzero(done)
    means, variances = GaussianProcess(common, tried).predict(reached[tried])
    means[tried], variances[tried] = reached[tried], 0.0
    for rung in range(1, num_rungs):
        went_on = np.flatnonzero(done > rung)
        before, reached = reached, _reached(scores, done, rung)
        changes = reached[went_on] - before[went_on]
        if len(went_on) >= NUM_CHANGES:
            process = GaussianProcess(covariance(np.column_stack([features, means])), went_on)
            change, variance = process.predict(changes)
        else:
            # Nothing says who gains more: as much as scores differ anyway.
            change = np.full(len(means), changes.mean() if len(changes) else 0.0)
            variance = np.full(len(means), means.var())
        means, variances = means + change, variances + variance
        means[went_on], variances[went_on] = reached[went_on], 0.0
    deviations = np.sqrt(variances)
    deviations[done < num_rungs] += TINY
    return Forecast(means, deviations, _costs(common, costs))


def _reached(scores: Sequence[Sequence[float]], done: np.ndarray, rung: int) -> np.ndarray:
    """The scores after a rung, NaN for those that were not there."""
    return np.array(
        [each[rung] if num > rung else np.nan for each, num in zip(scores, done, strict=True)]
    )


def _costs(common: np.ndarray, costs: Sequence[Sequence[float] | None]) -> np.ndarray:
    """Costs, forecast where they are not known: what they are made of multiplies them."""
    known = np.array([place for place, each in enumerate(costs) if each is not None])
    values = np.array([each for each in costs if each is not None], dtype=float)
    if len(known) == len(costs):
        return values
    process = GaussianProcess(common, known)
    found = np.empty((len(costs), values.shape[1]))
    for place, column in enumerate(np.log(values).T):
        found[:, place], _ = process.predict(column)
    found = np.exp(found)
    found[known] = values
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
