import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_space import ATTENTION, FFN, space_config

from search.evolution import (
    EvolutionConfig,
    cycle_start,
    living,
    next_step,
    propose,
    select_parent,
)
from search.history import Candidate, History, Promotion
from search.rungs import promote
from search.space import SearchSpace
from slm.config import ConfigError, read

CONFIG = EvolutionConfig(initial_candidates=6, population_size=5, sample_size=3)
PARETO = replace(CONFIG, algorithm="pareto")
SPACE = SearchSpace(space_config())
TARGET_MS = 10.0


def scored(number, genotype, rng):
    """What training and measuring could have said."""
    state = rng.choices(["scored", "failed", "infeasible", "running"], [8, 1, 1, 1])[0]
    if state == "scored":
        return Candidate(number, genotype, state, (rng.uniform(1, 2),), rng.uniform(5, 12))
    return Candidate(number, genotype, state)


def run(seed, count, space=SPACE, config=CONFIG):
    history, proposals = History(), []
    rng = random.Random(f"scores/{seed}")
    for _ in range(count):
        proposal = propose(space, config, seed, TARGET_MS, history)
        if proposal is None:
            break
        proposals.append(proposal)
        history.put(scored(proposal.number, proposal.genotype, rng))
    return list(history), proposals


@pytest.mark.parametrize("config", [CONFIG, PARETO])
@given(seed=st.integers(0, 1000), length=st.integers(0, 29))
def test_any_prefix_of_the_history_gives_the_same_next_proposal(config, seed, length):
    history, proposals = run(seed, 30, config=config)
    # Whatever was drawn in between.
    random.random()
    prefix = History(history[:length])
    assert propose(SPACE, config, seed, TARGET_MS, prefix) == proposals[length]


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
        population = living(History(history[: proposal.number]), 5, 40)
        assert proposal.parent in [c.number for c in population]
        assert proposal.factor


def test_another_seed_is_another_search():
    assert run(1, 10)[1][2:] != run(2, 10)[1][2:]


def test_the_oldest_dies():
    genotype = SPACE.seed("hybrid")
    candidates = [Candidate(n, genotype, "scored", (1.0,), 1.0) for n in range(8)]
    candidates[6] = Candidate(6, genotype, "failed")
    # Trained on a first rung, it was lost on the second.
    candidates[4] = Candidate(4, genotype, "failed", (1.0,), 1.0)
    history = History(candidates)
    assert [c.number for c in living(history, 4, 8)] == [7, 5, 3, 2]
    assert [c.number for c in living(history, 4, 7)] == [5, 3, 2, 1]


def test_children_of_a_cycle_have_parents_of_the_same_population():
    config = replace(CONFIG, children_per_cycle=10)
    assert [cycle_start(n, config) for n in (3, 6, 7, 15, 16, 25, 26)] == [3, 6, 6, 6, 16, 16, 26]
    assert [cycle_start(n, CONFIG) for n in (3, 6, 7, 15)] == [3, 6, 7, 15]


def test_the_parent_has_the_lowest_loss_among_those_that_meet_the_target():
    genotype = SPACE.seed("hybrid")
    best = Candidate(0, genotype, "scored", (1.5,), 9.0)
    sample = [
        best,
        Candidate(1, genotype, "scored", (1.0,), 11.0),
        Candidate(2, genotype, "scored", (1.6,), 2.0),
    ]
    assert select_parent(sample, CONFIG, TARGET_MS) is best
    # None meets the target: the fastest leads back to it.
    assert select_parent(sample, CONFIG, 1.0) is sample[2]


def test_the_parent_is_on_the_highest_rung_and_there_on_the_frontier():
    genotype = SPACE.seed("hybrid")
    promoted = Candidate(3, genotype, "scored", (1.9, 1.4), 9.0)
    sample = [
        Candidate(0, genotype, "scored", (1.0,), 2.0),
        Candidate(1, genotype, "scored", (1.8, 1.5), 9.5),
        Candidate(2, genotype, "scored", (1.7, 1.6), 9.5),
        promoted,
    ]
    assert select_parent(sample, PARETO, TARGET_MS) is promoted
    # Both are ends of the frontier, and as far apart: the first drawn.
    faster = Candidate(4, genotype, "scored", (1.9, 1.6), 8.0)
    assert select_parent([faster, *sample], PARETO, TARGET_MS) is faster
    assert select_parent(sample[:1], PARETO, TARGET_MS) is sample[0]


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
    assert propose(space, CONFIG, 0, TARGET_MS, History(history)) is None


