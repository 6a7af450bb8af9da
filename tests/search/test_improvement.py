import random
from dataclasses import replace

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_space import space_config

from search import improvement
from search.evolution import EvolutionConfig, next_step
from search.frontier import hypervolume
from search.history import Candidate, History, Promotion, Proposal
from search.improvement import (
    NUM_CHOICES,
    NUM_PEERS,
    expected_improvement,
    new_choices,
    prices_tokens,
)
from search.space import SearchSpace

SPACE = SearchSpace(space_config())
TARGET_MS = 10.0
RUNG_TOKENS = (1000, 4000, 16000)
CONFIG = EvolutionConfig(algorithm="ehvi", initial_candidates=5, population_size=1, sample_size=1)


@pytest.mark.parametrize("num_costs", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 6])
def test_expected_improvement_is_the_mean_of_what_draws_add(num_costs, size):
    rng = np.random.default_rng(size)
    worst = (4.0, *[10.0] * num_costs)
    frontier = [(rng.uniform(2, 4.5), *rng.uniform(1, 11, num_costs).tolist()) for _ in range(size)]
    means, deviations = rng.uniform(2, 4, 5), np.array([1e-9, 0.1, 0.5, 1.0, 0.3])
    costs = rng.uniform(1, 10, (5, num_costs))
    gains = expected_improvement(frontier, means, deviations, costs, worst)

    reference = np.array(worst)
    before = hypervolume(frontier, worst)
    for gain, mean, deviation, cost in zip(gains, means, deviations, costs, strict=True):
        draws = mean + deviation * rng.standard_normal(4000)
        after = [
            moocore.hypervolume(np.array([*frontier, (draw, *cost)]), ref=reference)
            for draw in draws
        ]
        error = np.std(after) / np.sqrt(len(draws))
        assert gain == pytest.approx(np.mean(after) - before, abs=4 * error + 1e-6)


def test_what_costs_more_than_allowed_adds_nothing():
    gains = expected_improvement(
        [], np.array([1.0, 1.0]), np.array([0.1, 0.1]), np.array([[10.0], [9.0]]), (4.0, 10.0)
    )
    assert gains[0] == 0
    assert gains[1] == pytest.approx(3.0)


def test_a_price_is_between_the_next_rung_and_the_last():
    prices = prices_tokens(RUNG_TOKENS)
    assert np.all(np.diff([0, *RUNG_TOKENS]) <= prices)
    assert np.all(prices <= RUNG_TOKENS[-1] - np.array([0, *RUNG_TOKENS[:-1]]))
    assert prices_tokens((16000,)).tolist() == [16000]


def quality(genotype):
    """A score that a model may have, and its latency, from its operators."""
    operators = genotype.operators
    ffns = sum(text.startswith("ffn") for text in operators)
    return 4.0 - 0.15 * len(operators) - 0.1 * ffns, 1.0 + 1.1 * len(operators)


def answer(step, candidates, rng):
    """The candidate of a step, after it: sometimes it fails, and low rungs flatter the small."""
    if isinstance(step, Proposal):
        loss, latency_ms = quality(step.genotype)
        if latency_ms > TARGET_MS:
            return Candidate(step.number, step.genotype, "infeasible")
        before = Candidate(step.number, step.genotype, "scored", (), latency_ms)
        rung = 0
    else:
        before, rung = candidates[step.number], step.rung
        loss = quality(before.genotype)[0]
    if rng.random() < 0.1:
        return replace(before, state="failed")
    missing = 0.1 * (2 - rung) * len(before.genotype.operators)
    score = loss + missing + rng.gauss(0, 0.005)
    return replace(before, scores=(*before.scores, score))


def search(seed, num_candidates=25, config=CONFIG, rung_tokens=RUNG_TOKENS):
    """A whole search: every history, and the step that was taken in it."""
    rng = random.Random(f"scores/{seed}")
    candidates, steps = [], []
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
        after = answer(step, candidates, rng)
        if isinstance(step, Promotion):
            candidates[step.number] = after
        else:
            candidates.append(after)


@pytest.mark.parametrize("seed", range(4))
def test_a_search_tries_all_candidates_and_finishes_the_best(seed):
    steps = search(seed)
    for candidates, step in steps:
        if isinstance(step, Promotion):
            candidate = candidates[step.number]
            assert candidate.state == "scored"
            assert len(candidate.scores) == step.rung < len(RUNG_TOKENS)
        elif step is not None:
            assert step.genotype not in History(candidates)
            assert SPACE.allows(step.genotype)
    last, _ = steps[-1]
    assert sum(c.state != "infeasible" for c in last) == 25
    full = [c for c in last if len(c.scores) == 3 and c.state == "scored"]
    assert full
    # Nobody is trained in full only because the lowest rung flatters it.
    tried = [c for c in last if c.state == "scored"]
    best = min(quality(c.genotype)[0] for c in tried)
    assert min(quality(c.genotype)[0] for c in full) == best
    assert len(full) < len(tried)


