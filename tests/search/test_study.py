import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import optuna
import pytest
from small_space import space_config

from search.evolution import EvolutionConfig, Proposal, propose
from search.space import SearchSpace
from search.study import MAX_ATTEMPTS, Owner, StaleTrialError, StorageConfig, Study
from slm.config import ConfigError, read

SPACE = SearchSpace(space_config())
IDENTITY = {"seed": 0, "space": {"widths": [16, 32]}}
STORAGES = ["sqlite", "journal"]
EVOLUTION = EvolutionConfig(initial_candidates=4, population_size=4, sample_size=2)

# Claims the next candidates and scores them; without a count it dies within the first.
CLAIMER = """
import sys, time
sys.path.insert(0, "tests/search")
from test_study import claim_next, open_study
from pathlib import Path
study = open_study(sys.argv[2], Path(sys.argv[1]))
if len(sys.argv) == 3:
    claim = claim_next(study)
    print(claim.proposal.number, flush=True)
    time.sleep(60)
for _ in range(int(sys.argv[3])):
    claim = None
    while claim is None:
        claim = claim_next(study)
    claim.complete(loss=1.0 + claim.proposal.number / 100, latency_ms=2.0)
    print(claim.proposal.number, flush=True)
"""


def open_study(kind: str, folder: Path, identity=IDENTITY) -> Study:
    return Study.open(StorageConfig(kind=kind), folder, "test", identity)


def claim_next(study: Study):
    history = [record.candidate for record in study.records()]
    return study.propose(propose(SPACE, EVOLUTION, 0, 10.0, history))


def start_claimer(folder: Path, kind: str, *count: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CLAIMER, str(folder), kind, *count],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kind", STORAGES)
def test_scores_and_notes_come_back_in_another_process_and_in_plain_optuna(kind, tmp_path):
    study = open_study(kind, tmp_path)
    first, second, third, fourth = (claim_next(study) for _ in range(4))
    first.note(architecture="width=16 …", measurement={"latency_ms": 3.5, "low_ms": 3.0})
    first.complete(loss=1.25, latency_ms=3.5)
    second.fail("the loss is not finite")
    third.reject("too slow")
    again = open_study(kind, tmp_path).records()
    assert [record.state for record in again] == ["scored", "failed", "infeasible", "running"]
    assert (again[0].loss, again[0].latency_ms) == (1.25, 3.5)
    assert again[0].attributes["measurement"] == {"latency_ms": 3.5, "low_ms": 3.0}
    assert again[1].error == "the loss is not finite"
    assert [record.proposal for record in again] == [
        claim.proposal for claim in (first, second, third, fourth)
    ]

    plain = optuna.load_study(study_name="test", storage=StorageConfig(kind=kind).open(tmp_path))
    assert plain.metric_names == ["loss", "latency_ms"]
    assert [trial.values for trial in plain.best_trials] == [[1.25, 3.5]]
    assert [trial.state.name for trial in plain.trials] == ["COMPLETE", "FAIL", "PRUNED", "RUNNING"]


@pytest.mark.parametrize("kind", STORAGES)
def test_a_killed_owner_loses_its_trial_and_the_candidate_is_queued_again(kind, tmp_path):
    claimer = start_claimer(tmp_path, kind)
    assert claimer.stdout.readline() == "0\n"
    study = open_study(kind, tmp_path)
    assert study.reap() == 0
    assert study.take_queued() is None
    assert study.records()[0].state == "running"

    os.kill(claimer.pid, signal.SIGKILL)
    claimer.wait()
    proposal = study.records()[0].proposal
    assert study.reap() == 1
    assert study.records()[0].state == "waiting"
    claim = study.take_queued()
    assert claim.proposal == proposal
    assert study.take_queued() is None
    claim.complete(loss=1.0, latency_ms=1.0)
    (record,) = study.records()
    assert (record.state, record.attempts) == ("scored", 2)


