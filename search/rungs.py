"""Which candidate is trained further: asynchronous successive halving for several objectives.

A candidate trains to a rung's budget, is ranked among its peers by non-dominated fronts of its
objectives, and is promoted to the next rung if it is among the best share of them (ASHA, Li 2020;
MO-ASHA, Schmucker 2021). It goes on from its checkpoint. Nobody waits for a rung to fill up.

Peers are the newest candidates on the rung: evolution improves what it proposes, so that who was
among the best early on must not be compared with what came much later.
"""

from __future__ import annotations

from collections.abc import Sequence

from search.frontier import best_first
from search.history import Candidate, History, Objective, Promotion

MAX_RUNGS = 16
# How many of the newest candidates of a rung are compared.
NUM_PEERS = 256


def promote(
    history: History, num_rungs: int, share: float, objectives: Sequence[Objective]
) -> Promotion | None:
    """The candidate to train further now, on the highest rung there is one for; None if none is.

    share: of the candidates of a rung, how many go on.
    """
    for rung in reversed(range(num_rungs - 1)):
        peers = history.done(rung, NUM_PEERS)
        # No rung is ever left by none.
        for candidate in ranked(peers, rung, objectives)[: int(share * len(peers))]:
            if candidate.state == "scored" and len(candidate.scores) == rung + 1:
                return Promotion(candidate.number, rung + 1)
    return None


def ranked(
    candidates: Sequence[Candidate], rung: int, objectives: Sequence[Objective]
) -> list[Candidate]:
    """The candidates, the best first, by what they had reached after a rung."""
    points = [candidate.point(objectives, rung) for candidate in candidates]
    return [candidates[place] for place in best_first(points)]
