"""Which factors mattered: what goes with a higher or a lower score at equal latency.

All scores are those after the first rung, which every candidate has trained to, so that promoted
ones and others compare. What is found describes the candidates of one search. They were proposed to
be good, not drawn at random: an association is a hint what to try, and no law.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Row = Mapping[str, Any]

CONFIDENCE = 0.95
# A factor is judged by so many values that differ from its most common one.
MIN_VARIED = 5
# A mutation is judged by the children of so many parents.
MIN_PARENTS = 5
# Candidates for each coefficient of a regression.
CANDIDATES_PER_COEFFICIENT = 3
# What a candidate weighs in its own fit, at which nothing is left to judge the fit by.
MAX_LEVERAGE = 1 - 1e-6


@dataclass(frozen=True)
class Effect:
    """What a factor does to the score, in the unit of the score, with its interval.

    difference: of the score. per: of the factor, what the difference is for. n: candidates, or
    parents, that it comes from.

    The intervals of effects that are found together hold together, with 95 % (Bonferroni).
    """

    name: str
    difference: float
    low: float
    high: float
    per: float
    n: int

    @property
    def is_told_from_zero(self) -> bool:
        """Whether the interval leaves zero out; of another factor nothing is to be said."""
        return self.low > 0 or self.high < 0


def operator_effects(rows: Sequence[Row]) -> list[Effect]:
    """One standard deviation more of each operator, all others and the latency being equal.

    Width and size are no factors here: at equal latency they follow from the operators. So it is
    the effect of an operator *and of the width that it costs*. An operator whose count follows from
    the others', as in a space of fixed length, is left out; the others then stand in its place.
    """
    rows = _trained(rows)
    names = dict.fromkeys(text for row in rows for text in row["operators"])
    # Mixers first: if one has to be left out, it is an FFN.
    ordered = sorted(names, key=_is_ffn)
    counts = {name: [row["operators"].count(name) for row in rows] for name in ordered}
    return regression_effects(_scores(rows), _latencies(rows), counts)


def shape_effects(rows: Sequence[Row]) -> list[Effect]:
    """One standard deviation more of each measure of shape, the latency being equal.

    Each by itself, for they follow from each other. Sizes count in doublings.
    """
    rows = _trained(rows)
    mixers = [[text for text in row["operators"] if not _is_ffn(text)] for row in rows]
    operators = [len(row["operators"]) for row in rows]
    shapes: dict[str, Sequence[float]] = {
        "operators": operators,
        "FFNs per mixer": [n / len(own) - 1 for n, own in zip(operators, mixers, strict=True)],
        "kinds of mixer": [len({*own}) for own in mixers],
        "width": [np.log2(row["width"]) for row in rows],
        "parameters": [np.log2(row["parameters"]) for row in rows],
        "state": [np.log2(1 + row["state_bytes"]) for row in rows],
        "meta tokens": [row["genotype"]["meta_tokens"] for row in rows],
    }
    scores, latencies = _scores(rows), _latencies(rows)
    varied = {name: values for name, values in shapes.items() if _is_varied(values)}
    found = (
        regression_effects(scores, latencies, {name: values}, num_judged=len(varied))
        for name, values in varied.items()
    )
    return sorted(
        (effect for effects in found for effect in effects), key=lambda each: each.difference
    )


def mutation_effects(rows: Sequence[Row]) -> list[Effect]:
    """For each mutated factor, a child's score less its parent's, with the t interval of the mean.

    Children of one parent count as one, since the luck of its score is in all their differences.
    Parents were chosen for low scores, partly luck: a mutation that does nothing loses a little.
    """
    differences: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _trained(rows):
        if row["factor"] is not None and rows[row["parent"]]["rungs"]:
            factor = "several at once" if "+" in row["factor"] else row["factor"]
            parent_score = rows[row["parent"]]["rungs"][0]["score"]
            differences[factor][row["parent"]].append(row["rungs"][0]["score"] - parent_score)
    judged = {
        factor: np.array([np.mean(children) for children in by_parent.values()])
        for factor, by_parent in differences.items()
        if len(by_parent) >= MIN_PARENTS
    }
    effects = []
    for factor, values in judged.items():
        mean, error = float(values.mean()), float(stats.sem(values))
        half = _quantile(len(values) - 1, len(judged)) * error
        effects.append(Effect(factor, mean, mean - half, mean + half, 1.0, len(values)))
    return sorted(effects, key=lambda effect: effect.difference)


def regression_effects(
    scores: Sequence[float],
    latencies_ms: Sequence[float],
    factors: Mapping[str, Sequence[float]],
    num_judged: int | None = None,
) -> list[Effect]:
    """Coefficients of least squares of the score on the factors and the logarithm of the latency.

    Each for a standard deviation of its factor, lowest first. The intervals hold when the scatter
    differs between candidates (HC3: MacKinnon and White 1985). num_judged: effects that the
    intervals hold for together; the factors by default.

    Factors that hardly vary, or follow from earlier ones, are left out. Nothing is returned for
    fewer than three candidates per coefficient.
    """
    n = len(scores)
    # Latency is the first column to be kept, so that no factor can stand in its place.
    columns = [np.ones(n)]
    if n and np.ptp(latencies_ms) > 0:
        columns.append(_standardized(np.log(latencies_ms)))
    names: list[str] = []
    for name, values in factors.items():
        if _is_varied(values):
            column = _standardized(values)
            if np.linalg.matrix_rank(np.stack([*columns, column])) > len(columns):
                columns.append(column)
                names.append(name)
    k = len(columns)
    if not names or n < CANDIDATES_PER_COEFFICIENT * k:
        return []
    x, y = np.stack(columns, axis=1), np.asarray(scores, dtype=np.float64)  # [N, K], [N]
    inverse = np.linalg.pinv(x)  # [K, N]
    coefficients = inverse @ y
    leverages = np.einsum("nk,kn->n", x, inverse)
    if leverages.max() > MAX_LEVERAGE:
        return []
    # What each candidate is off from what the others predict for it.
    left_out = (y - x @ coefficients) / (1 - leverages)
    errors = np.sqrt(np.square(inverse * left_out).sum(axis=1))
    halves = _quantile(n - k, num_judged or len(names)) * errors
    effects = [
        Effect(name, float(value), float(value - half), float(value + half), spread, n)
        for name, value, half, spread in zip(
            names,
            coefficients[-len(names) :],
            halves[-len(names) :],
            (float(np.std(factors[name])) for name in names),
            strict=True,
        )
    ]
    return sorted(effects, key=lambda effect: effect.difference)


def _is_ffn(text: str) -> bool:
    return text.partition("(")[0] == "ffn"


def _quantile(degrees_of_freedom: int, num_judged: int) -> float:
    """Half an interval's width in standard errors, for `num_judged` that hold together."""
    return float(stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / num_judged, degrees_of_freedom))


def _standardized(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    standardized: np.ndarray = (array - array.mean()) / array.std()
    return standardized


def _is_varied(values: Sequence[float]) -> bool:
    """Whether enough candidates differ from the most common value."""
    if not len(values):
        return False
    return len(values) - int(np.unique(values, return_counts=True)[1].max()) >= MIN_VARIED


def _trained(rows: Sequence[Row]) -> list[Row]:
    """Those that are done with the first rung."""
    return [row for row in rows if row["rungs"]]


def _scores(rows: Sequence[Row]) -> list[float]:
    return [row["rungs"][0]["score"] for row in rows]


def _latencies(rows: Sequence[Row]) -> list[float]:
    return [row["latency_ms"] for row in rows]
