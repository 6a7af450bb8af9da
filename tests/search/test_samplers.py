import math
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import cache

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from small_space import ATTENTION, DELTANET, FFN, MAMBA2, WINDOW, factors_config, space_config

from search.evolution import EvolutionConfig, propose
from search.frontier import hypervolume
from search.history import Candidate, History
from search.samplers import Encoding, told_study
from search.space import SearchSpace, SpaceConfig
from slm.config import ConfigError, compose, read

NSGA2 = EvolutionConfig(initial_candidates=8, population_size=8, sample_size=3, algorithm="nsga2")
TPE = replace(NSGA2, algorithm="tpe")
RANDOM = replace(NSGA2, algorithm="random")
# A start that is in every space.
ONE_BLOCK = {
    "seeds": {"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 1}},
    "reference": {"seed": "t", "width": 16},
}
SPACE = SearchSpace(space_config())
SMALL = SearchSpace(space_config(max_blocks=2, max_operators=5, **ONE_BLOCK))
FACTORS = SearchSpace(factors_config())
TARGET_MS = 6.0


@cache
def shipped(name):
    config = compose("search", [f"space={name}", "target_ms=1"])[0]
    return SearchSpace(read(SpaceConfig, config.space, "space"))


def measured(number, genotype):
    """Invented, and smooth enough to be learned: what helps differs in what it costs."""
    operators = genotype.operators
    latency_ms = sum({ATTENTION: 1.0, DELTANET: 0.6}.get(operator, 0.45) for operator in operators)
    if latency_ms > TARGET_MS:
        return Candidate(number, genotype, "infeasible")
    gains = {DELTANET: 0.15, FFN: 0.1, MAMBA2: 0.05, WINDOW: 0.02}
    loss = 4 - sum(gains.get(operator, 0) for operator in operators)
    loss += 0.1 * abs(operators.count(ATTENTION) - 2)
    return Candidate(number, genotype, "scored", (loss,), latency_ms)


def search(config, seed, count, space=SPACE, outcome=measured):
    """Candidates of a search that was never interrupted, and what each came from."""
    history, origins = History(), []
    while len(history) < count and (proposal := propose(space, config, seed, TARGET_MS, history)):
        history.put(outcome(proposal.number, proposal.genotype))
        origins.append(proposal.origin)
    return list(history), origins


def accident(number, genotype):
    """All that can become of a candidate."""
    rng = random.Random(f"{number}/{genotype}")
    state = rng.choices(["scored", "failed", "infeasible", "running"], [7, 1, 1, 1])[0]
    losses = (rng.uniform(1, 2),) if state in ("scored", "failed") else ()
    latency_ms = rng.uniform(3, 8) if losses else None
    return Candidate(number, genotype, state, losses, latency_ms)


# The encoding


def assert_round_trip(space, genotype):
    encoding = Encoding(space.rules)
    parameters = encoding.encode(genotype)
    # Optuna checks that parameters and ranges are of the same names, and every value in its range.
    optuna.create_trial(params=parameters, distributions=encoding.distributions, value=0.0)
    assert encoding.decode(parameters) == genotype


@pytest.mark.parametrize("name", ["small", "hybrid_bench"])
def test_every_genotype_has_parameters_that_stand_for_it(name):
    space = SMALL if name == "small" else shipped(name)
    genotypes = list(space.genotypes())
    assert len(genotypes) > 200
    encoding = Encoding(space.rules)
    for genotype in genotypes:
        assert encoding.decode(encoding.encode(genotype)) == genotype
    for genotype in random.Random(0).sample(genotypes, 20):
        assert_round_trip(space, genotype)


@pytest.mark.parametrize("name", ["factors", "nemotron_flash", "demo_free"])
@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_genotypes_of_large_spaces_have_parameters_that_stand_for_them(name, rng):
    space = FACTORS if name == "factors" else shipped(name)
    assert_round_trip(space, space.sample(rng))


def test_seeds_of_nemotron_flash_have_parameters_that_stand_for_them():
    space = shipped("nemotron_flash_3b")
    for genotype in space.seeds.values():
        assert_round_trip(space, genotype)


def test_blocks_follow_until_there_is_no_room():
    encoding = Encoding(SPACE.rules)
    parameters = {
        "A.ratio": "1:2",
        "A.partner": ATTENTION,
        "A.mixer": DELTANET,
        "A.ffns_per_mixer": 1,
        "B.ratio": "0:1",
        "B.partner": ATTENTION,
        "B.mixer": MAMBA2,
        "B.ffns_per_mixer": 0,
        # The same mixer as its own partner: alone.
        "C.ratio": "1:3",
        "C.partner": WINDOW,
        "C.mixer": WINDOW,
        "C.ffns_per_mixer": 2,
    }
    parameters |= dict(zip((f"block_{place}" for place in range(1, 8)), "BCBAAAA", strict=True))
    first = (ATTENTION, FFN, DELTANET, FFN, DELTANET, FFN)
    rest = (MAMBA2, WINDOW, FFN, FFN, MAMBA2)
    for num_operators, expected in [(6, first), (9, first + rest[:1]), (12, first + rest)]:
        genotype = encoding.decode(parameters | {"num_operators": num_operators})
        assert genotype.operators == expected
    assert encoding.decode(parameters | {"num_operators": 5}) is None


def test_what_there_is_no_choice_of_is_no_parameter():
    space = SearchSpace(
        space_config(
            mixers=[ATTENTION],
            ratios=["0:1"],
            ffns_per_mixer=[1],
            max_blocks=1,
            max_operators=2,
            **ONE_BLOCK,
        )
    )
    assert Encoding(space.rules).distributions.keys() == {"num_operators"}
    assert_round_trip(space, space.seed("t"))


# What the sampler is told


def test_a_candidate_is_told_with_its_last_loss_or_as_what_became_of_it():
    genotypes = list(SMALL.genotypes())
    history = History(
        [
            Candidate(0, genotypes[0], "scored", (3.0, 2.0), 5.0),
            Candidate(1, genotypes[1], "infeasible"),
            Candidate(2, genotypes[2], "failed", (1.0,), 5.0),
            Candidate(3, genotypes[3], "running"),
            Candidate(4, genotypes[4], "scored", (2.5,), 7.0),
            Candidate(5, genotypes[5], "infeasible", (), 8.0),
            # Fast enough, but not under the workload of a limit.
            Candidate(6, genotypes[6], "infeasible", (), 5.0),
        ]
    )
    encoding = Encoding(SMALL.rules)
    trials = told_study(encoding, TPE, 0, TARGET_MS, history).trials
    assert [encoding.decode(trial.params) for trial in trials] == [
        genotypes[number] for number in (0, 1, 3, 4, 5, 6)
    ]
    assert [(trial.state, trial.values) for trial in trials] == [
        (TrialState.COMPLETE, [2.0, 5.0]),
        (TrialState.PRUNED, None),
        (TrialState.RUNNING, None),
        (TrialState.COMPLETE, [2.5, 7.0]),
        (TrialState.PRUNED, None),
        (TrialState.PRUNED, None),
    ]
    over_ms = [trial.constraints["latency_ms"] for trial in trials]
    assert over_ms == [-1.0, math.inf, math.inf, 1.0, 2.0, math.inf]


def test_generations_are_those_of_a_study_that_optuna_ran():
    candidates, _ = search(NSGA2, 0, 45)
    encoding = Encoding(SPACE.rules)
    told = told_study(encoding, NSGA2, 0, TARGET_MS, History(candidates))
    scored = [candidate for candidate in candidates if candidate.is_scored]
    assert len(scored) > 32

    sampler = optuna.samplers.NSGAIISampler(population_size=8, seed=0)
    native = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    for candidate in scored:
        native.enqueue_trial(encoding.encode(candidate.genotype))
        trial = native.ask(encoding.distributions)
        # What would be asked for otherwise: only then does the trial get its generation.
        assert trial.relative_params is not None
        trial.set_constraint("latency_ms", candidate.latency_ms - TARGET_MS)
        native.tell(trial, candidate.point(NSGA2.objectives, -1))

    for generation in range(1, 5):
        expected = sampler.get_parent_population(native, generation)
        found = sampler.get_parent_population(told, generation)
        assert len(expected) == 8
        assert {str(trial.params) for trial in found} == {str(trial.params) for trial in expected}


# What it proposes


@pytest.mark.parametrize("config", [NSGA2, TPE], ids=["nsga2", "tpe"])
@pytest.mark.parametrize("space", [SPACE, FACTORS], ids=["widest", "factors"])
def test_proposals_are_new_members_and_soon_the_samplers(space, config):
    candidates, origins = search(config, 1, 30, space, accident)
    assert len({candidate.genotype for candidate in candidates}) == 30
    for candidate in candidates:
        assert space.allows(candidate.genotype)
        assert space.canonical(candidate.genotype) == candidate.genotype
    first = origins.index("sampler")
    num_scored = sum(candidate.is_scored for candidate in candidates[:first])
    # A generation has to be complete before it has children; the first eight are random.
    assert num_scored >= 8 if config is NSGA2 else first >= 8
    assert set(origins[first:]) == {"sampler"}


@pytest.mark.parametrize("config", [NSGA2, TPE], ids=["nsga2", "tpe"])
def test_resumed_anywhere_the_search_goes_on_as_if_uninterrupted(config):
    candidates, _ = search(config, 2, 28, outcome=accident)
    for length in (9, 19, 20, 27):
        proposal = propose(SPACE, config, 2, TARGET_MS, History(candidates[:length]))
        assert proposal.genotype == candidates[length].genotype


def test_proposals_do_not_depend_on_the_process():
    code = (
        "import sys; sys.path.insert(0, 'tests/search'); from test_samplers import *;"
        "print([[c.genotype for c in search(config, 4, 14)[0]] for config in (NSGA2, TPE)])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = [[c.genotype for c in search(config, 4, 14)[0]] for config in (NSGA2, TPE)]
    assert output == f"{expected}\n"


def volume(config, seed):
    candidates, _ = search(config, seed, 40)
    points = [c.point(("loss", "latency_ms"), -1) for c in candidates if c.is_scored]
    return hypervolume(points, (4.2, TARGET_MS))


def test_samplers_learn():
    by_chance = [volume(RANDOM, seed) for seed in range(20)]
    least = statistics.mean(by_chance) + statistics.stdev(by_chance)
    for config in (NSGA2, TPE):
        assert statistics.mean(volume(config, seed) for seed in range(3)) > least


@pytest.mark.parametrize("config", [NSGA2, TPE], ids=["nsga2", "tpe"])
def test_an_exhausted_space_ends_the_proposals(config):
    space = SearchSpace(space_config(max_blocks=2, max_operators=2, **ONE_BLOCK))
    small = replace(config, initial_candidates=2, population_size=2, sample_size=1)
    candidates, origins = search(small, 0, 100, space, accident)
    assert len(candidates) == space.size(100)
    assert "sampler" in origins


def test_config_problems():
    settings = {"initial_candidates": 1, "population_size": 1, "sample_size": 1}
    assert read(EvolutionConfig, {**settings, "algorithm": "tpe"}, "evolution")
    with pytest.raises(ConfigError) as error:
        read(EvolutionConfig, {**settings, "algorithm": "nsga2"}, "evolution")
    assert error.value.problems == ["evolution.population_size: must be >= 2 for nsga2, got 1"]