def test_a_stopped_process_that_wakes_up_late_is_refused(tmp_path):
    study = open_study("sqlite", tmp_path)
    late = claim_next(study)
    # What another machine does that has not heard of this one for long.
    other = open_study("sqlite", tmp_path)
    for trial in other._trials():
        stranger = {**asdict(other.owner), "host": "elsewhere"}
        other._storage.set_trial_user_attr(trial._trial_id, "owner", stranger)
        other._storage.set_trial_user_attr(trial._trial_id, "heartbeat", time.time() - 299)
    assert other.reap() == 0
    late._storage.set_trial_user_attr(late._trial_id, "heartbeat", time.time() - 301)
    assert other.reap() == 1
    other.take_queued().complete(loss=1.0, latency_ms=1.0)

    with pytest.raises(StaleTrialError, match="candidate 0 was given to another process"):
        late.note(architecture="late")
    with pytest.raises(StaleTrialError):
        late.complete(loss=9.0, latency_ms=9.0)
    (record,) = study.records()
    assert (record.loss, record.latency_ms) == (1.0, 1.0)


def test_a_claim_left_without_a_result_is_queued_again(tmp_path):
    study = open_study("sqlite", tmp_path)
    with pytest.raises(KeyboardInterrupt), claim_next(study):
        raise KeyboardInterrupt
    assert study.records()[0].state == "waiting"
    # However often that happens: it is not the candidate's fault.
    for _ in range(MAX_ATTEMPTS):
        with study.take_queued():
            pass
    assert study.records()[0].state == "waiting"


def test_a_candidate_that_kills_its_owners_is_given_up(tmp_path):
    study = open_study("sqlite", tmp_path)
    claim_next(study)
    dead = asdict(Owner.current()) | {"started": 1.0}
    for attempt in range(MAX_ATTEMPTS):
        if attempt:
            study.take_queued()
        running = [trial for trial in study._trials() if not trial.state.is_finished()]
        study._storage.set_trial_user_attr(running[0]._trial_id, "owner", dead)
        assert study.reap() == 1
    (record,) = study.records()
    assert record.state == "failed"
    assert "died" in record.error
    assert study.take_queued() is None


@pytest.mark.parametrize("kind", STORAGES)
def test_two_processes_share_a_study_without_duplicates(kind, tmp_path):
    open_study(kind, tmp_path)
    claimers = [start_claimer(tmp_path, kind, "6") for _ in range(2)]
    outputs = [claimer.communicate(timeout=100)[0].split() for claimer in claimers]
    assert sorted(int(number) for output in outputs for number in output) == list(range(12))
    records = open_study(kind, tmp_path).records()
    assert [record.proposal.number for record in records] == list(range(12))
    assert {record.state for record in records} == {"scored"}
    assert len({record.proposal.genotype for record in records}) == 12


def test_the_later_of_two_trials_of_one_number_is_dropped(tmp_path):
    first, second = open_study("sqlite", tmp_path), open_study("sqlite", tmp_path)
    rng = random.Random(0)
    proposals = [Proposal(0, SPACE.sample(rng), "random") for _ in range(2)]
    assert first.propose(proposals[0]) is not None
    assert second.propose(proposals[1]) is None
    (record,) = second.records()
    assert record.proposal == proposals[0]
    assert record.attempts == 1


def test_another_search_under_the_same_name_is_refused_and_told_what_differs(tmp_path):
    open_study("sqlite", tmp_path)
    open_study("sqlite", tmp_path, {"seed": 0, "space": {"widths": (16, 32)}})
    with pytest.raises(ConfigError) as error:
        open_study("sqlite", tmp_path, {"seed": 0, "space": {"widths": [16, 64]}})
    assert error.value.problems == [
        "space.widths: the search 'test' was made with [16, 32], now it is [16, 64]; "
        "choose another name, or the old value"
    ]


def test_facts_are_settled_once(tmp_path):
    assert open_study("sqlite", tmp_path).settle("target_ms", 3.0) == 3.0
    study = open_study("sqlite", tmp_path)
    assert study.settle("target_ms", 4.0) == 3.0
    assert study.fact("target_ms") == 3.0
    assert study.fact("nothing") is None


def test_storage_config_problems():
    for values, problem in (
        ({"kind": "postgresql"}, "storage.url: postgresql storage needs url, got None"),
        ({"kind": "sqlite", "url": "x"}, "storage.url: sqlite storage takes no url, got 'x'"),
    ):
        with pytest.raises(ConfigError) as error:
            read(StorageConfig, values, "storage")
        assert error.value.problems == [problem]