@given(seed=st.integers(0, 3), length=st.integers(0, 1000))
@settings(max_examples=20)
def test_the_next_step_follows_from_seed_and_history_alone(seed, length):
    steps = search(seed, num_candidates=12)
    candidates, step = steps[length % len(steps)]
    random.random()
    again = next_step(
        SPACE,
        CONFIG,
        seed,
        TARGET_MS,
        History(candidates),
        rung_tokens=RUNG_TOKENS,
        num_candidates=12,
    )
    assert again == step


def test_what_others_work_on_is_left_to_them():
    steps = search(1)
    asked = 0
    for candidates, step in steps:
        if not isinstance(step, Promotion):
            continue
        busy = [replace(c, state="running") if c.number == step.number else c for c in candidates]
        other = next_step(
            SPACE,
            CONFIG,
            1,
            TARGET_MS,
            History(busy),
            rung_tokens=RUNG_TOKENS,
            num_candidates=25,
        )
        asked += 1
        assert other is None or other.number != step.number
    assert asked


def test_parents_have_been_trained():
    candidates, _ = search(1)[-1]
    # Whoever is new is forecast to be good, and runs.
    proposals = 0
    for number in range(CONFIG.initial_candidates, len(candidates)):
        running = [
            replace(each, state="running", scores=(), latency_ms=None) if place % 2 else each
            for place, each in enumerate(candidates[:number])
            if each.state != "failed"
        ]
        running = [replace(each, number=place) for place, each in enumerate(running)]
        settings = {"rung_tokens": RUNG_TOKENS, "num_candidates": 99}
        step = next_step(SPACE, CONFIG, 1, TARGET_MS, History(running), **settings)
        if isinstance(step, Proposal) and step.parent is not None:
            proposals += 1
            assert running[step.parent].scores
    assert proposals


def test_choices_are_new_all_different_and_of_a_number_that_does_not_grow_with_the_space():
    candidates, _ = search(1)[-1]
    parents = [each for each in candidates if each.scores]
    found = new_choices(SPACE, 0, History(candidates), parents)
    known = {each.genotype for each in candidates}
    genotypes = {each.genotype for each in found}
    assert len(genotypes) == len(found) == NUM_CHOICES
    assert not genotypes & known
    assert {each.parent for each in found} <= {each.number for each in parents}


def test_while_nothing_has_a_score_others_are_waited_for():
    running = [
        Candidate(number, step.genotype, "running")
        for number, (_, step) in enumerate(search(0)[:5])
    ]
    history = History(running)
    settings = {"rung_tokens": RUNG_TOKENS, "num_candidates": 5}
    assert next_step(SPACE, CONFIG, 0, TARGET_MS, history, **settings) is None
    more = next_step(SPACE, CONFIG, 0, TARGET_MS, history, **settings | {"num_candidates": 6})
    assert isinstance(more, Proposal)


def test_with_the_score_alone_the_best_is_finished():
    config = replace(CONFIG, objectives=("loss",))
    last, _ = search(0, num_candidates=12, config=config)[-1]
    tried = [each for each in last if each.state == "scored"]
    full = [each for each in tried if len(each.scores) == 3]
    best = min(quality(each.genotype)[0] for each in tried)
    assert min(quality(each.genotype)[0] for each in full) == best


def test_three_objectives_and_a_single_rung():
    config = replace(CONFIG, objectives=("loss", "latency_ms", "memory_bytes"))
    rng = random.Random(0)
    candidates = []
    for number in range(12):
        step = next_step(
            SPACE,
            config,
            0,
            TARGET_MS,
            History(candidates),
            rung_tokens=(1000,),
            num_candidates=12,
        )
        assert isinstance(step, Proposal)
        loss, latency_ms = quality(step.genotype)
        memory_bytes = rng.randrange(1000, 2000)
        candidates.append(
            Candidate(number, step.genotype, "scored", (loss,), latency_ms, memory_bytes)
        )
    assert {"seed", "random", "mutation"} == {
        step.origin for _, step in search(0, rung_tokens=(1000,)) if step is not None
    }


@pytest.mark.parametrize("num_scores", [1, 12])
def test_a_long_history_is_looked_at_in_part(monkeypatch, num_scores):
    looked_at = []
    original = improvement.forecast

    def forecast(genotypes, scores, *arguments):
        looked_at.append(sum(map(bool, scores)))
        return original(genotypes, scores, *arguments)

    monkeypatch.setattr(improvement, "forecast", forecast)
    rng, genotypes = random.Random(0), dict.fromkeys(SPACE.seeds.values())
    while len(genotypes) < 3 * NUM_PEERS:
        genotypes[SPACE.sample(rng)] = None
    candidates = [
        Candidate(number, genotype, "scored", (rng.uniform(3, 4),) * num_scores, rng.uniform(5, 9))
        for number, genotype in enumerate(genotypes)
    ]
    next_step(
        SPACE,
        CONFIG,
        0,
        TARGET_MS,
        History(candidates),
        rung_tokens=[1000 * 2**rung for rung in range(12)],
        num_candidates=len(candidates) + 1,
    )
    assert looked_at
    assert max(looked_at) < 1.5 * NUM_PEERS
