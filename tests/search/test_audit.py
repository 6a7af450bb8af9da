import random

import numpy as np
import pytest
from omegaconf import open_dict
from scipy import stats
from small_space import space_config

from search.audit import AuditConfig, audit_lines, audit_summary, audited, missing, trainings
from search.config import SearchConfig, read_config
from search.history import Promotion, Proposal
from search.space import SearchSpace
from search.storage import StorageConfig
from search.study import Study
from slm.config import ConfigError, compose, read

SPACE = SearchSpace(space_config())
BUDGETS = (100_000, 400_000, 1_600_000)


def config(*overrides: str) -> SearchConfig:
    fixed = (f"proxy.rung_tokens={list(BUDGETS)}", "audit.candidates=6", "audit.repeated=2")
    composed = compose("search", [*fixed, "audit.seeds=2", *overrides])[0]
    with open_dict(composed):
        del composed["hydra"]
    return read_config(composed)


@pytest.fixture
def study(tmp_path) -> Study:
    """Ten candidates: a seed, one that failed, and eight that were drawn at random, two climbed."""
    study = Study.open(
        StorageConfig(kind="journal"), tmp_path, "test", {}, SPACE, ("loss", "latency_ms")
    )
    rng = random.Random(0)
    for number in range(10):
        proposal = Proposal(number, SPACE.sample(rng), "random" if number else "seed")
        claim = study.propose(proposal)
        if number == 3:
            claim.fail("out of memory", {})
        else:
            score(claim, 5.0 + number / 10)
    for number, rung in ((1, 1), (1, 2), (2, 1)):
        study.refresh()
        score(study.promote(Promotion(number, rung)), 5.0 + number / 10 - rung)
    study.refresh()
    return study


def score(claim, loss: float) -> None:
    result = {"loss": loss, "latency_ms": 2.0, "architecture": "", "checkpoint": ""}
    claim.complete((loss, 2.0), result, excess_ms=[-1.0])


def test_the_first_that_were_drawn_at_random_and_trained_are_audited(study):
    assert [record.proposal.number for record in audited(config(), study.records)] == [
        *(1, 2, 4, 5, 6, 7)
    ]
    plan = [(training.number, training.seed) for training in trainings(config(), study.records)]
    further = [(number, seed) for seed in (1, 2) for number in (1, 2)]
    assert plan == [(number, 0) for number in (1, 2, 4, 5, 6, 7)] + further
    assert trainings(config("audit.candidates=0"), study.records) == []
    other = trainings(config("seed=7"), study.records)
    assert {training.seed for training in other} == {7, 8, 9}


def test_what_is_stored_is_not_missing_and_makes_the_summary(study):
    settings, rng = config(), np.random.default_rng(0)
    # As the search left them: on the last rung, on the second, on the first.
    known = {1: [3.1], 2: [3.4]} | {number: rng.normal(4, 1, 2).tolist() for number in (4, 5, 6, 7)}
    repeated = {}
    for number, scores in known.items():
        assert f"audit-{number}-0" in {each.key for each in missing(settings, study)}
        fact = {"scores": scores, "loss": scores[-1], "cloze_error": rng.uniform()}
        study.settle(f"audit-{number}-0", fact)
        repeated[number] = [fact]
    for number in (1, 2):
        for seed in (1, 2):
            loss = rng.normal(3.2, 0.1)
            fact = {"scores": [loss], "loss": loss, "cloze_error": rng.uniform()}
            study.settle(f"audit-{number}-{seed}", fact)
            repeated[number].append(fact)
    assert missing(settings, study) == []
    summary = audit_summary(settings, study)

    first = [5.1, 5.2, 5.4, 5.5, 5.6, 5.7]
    second = [4.1, 4.2, *(known[number][0] for number in (4, 5, 6, 7))]
    last = [scores[-1] for scores in known.values()]
    for found, short, tokens in zip(
        summary["rank_correlations"], (first, second), BUDGETS[:2], strict=True
    ):
        assert found["rho"] == pytest.approx(stats.spearmanr(short, last).statistic)
        assert found["short_tokens"] == tokens
        assert (found["numbers"], found["n"]) == (list(known), 6)
        assert found["short"] == pytest.approx(short)
        assert found["low"] <= found["rho"] <= found["high"]
    assert set(summary["noise"]) == {"loss", "cloze_error"}
    for quality, noise in summary["noise"].items():
        scores = [[fact[quality] for fact in repeated[number]] for number in (1, 2)]
        # The error of a difference of two means of three, as Student's test pools it.
        test = stats.ttest_ind(*scores)
        error = np.subtract(*map(np.mean, scores)) / test.statistic
        assert noise["deviation"] == pytest.approx(error / np.sqrt(2 / 3))
        margin = np.sqrt(2) * stats.t.ppf(0.975, test.df) * noise["deviation"]
        assert noise["least_difference"] == pytest.approx(margin)
        assert (noise["models"], noise["seeds"]) == (2, 3)
    lines = audit_lines(summary)
    loss = summary["noise"]["loss"]
    assert lines[0] == (
        f"seed noise of the loss {loss['deviation']:.4f} nats (2 models x 3 seeds): "
        f"differences below {loss['least_difference']:.4f} are none"
    )
    assert lines[-1].startswith("rank correlation of 400,000 against 1,600,000 tokens ")
    assert lines[-1].endswith(", 6 models drawn at random")


def test_what_failed_is_done_and_counts_for_nothing(study):
    settings = config("audit.repeated=0")
    for training in trainings(settings, study.records):
        study.settle(training.key, {"error": "took longer than its time limit"})
    assert missing(settings, study) == []
    summary = audit_summary(settings, study)
    assert (summary["noise"], summary["rank_correlations"]) == ({}, [])


def test_config_problems():
    for values, problem in (
        ({"candidates": 3}, "audit.candidates: a rank correlation needs >= 4, got 3"),
        (
            {"candidates": 4, "repeated": 5},
            "audit.repeated: must be <= candidates 4, got 5",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            read(AuditConfig, values, "audit")
        assert error.value.problems == [problem]
    # To know the noise alone takes fewer.
    assert read(AuditConfig, {"candidates": 3, "repeated": 3, "seeds": 1}, "audit").seeds == 1
    with pytest.raises(ConfigError, match="cloze_error and continuation_error need accuracy_items"):
        config("accuracy_items=0")
    with pytest.raises(ConfigError, match="must be > 0 for the objective cloze_error, got 0"):
        config("accuracy_items=0", "evolution.objectives=[cloze_error,latency_ms]")