def test_config_problems():
    with pytest.raises(ConfigError) as error:
        read(
            EvolutionConfig,
            {
                "initial_candidates": 0,
                "population_size": 2,
                "sample_size": 3,
                "objectives": ["latency_ms", "latency_ms"],
                "promoted_share": 1.0,
            },
            "evolution",
        )
    assert error.value.problems == [
        "evolution.initial_candidates: must be >= 1, got 0",
        "evolution.sample_size: must be <= population_size 2, got 3",
        "evolution.promoted_share: must be above 0 and below 1, got 1.0",
        "evolution.objectives: must begin with loss, cloze_error, continuation_error or "
        "task_error, and go on with others, each once, got ['latency_ms', 'latency_ms']",
    ]


@pytest.mark.parametrize(
    ("objectives", "quality"),
    [
        (["loss", "latency_ms"], "loss"),
        (["cloze_error", "latency_ms", "memory_bytes"], "cloze_error"),
        (["continuation_error"], "continuation_error"),
        ([], None),
        (["latency_ms", "loss"], None),
        (["loss", "cloze_error"], None),
        (["loss", "latency_ms", "latency_ms"], None),
    ],
)
def test_one_objective_of_quality_comes_first(objectives, quality):
    values = dict.fromkeys(("initial_candidates", "population_size", "sample_size"), 1)
    values |= {"objectives": objectives}
    if quality is not None:
        assert read(EvolutionConfig, values, "evolution").quality == quality
        return
    with pytest.raises(
        ConfigError, match="must begin with loss, cloze_error, continuation_error or"
    ):
        read(EvolutionConfig, values, "evolution")


def search(seed, num_candidates=30, rung_tokens=(1, 4, 16), config=PARETO):
    """A whole search with rungs: every history, and the step that was taken in it."""
    rng = random.Random(f"scores/{seed}")
    candidates: list[Candidate] = []
    steps = []
    while True:
        step = next_step(
            SPACE,
            config,
            seed,
            TARGET_MS,
            History(candidates),
            rung_tokens=rung_tokens,
            num_candidates=num_candidates,
        )
        steps.append((list(candidates), step))
        if step is None:
            return steps
        if isinstance(step, Promotion):
            before = candidates[step.number]
            if rng.random() < 0.1:
                after = replace(before, state="failed")
            else:
                after = replace(before, scores=(*before.scores, rng.uniform(0, 1)))
            candidates[step.number] = after
        else:
            candidates.append(scored(step.number, step.genotype, rng))


@given(st.integers(0, 100))
@settings(max_examples=20)
def test_whoever_goes_on_is_among_the_best_share_of_its_rung(seed):
    steps = search(seed)
    promotions = 0
    for candidates, step in steps:
        if not isinstance(step, Promotion):
            continue
        promotions += 1
        rung = step.rung - 1
        peers = [c for c in candidates if len(c.scores) > rung and c.state != "failed"]
        points = {c.number: (c.scores[rung], c.latency_ms) for c in peers}
        assert len(candidates[step.number].scores) == step.rung

        def dominators(number, points=points):
            own = points[number]
            return sum(p != own and p[0] <= own[0] and p[1] <= own[1] for p in points.values())

        # Whoever beats it counts among the best share too.
        assert dominators(step.number) < len(peers) * PARETO.promoted_share
    assert promotions
    # In the end nobody is left who should go on.
    assert steps[-1][1] is None
    assert promote(History(steps[-1][0]), 3, PARETO.promoted_share, PARETO.objectives) is None
    assert sum(c.state != "infeasible" for c in steps[-1][0]) == 30


@given(st.integers(0, 100))
@settings(max_examples=5)
def test_a_history_that_grew_is_the_same_as_one_that_is_read_anew(seed):
    grown = History()
    for candidates, step in search(seed):
        for candidate in candidates:
            grown.put(candidate)
        again = next_step(
            SPACE, PARETO, seed, TARGET_MS, grown, rung_tokens=(1, 4, 16), num_candidates=30
        )
        assert again == step


def test_without_rungs_nobody_goes_on():
    assert not any(isinstance(step, Promotion) for _, step in search(0, rung_tokens=(1,)))


def test_random_search_has_no_parents():
    config = replace(CONFIG, algorithm="random")
    assert {p.origin for p in run(3, 30, config=config)[1]} == {"seed", "random"}
