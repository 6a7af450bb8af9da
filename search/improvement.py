"""`ehvi`: train whoever promises the frontier the most for the tokens it costs.

Every candidate, tried or not, is forecast to the last rung (`search.forecast`). Its expected
hypervolume improvement (Emmerich 2006) is what the volume between the frontier of those that were
trained in full and a worst point is expected to grow by. Divided by what training it further costs,
it decides everything: who is trained on, and whether and which new candidate is tried. New ones are
chosen among mutations of those that seem to be on the frontier.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from search.forecast import Forecast, forecast
from search.frontier import Point, hypervolume, non_dominated
from search.genotype import Genotype
from search.history import Candidate, History, Objective, Promotion, Proposal
from search.offspring import mutant, propose_child
from search.space import SearchSpace

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

# New candidates are chosen among so many, or fewer if so many draws have no more that are new,
NUM_CHOICES = 32
NUM_DRAWS = 128
# each after one mutation, and with this probability after a further one, and so on.
FURTHER_MUTATION = 0.5
# On the first rung the newest so many are taken into account, on each further one half as many but
# no fewer than these, beside the frontier.
NUM_PEERS = 128
FEWEST_PEERS = 16
# The worst point: so far beyond the worst score of the frontier, as a share of all scores'
# deviation, and beyond the largest costs.
SCORE_MARGIN = 0.1
COST_MARGIN = 0.02
# Once all candidates are tried: an expected gain below this share of the volume ends the search.
SMALLEST_GAIN = 1e-4


def next_by_improvement(
    space: SearchSpace,
    objectives: Sequence[Objective],
    seed: int,
    target_ms: float,
    history: History,
    *,
    rung_tokens: Sequence[int],
    tries_new: bool,
) -> Promotion | Proposal | None:
    """Who is trained next; None when nobody is worth it, or while others work on all who are.

    rung_tokens: to train on until each rung is done. tries_new: whether new ones are considered.
    """
    num_rungs = len(rung_tokens)
    known = _known(history, objectives, num_rungs)
    if not any(each.scores for each in known):
        return None
    choices: list[Proposal] = []
    if tries_new:
        choices = new_choices(space, seed, history, _parents(known, objectives, num_rungs))
    ahead = _forecast(known, choices, objectives, num_rungs)
    points = _points(ahead)
    done = np.array([len(each.scores) for each in known] + [0] * len(choices))
    # What others work on counts as if it had come to what is forecast.
    is_busy = np.array([each.state != "scored" for each in known] + [False] * len(choices))
    is_settled = is_busy | (done == num_rungs)
    settled, unsettled = np.flatnonzero(is_settled), np.flatnonzero(~is_settled)
    if not len(unsettled):
        return None
    worst = _worst(points[: len(known)], objectives, target_ms)
    frontier = [points[place] for place in settled]
    gains = expected_improvement(
        frontier,
        ahead.means[unsettled],
        ahead.deviations[unsettled],
        ahead.costs[unsettled],
        worst,
    )
    if not choices and gains.max() <= SMALLEST_GAIN * hypervolume(frontier, worst):
        return None
    prices = prices_tokens(rung_tokens)[done[unsettled]]
    # Of equals the last: a new candidate.
    best = int(unsettled[np.lexsort((unsettled, gains / prices))[-1]])
    if best < len(known):
        return Promotion(known[best].number, int(done[best]))
    return choices[best - len(known)]


def expected_improvement(
    frontier: Sequence[Point],
    means: np.ndarray,
    deviations: np.ndarray,
    costs: np.ndarray,
    worst: Point,
) -> np.ndarray:
    """What each candidate is expected to add to the hypervolume of a frontier, [N].

    Its score, the first objective, is normally distributed; the others, its costs, are certain.
    So the space of the costs falls into cells with one best score each, and the expectation is a
    sum over these. means, deviations: [N]. costs: [N, C], above zero. worst: where volume ends.
    """
    from scipy.special import ndtr

    points = np.array(frontier, dtype=float).reshape(-1, len(worst))
    worst_score, worst_costs = worst[0], np.array(worst[1:])
    edges = [
        np.unique(np.concatenate([[0.0], column[column < end], [end]]))
        for column, end in zip(points[:, 1:].T, worst_costs, strict=True)
    ]
    lower = np.array(list(product(*(each[:-1] for each in edges))))  # [cells, C]
    upper = np.array(list(product(*(each[1:] for each in edges))))
    reach = (points[None, :, 1:] <= lower[:, None, :]).all(-1)  # [cells, F]
    best = np.where(reach, points[None, :, 0], worst_score).min(1, initial=worst_score)
    # The part of a cell that costs no less than a candidate. [N, cells, C]
    sides = upper[None] - np.maximum(lower[None], costs[:, None, :])
    volumes = np.maximum(sides, 0.0).prod(-1)
    distances = (best[None] - means[:, None]) / deviations[:, None]
    densities = np.exp(-(distances**2) / 2) / math.sqrt(2 * math.pi)
    gains = deviations[:, None] * (distances * ndtr(distances) + densities)
    return np.asarray((volumes * np.maximum(gains, 0.0)).sum(1))


def prices_tokens(rung_tokens: Sequence[int]) -> np.ndarray:
    """What training a candidate further is held to cost, by the number of rungs it is done with.

    The geometric mean of the tokens to the next rung, which a closer look costs, and to the last,
    which the gain costs. By the first alone a search would never stop trying new candidates, by the
    second it would finish all that it has begun.
    """
    begun = np.array([0, *rung_tokens[:-1]])
    return np.sqrt((np.array(rung_tokens) - begun) * (rung_tokens[-1] - begun).astype(float))


def new_choices(
    space: SearchSpace, seed: int, history: History, parents: Sequence[Candidate]
) -> list[Proposal]:
    """New candidates, all different; others after every score."""
    number = len(history)
    rng = random.Random(f"{seed}/{number}/{history.num_scores}")
    found: dict[Genotype, Proposal] = {}
    for _ in range(NUM_DRAWS):
        if len(found) == NUM_CHOICES:
            break
        num_mutations = 1
        while rng.random() < FURTHER_MUTATION:
            num_mutations += 1
        choice = mutant(space, number, rng, rng.choice(parents), num_mutations)
        if choice is not None and choice.genotype not in history:
            found.setdefault(choice.genotype, choice)
    if not found:
        # All around is known.
        choice = propose_child(space, number, rng, history, rng.choice(parents))
        return [] if choice is None else [choice]
    return list(found.values())


def _known(history: History, objectives: Sequence[Objective], num_rungs: int) -> list[Candidate]:
    """The candidates to go by, in order: the newest of each rung, and the frontier of the last."""
    full = history.done(num_rungs - 1, len(history))
    on_frontier = non_dominated([each.point(objectives, -1) for each in full])
    found = [each for each, is_on in zip(full, on_frontier, strict=True) if is_on]
    for rung in range(num_rungs):
        found += history.done(rung, max(NUM_PEERS >> rung, FEWEST_PEERS))
    numbers = {each.number for each in found} | history.pending
    return [history[number] for number in sorted(numbers)]


def _parents(
    known: Sequence[Candidate], objectives: Sequence[Objective], num_rungs: int
) -> list[Candidate]:
    """The frontier if all went on to the last rung with the average change.

    Whose scores are awaited has no weights that a child could begin with.
    """
    scored = [each for each in known if each.scores]
    changes = [0.0] * num_rungs
    for rung in range(1, num_rungs):
        went_on = [each.scores for each in scored if len(each.scores) > rung]
        total = sum(scores[rung] - scores[rung - 1] for scores in went_on)
        changes[rung] = total / max(1, len(went_on))
    points = []
    for each in scored:
        score, *costs = each.point(objectives, -1)
        points.append((score + sum(changes[len(each.scores) :]), *costs))
    return [each for each, is_on in zip(scored, non_dominated(points), strict=True) if is_on]


def _forecast(
    known: Sequence[Candidate],
    choices: Sequence[Proposal],
    objectives: Sequence[Objective],
    num_rungs: int,
) -> Forecast:
    # Of matrices so small, further threads only keep whoever trains or is timed from the cores.
    with _libraries().limit(limits=1, user_api="blas"):
        return forecast(
            [*(each.genotype for each in known), *(each.genotype for each in choices)],
            [*(each.scores for each in known), *(() for _ in choices)],
            [*(each.costs(objectives) for each in known), *(None for _ in choices)],
            num_rungs,
        )


@cache
def _libraries() -> ThreadpoolController:
    """Those with threads of their own, numpy's among them."""
    # It writes to the environment when it is imported.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _points(ahead: Forecast) -> list[Point]:
    return [
        (float(mean), *map(float, costs))
        for mean, costs in zip(ahead.means, ahead.costs, strict=True)
    ]


def _worst(points: Sequence[Point], objectives: Sequence[Objective], target_ms: float) -> Point:
    """Where volume ends: a little beyond the frontier of the forecasts, and what is allowed."""
    on_frontier = [p for p, is_on in zip(points, non_dominated(points), strict=True) if is_on]
    margin = SCORE_MARGIN * float(np.std([point[0] for point in points]))
    costs = [
        target_ms if objective == "latency_ms" else max(point[place] for point in points)
        for place, objective in enumerate(objectives[1:], start=1)
    ]
    return (
        max(point[0] for point in on_frontier) + margin,
        *((1 + COST_MARGIN) * cost for cost in costs),
    )
