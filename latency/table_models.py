"""In which models a latency table's operators are measured: each alone, and many together.

What an operator costs depends on what is around it: whether its code is in the caches, whether the
head's weights still are. Rows are to hold in models as they are searched for, so they are fitted to
such: hybrids of different depths, in which FFNs follow mixers in random order.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import numpy as np

# Of a hybrid, in operators.
MIN_DEPTH, MAX_DEPTH = 3, 9
MAX_FFNS_PER_MIXER = 2
# More hybrids than there are operators, by so many, if there is memory; so few suffice to tell the
# rest of a model from what each kind of operator adds.
SPARE_MODELS = 7
MIN_HYBRIDS = 3
DRAWS = 200

Operator = TypeVar("Operator")
Models: TypeAlias = list[tuple[Operator, ...]]


def table_models(
    mixers: Sequence[Operator],
    ffns: Sequence[Operator],
    fits: Callable[[Models[Operator]], bool] = lambda models: True,
) -> Models[Operator]:
    """Models of these operators, from which all their costs can be found; always the same.

    Each alone; and of many draws of as many hybrids and some more, those that tell the costs apart
    best (D-optimal, errors being in proportion to depth). There are fewer hybrids if not all models
    fit into memory at once: such large ones come from there at every step, whatever is beside.
    """
    operators = list(dict.fromkeys([*mixers, *ffns]))
    count = len(operators) + SPARE_MODELS
    while True:
        rng = random.Random(0)
        draws = [[_hybrid(mixers, ffns, rng) for _ in range(count)] for _ in range(DRAWS)]
        models = max(
            ([*((each,) for each in operators), *hybrids] for hybrids in draws),
            key=lambda each: _information(each, operators),
        )
        if fits(models) or count == MIN_HYBRIDS:
            return models
        count -= 1


def costs_in(model: Sequence[Operator], operators: Sequence[Operator]) -> list[int]:
    """How often the costs are in a model: of its rest, of another kind, of each operator."""
    counts = Counter(model)
    return [1, len(counts), *(counts[each] for each in operators)]


def _hybrid(
    mixers: Sequence[Operator], ffns: Sequence[Operator], rng: random.Random
) -> tuple[Operator, ...]:
    depth = rng.randint(MIN_DEPTH, MAX_DEPTH)
    found: list[Operator] = []
    while len(found) < depth:
        found.append(rng.choice(mixers))
        found += rng.choices(ffns, k=rng.randint(0, MAX_FFNS_PER_MIXER))
    return tuple(found[:depth])


def _information(models: Sequence[Sequence[Operator]], operators: Sequence[Operator]) -> float:
    """Of their times about the costs: log det XᵀX."""
    x = np.array([costs_in(each, operators) for each in models], dtype=float)
    # As a model's rest is about as costly as a few operators.
    x /= np.array([[MIN_DEPTH + len(each)] for each in models])
    sign, log_det = np.linalg.slogdet(x.T @ x)
    return float(log_det) if sign > 0 else -np.inf
