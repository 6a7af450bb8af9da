import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from small_space import space_config

from search.evolution import EvolutionConfig, propose
from search.history import Promotion, Proposal
from search.machines import refuse_second_machine
from search.owner import Owner
from search.rungs import promote
from search.space import SearchSpace
from search.storage import StorageConfig
from search.study import MAX_ATTEMPTS, StaleTrialError, Study
from slm.config import ConfigError, read

SPACE = SearchSpace(space_config())
IDENTITY = {"seed": 0, "space": {"widths": [16, 32]}}
# Of PostgreSQL, what the environment completes.
URLS = {"sqlite": None, "journal": None, "postgresql": "postgresql+psycopg://"}
EVOLUTION = EvolutionConfig(initial_candidates=4, population_size=4, sample_size=2)

# Claims the next candidates and scores them; without a count it stops within the first.
CLAIMER = """
import sys, time
sys.path.insert(0, "tests/search")
from test_study import claim_next, open_study, score
from pathlib import Path
study = open_study(sys.argv[2], Path(sys.argv[1]))
if len(sys.argv) == 3:
    claim = claim_next(study)
    print(claim.proposal.number, flush=True)
    sys.stdin.readline()
    score(claim, 9.0)
for _ in range(int(sys.argv[3]) if len(sys.argv) > 3 else 0):
    claim = None
    while claim is None:
        claim = claim_next(study)
    score(claim, 1.0 + claim.proposal.number / 100)
    print(claim.proposal.number, flush=True)
"""


@pytest.fixture(params=URLS)
def kind(request) -> str:
    if request.param == "postgresql":
        request.getfixturevalue("postgresql")
    return request.param


def open_study(kind: str, folder: Path, identity=IDENTITY, **storage) -> Study:
    config = StorageConfig(kind=kind, url=URLS[kind], **storage)
    return Study.open(config, folder, "test", identity, SPACE, ("loss", "latency_ms"))


def claim_next(study: Study):
    study.refresh()
    return study.propose(propose(SPACE, EVOLUTION, 0, 10.0, study.history))


def score(claim, loss, latency_ms=2.0):
    result = {"loss": loss, "latency_ms": latency_ms, "memory_bytes": 100, "tokens": 10}
    claim.complete((loss, latency_ms), result, excess_ms=[latency_ms - 10.0])


def records(study: Study):
    study.refresh()
    return study.records


def start_claimer(folder: Path, kind: str, *count: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CLAIMER, str(folder), kind, *count],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_scores_come_back_in_another_process_and_in_plain_optuna(kind, tmp_path):
    study = open_study(kind, tmp_path)
    first, second, third, fourth = (claim_next(study) for _ in range(4))
    score(first, 1.25, latency_ms=3.5)
    second.fail("the loss is not finite", {"latency_ms": 12.0})
    third.reject("too slow", {"latency_ms": 11.0})
    again = open_study(kind, tmp_path).records
    assert again == records(study)
    assert [record.state for record in again] == ["scored", "failed", "infeasible", "running"]
    assert again[0].scores == (1.25,)
    assert (again[0].candidate.latency_ms, again[0].candidate.memory_bytes) == (3.5, 100)
    assert again[0].results[0]["tokens"] == 10
    assert again[0].results[0]["finished_at"] is not None
    assert (again[1].error, again[1].result) == ("the loss is not finite", {"latency_ms": 12.0})
    assert (again[2].error, again[2].result) == ("too slow", {"latency_ms": 11.0})
    assert again[3].owner == Owner.current()
    assert [record.proposal for record in again] == [
        claim.proposal for claim in (first, second, third, fourth)
    ]

    if kind == "journal":
        storage = StorageConfig(kind=kind).open(tmp_path)
    else:
        storage = URLS[kind] or f"sqlite:///{tmp_path / 'study.db'}"
    plain = optuna.load_study(study_name="test", storage=storage)
    assert plain.metric_names == ["loss", "latency_ms"]
    assert [trial.values for trial in plain.best_trials] == [[1.25, 3.5]]
    assert [trial.state.name for trial in plain.trials] == ["COMPLETE", "FAIL", "PRUNED", "RUNNING"]
    genotype = first.proposal.genotype
    assert plain.trials[0].params["blocks"] == len(genotype.pattern)
    named = {text: plain.trials[0].params[text] for text in SPACE.legend}
    assert named == {text: genotype.operators.count(text) for text in SPACE.legend}
    assert plain.trials[0].params["rung"] == 0
    assert list(plain.trials[0].constraints.values()) == [-6.5]
    # The only place where optuna-dashboard 0.21 looks for them.
    assert plain.trials[0].system_attrs["constraints"] == [-6.5]


