import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_space import ATTENTION, FFN, space_config

from search.evolution import Candidate, EvolutionConfig, living, propose, select_parent
from search.space import SearchSpace
from slm.config import ConfigError, read

CONFIG = EvolutionConfig(initial_candidates=6, population_size=5, sample_size=3)
SPACE = SearchSpace(space_config())
TARGET_MS = 10.0


def scored(number, genotype, rng):
    """What training and measuring could have said."""
    state = rng.choices(["scored", "failed", "infeasible", "running"], [8, 1, 1, 1])[0]
    scores = (rng.uniform(1, 2), rng.uniform(5, 12)) if state == "scored" else (None, None)
    return Candidate(number, genotype, state, *scores)


def run(seed, count, space=SPACE, config=CONFIG):
    history, proposals = [], []
    rng = random.Random(f"scores/{seed}")
    for _ in range(count):
        proposal = propose(space, config, seed, TARGET_MS, history)
        if proposal is None:
            break
        proposals.append(proposal)
        history.append(scored(proposal.number, proposal.genotype, rng))
    return history, proposals


@given(st.integers(0, 1000), st.integers(0, 29))
def test_any_prefix_of_the_history_gives_the_same_next_proposal(seed, length):
    history, proposals = run(seed, 30)
    # Whatever was drawn in between.
    random.random()
    assert propose(SPACE, CONFIG, seed, TARGET_MS, history[:length]) == proposals[length]


def test_proposals_do_not_depend_on_the_process():
    code = (
        "import sys; sys.path.insert(0, 'tests/search');"
        "from test_evolution import run; print(run(3, 20)[1])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{run(3, 20)[1]}\n"}


@given(st.integers(0, 1000))
def test_a_run_has_no_duplicates_and_stays_in_the_space(seed):
    history, proposals = run(seed, 40)
    assert len({candidate.genotype for candidate in history}) == 40
    for proposal in proposals:
        assert SPACE.allows(proposal.genotype)
        assert SPACE.canonical(proposal.genotype) == proposal.genotype


def test_seeds_come_first_then_random_then_children_of_scored_parents():
    history, proposals = run(7, 40)
    origins = [proposal.origin for proposal in proposals]
    assert [proposal.seed_name for proposal in proposals[:2]] == ["transformer", "hybrid"]
    first_child = origins.index("mutation")
    assert origins == ["seed"] * 2 + ["random"] * (first_child - 2) + ["mutation"] * (
        40 - first_child
    )
    feasible = [c for c in history[:first_child] if c.state != "infeasible"]
    assert len(feasible) == CONFIG.initial_candidates
    for proposal in proposals[first_child:]:
        assert proposal.parent in [c.number for c in living(history[: proposal.number], 5)]
        assert proposal.factor


def test_another_seed_is_another_search():
    assert run(1, 10)[1][2:] != run(2, 10)[1][2:]


def test_the_oldest_dies():
    genotype = SPACE.seed("hybrid")
    history = [Candidate(n, genotype, "scored", 1.0, 1.0) for n in range(8)]
    history[6] = Candidate(6, genotype, "failed")
    assert [c.number for c in living(history, 4)] == [3, 4, 5, 7]


def test_the_parent_has_the_lowest_loss_among_those_that_meet_the_target():
    genotype, rng = SPACE.seed("hybrid"), random.Random(0)
    best = Candidate(0, genotype, "scored", 1.5, 9.0)
    population = [
        best,
        Candidate(1, genotype, "scored", 1.0, 11.0),
        Candidate(2, genotype, "scored", 1.6, 2.0),
    ]
    assert select_parent(population, 3, TARGET_MS, rng) is best
    # None meets the target: the fastest leads back to it.
    assert select_parent(population, 3, 1.0, rng) is population[2]
    # A sample of one is any.
    assert {select_parent(population, 1, TARGET_MS, rng).number for _ in range(50)} == {0, 1, 2}


def test_an_exhausted_space_ends_the_proposals():
    space = SearchSpace(
        space_config(
            mixers=[ATTENTION],
            ratios=["0:1"],
            max_blocks=2,
            max_operators=4,
            ffns_per_mixer=[0, 1],
            seeds={"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 1}},
            reference={"seed": "t", "width": 16},
        )
    )
    history, _ = run(0, 50, space)
    # a, aF, aa, aaF, aFa, aFaF; canonical genotypes of at most two blocks.
    assert len(history) == 6
    assert propose(space, CONFIG, 0, TARGET_MS, history) is None


def test_config_problems():
    with pytest.raises(ConfigError) as error:
        read(
            EvolutionConfig,
            {"initial_candidates": 0, "population_size": 2, "sample_size": 3},
            "evolution",
        )
    assert error.value.problems == [
        "evolution.initial_candidates: must be >= 1, got 0",
        "evolution.sample_size: must be <= population_size 2, got 3",
    ]
