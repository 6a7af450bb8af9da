"""New candidates at random: drawn from the space, or mutated from one that is known."""

from __future__ import annotations

import random

from search.history import Candidate, History, Proposal
from search.space import SearchSpace

PROPOSAL_ATTEMPTS = 500
# A parent whose neighbours are all known: so many attempts for each further mutation step.
ATTEMPTS_PER_STEP = 25


def propose_random(
    space: SearchSpace, number: int, rng: random.Random, known: History
) -> Proposal | None:
    """A draw from the space that is new."""
    for _ in range(PROPOSAL_ATTEMPTS):
        if (genotype := space.sample(rng)) not in known:
            return Proposal(number, genotype, "random")
    return None


def propose_child(
    space: SearchSpace, number: int, rng: random.Random, known: History, parent: Candidate
) -> Proposal | None:
    """The parent after a mutation, or as many as make it new; else a new draw from the space."""
    for attempt in range(PROPOSAL_ATTEMPTS):
        child = mutant(space, number, rng, parent, 1 + attempt // ATTEMPTS_PER_STEP)
        if child is None:
            break
        if child.genotype not in known:
            return child
    return propose_random(space, number, rng, known)


def mutant(
    space: SearchSpace, number: int, rng: random.Random, parent: Candidate, num_mutations: int
) -> Proposal | None:
    """The parent after so many mutations, new or not; None if nothing can change."""
    genotype, factors = parent.genotype, []
    for _ in range(num_mutations):
        if (mutation := space.mutate(genotype, rng)) is None:
            return None
        genotype = space.canonical(mutation.genotype)
        factors.append(mutation.factor)
    return Proposal(number, genotype, "mutation", parent=parent.number, factor="+".join(factors))