def test_what_was_claimed_is_known_without_reading_it_back(kind, tmp_path):
    study = open_study(kind, tmp_path)
    score(claim_next(study), 3.0)
    study.refresh()
    study.promote(Promotion(0, 1))
    claimed = study.propose(propose(SPACE, EVOLUTION, 0, 10.0, study.history)).proposal
    assert [(record.state, record.rung) for record in study.records] == [
        ("running", 1),
        ("running", 0),
    ]
    assert study.records[1].proposal == claimed
    assert study.records == open_study(kind, tmp_path).records
    assert study.num_running == 2


def test_of_several_that_settle_a_fact_at_once_all_get_that_of_the_first(kind, tmp_path):
    studies = [open_study(kind, tmp_path) for _ in range(4)]
    facts: list[list[int]] = [[] for _ in studies]
    together = threading.Barrier(len(studies))

    def settle(index: int) -> None:
        for number in range(12):
            together.wait()
            facts[index].append(studies[index].settle(f"fact-{number}", index))

    threads = [threading.Thread(target=settle, args=(index,)) for index in range(len(studies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = facts[0]
    assert facts == [first] * len(studies)
    assert len(first) == 12
    assert open_study(kind, tmp_path).facts("fact-") == {
        f"fact-{number}": value for number, value in enumerate(first)
    }
    # Whoever comes later changes nothing.
    assert studies[0].settle("fact-0", 9) == first[0]


def test_times_are_those_of_the_clock_in_any_time_zone(kind, tmp_path, monkeypatch):
    try:
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        begin = datetime.now(UTC).replace(microsecond=0)
        study = open_study(kind, tmp_path)
        score(claim_next(study), 1.0)
        (record,) = records(study)
        times = [record.started_at, record.finished_at]
        assert all(begin <= datetime.fromisoformat(each) <= datetime.now(UTC) for each in times)
        (trial,) = optuna.load_study(
            study_name="test", storage=study.storage, sampler=optuna.samplers.RandomSampler()
        ).trials
        assert abs(trial.datetime_complete - datetime.now()).total_seconds() < 60
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_a_candidate_costs_storage_does_not_grow(tmp_path):
    study, statements = open_study("sqlite", tmp_path), []
    parameters = []

    def count(connection, cursor, statement, *others) -> None:
        statements[-1] += 1
        parameters[-1] += "trial_params" in statement

    sqlalchemy.event.listen(study.storage.engine, "before_cursor_execute", count)
    for loss in range(12):
        statements.append(0)
        parameters.append(0)
        assert study.reap() == 0
        score(claim_next(study), float(loss))
    first, *others = statements[1:]
    assert set(others) == {first}
    # Each is written, the rung and the number of blocks too, and all are read once.
    assert set(parameters[1:]) == {len(SPACE.legend) + 2 + 1}


def test_a_candidate_goes_on_from_rung_to_rung(kind, tmp_path):
    study, other = open_study(kind, tmp_path), open_study(kind, tmp_path)
    score(claim_next(study), 3.0)
    records(other)
    claim = study.promote(Promotion(0, 1))
    assert (claim.rung, claim.proposal) == (1, study.records[0].proposal)
    # The other has not heard of it, and is too late.
    assert other.promote(Promotion(0, 1)) is None
    (record,) = records(study)
    assert (record.state, record.rung, record.scores) == ("running", 1, (3.0,))
    score(claim, 2.0)
    (record,) = records(other)
    assert (record.state, record.rung, record.scores) == ("scored", 1, (3.0, 2.0))
    assert record.candidate.scores == (3.0, 2.0)
    study.promote(Promotion(0, 2)).fail("the loss is not finite", {})
    (record,) = records(other)
    assert (record.state, record.scores) == ("failed", (3.0, 2.0))
    assert other.take_queued() is None


def test_a_killed_owner_loses_its_trial_and_the_candidate_is_queued_again(kind, tmp_path):
    claimer = start_claimer(tmp_path, kind)
    assert claimer.stdout.readline() == "0\n"
    study = open_study(kind, tmp_path)
    assert study.reap() == 0
    assert study.take_queued() is None
    assert (study.records[0].state, study.num_running) == ("running", 1)

    os.kill(claimer.pid, signal.SIGKILL)
    claimer.communicate()
    proposal = study.records[0].proposal
    assert study.reap() == 1
    assert (study.records[0].state, study.num_running) == ("waiting", 0)
    claim = study.take_queued()
    assert claim.proposal == proposal
    assert study.take_queued() is None
    score(claim, 1.0)
    (record,) = records(study)
    assert (record.state, record.attempts) == ("scored", 2)


def test_a_stopped_process_that_wakes_up_late_is_refused(kind, tmp_path):
    claimer = start_claimer(tmp_path, kind)
    assert claimer.stdout.readline() == "0\n"
    os.kill(claimer.pid, signal.SIGSTOP)
    study = open_study(kind, tmp_path, lease_seconds=1.0)
    while study.reap() == 0:
        time.sleep(0.1)
    score(study.take_queued(), 1.0)

    os.kill(claimer.pid, signal.SIGCONT)
    _, errors = claimer.communicate("go on\n")
    assert "StaleTrialError: candidate 0 was given to another process" in errors
    (record,) = records(study)
    assert (record.state, record.scores) == ("scored", (1.0,))


def test_a_lease_is_renewed_by_beats(tmp_path):
    study = open_study("sqlite", tmp_path, lease_seconds=1.0)
    claim = claim_next(study)
    for _ in range(15):
        time.sleep(0.1)
        claim.beat()
        assert study.reap() == 0
    time.sleep(1.1)
    assert study.reap() == 1
    with pytest.raises(StaleTrialError):
        claim.beat()


def test_an_owner_elsewhere_is_dead_only_when_its_lease_is_over(tmp_path):
    study = open_study("sqlite", tmp_path)
    claim_next(study)
    (trial,) = study._study.trials
    stranger = asdict(study.owner) | {"host": "elsewhere", "started": 1.0}
    claim = trial.user_attrs["claim"] | {"owner": stranger}
    study.storage.set_trial_user_attr(trial._trial_id, "claim", claim)
    assert study.reap() == 0
    claim["heartbeat"] = time.time() - 121
    study.storage.set_trial_user_attr(trial._trial_id, "claim", claim)
    assert study.reap() == 1


def test_a_claim_left_without_a_result_is_queued_again(tmp_path):
    study = open_study("sqlite", tmp_path)
    with pytest.raises(KeyboardInterrupt), claim_next(study):
        raise KeyboardInterrupt
    assert records(study)[0].state == "waiting"
    # However often that happens: it is not the candidate's fault.
    for _ in range(MAX_ATTEMPTS):
        with study.take_queued():
            pass
        study.refresh()
    assert study.records[0].state == "waiting"


def test_a_candidate_that_kills_its_owners_is_given_up(tmp_path):
    study = open_study("sqlite", tmp_path)
    claim_next(study)
    dead = asdict(Owner.current()) | {"started": 1.0}
    for attempt in range(MAX_ATTEMPTS):
        if attempt:
            study.take_queued()
        (trial,) = [trial for trial in study._study.trials if not trial.state.is_finished()]
        claim = trial.user_attrs["claim"] | {"owner": dead}
        study.storage.set_trial_user_attr(trial._trial_id, "claim", claim)
        assert study.reap() == 1
    (record,) = study.records
    assert record.state == "failed"
    assert f"its owner died, {MAX_ATTEMPTS} times" in record.error
    assert study.take_queued() is None


def test_two_processes_share_a_study_without_duplicates(kind, tmp_path):
    open_study(kind, tmp_path)
    claimers = [start_claimer(tmp_path, kind, "6") for _ in range(2)]
    outputs = [claimer.communicate(timeout=100)[0].split() for claimer in claimers]
    assert sorted(int(number) for output in outputs for number in output) == list(range(12))
    found = open_study(kind, tmp_path).records
    assert [record.proposal.number for record in found] == list(range(12))
    assert {record.state for record in found} == {"scored"}
    assert len({record.proposal.genotype for record in found}) == 12


def test_the_later_of_two_trials_of_one_number_is_dropped(tmp_path):
    first, second = open_study("sqlite", tmp_path), open_study("sqlite", tmp_path)
    rng = random.Random(0)
    proposals = [Proposal(0, SPACE.sample(rng), "random") for _ in range(2)]
    assert first.propose(proposals[0]) is not None
    assert second.propose(proposals[1]) is None
    (record,) = records(second)
    assert record.proposal == proposals[0]
    assert record.attempts == 1


def test_what_is_to_be_dropped_may_have_been_taken_away(tmp_path, monkeypatch):
    first, second = open_study("sqlite", tmp_path), open_study("sqlite", tmp_path)
    rng = random.Random(0)
    proposals = [Proposal(0, SPACE.sample(rng), "random") for _ in range(2)]
    assert first.propose(proposals[0]) is not None

    def freeze_past_the_lease():
        monkeypatch.undo()
        second.storage.set_trial_state_values(2, optuna.trial.TrialState.FAIL)
        second.refresh()

    monkeypatch.setattr(second, "refresh", freeze_past_the_lease)
    assert second.propose(proposals[1]) is None
    (record,) = records(second)
    assert (record.state, record.proposal) == ("running", proposals[0])


def test_an_interrupted_claim_that_was_taken_away_stays_interrupted(tmp_path):
    study = open_study("sqlite", tmp_path)
    claim = claim_next(study)
    study.storage.set_trial_state_values(claim._trial_id, optuna.trial.TrialState.FAIL)
    with pytest.raises(KeyboardInterrupt), claim:
        raise KeyboardInterrupt


def test_of_two_proposals_of_one_number_the_earlier_stands_though_its_owner_died(tmp_path):
    first, second = open_study("sqlite", tmp_path), open_study("sqlite", tmp_path)
    rng = random.Random(0)
    proposals = [Proposal(0, SPACE.sample(rng), "random") for _ in range(2)]
    claim = first.propose(proposals[0])
    # Dead before the other has looked at whether there is an earlier one.
    claim._storage.set_trial_state_values(claim._trial_id, optuna.trial.TrialState.FAIL)
    assert second.propose(proposals[1]) is None
    (record,) = records(first)
    assert (record.state, record.proposal) == ("waiting", proposals[0])
    assert second.take_queued().proposal == proposals[0]


def test_the_objective_of_quality_decides_who_is_promoted(tmp_path):
    """Of two candidates one has the lower loss, the other the lower error."""
    promoted = {}
    for quality in ("loss", "cloze_error"):
        objectives = (quality, "latency_ms")
        folder = tmp_path / quality
        folder.mkdir()
        config = StorageConfig(kind="journal")
        study = Study.open(config, folder, "test", IDENTITY, SPACE, objectives)
        for loss, cloze_error in ((3.0, 0.6), (2.0, 0.7)):
            result = {"loss": loss, "cloze_error": cloze_error, "latency_ms": 2.0}
            values = [result[name] for name in objectives]
            claim_next(study).complete(values, result, excess_ms=[-8.0])
        study.refresh()
        promoted[quality] = promote(study.history, 2, 0.5, objectives).number
    assert promoted == {"loss": 1, "cloze_error": 0}


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
        ({"kind": "journal", "lease_seconds": 0.5}, "storage.lease_seconds: must be >= 1, got 0.5"),
    ):
        with pytest.raises(ConfigError) as error:
            read(StorageConfig, values, "storage")
        assert error.value.problems == [problem]


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_second_machine_is_refused_a_study_in_a_file_while_the_first_is_at_work(kind, tmp_path):
    first, second = (open_study(kind, tmp_path, lease_seconds=2.0) for _ in range(2))
    first.owner = replace(first.owner, host="elsewhere")
    storage = StorageConfig(kind=kind)
    claim, stop = claim_next(first), threading.Event()

    def keep() -> None:
        while not stop.wait(0.1):
            claim.beat()

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        second.refresh()
        with pytest.raises(
            ConfigError, match=rf"{kind} is for .* and elsewhere is at work"
        ) as error:
            refuse_second_machine(second, storage)
        assert str(error.value).startswith(f"storage.kind: {kind} is for the processes of one")
        assert "storage=postgresql" in str(error.value)
    finally:
        stop.set()
        keeper.join()
    # It has died: once its lease is over, the study can be gone on with here.
    second.refresh()
    refuse_second_machine(second, storage)
    assert second.reap() == 1
    assert second.take_queued().proposal == claim.proposal
