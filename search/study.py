"""One search in Optuna storage: claim, score, record, recover.

There is one Optuna trial per (candidate, rung). It is created with all that makes the candidate and
with its owner in one transaction, and only the owner records in it. Optuna lacks two things, which
are here:

- *no duplicates*: two processes may both create a trial of the same candidate and rung; the
  earlier trial stands, the later is dropped before it runs;
- *recovery*: an owner holds a lease, which it renews while it works. The trial of an owner that
  died or let the lease run out is failed, in one step, and its candidate is queued again as a new
  trial. A late writer is refused, because a finished trial cannot change.

Any tool that reads Optuna studies reads it: objectives, which are minimised, parameters that say
what the architecture is made of, and the latency targets as constraints.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from search.claim import CLAIM, PROPOSAL, Claim, StaleTrialError
from search.genotype import Genotype
from search.history import Candidate, History, Objective, Promotion, Proposal, State
from search.owner import Owner
from search.rungs import MAX_RUNGS
from search.space import SearchSpace
from search.storage import Clock, StorageConfig, StudyStorage, clock_of
from slm.config import ConfigError

# A candidate whose owners died so often on one rung is taken to kill them.
MAX_ATTEMPTS = 3
# Of the parameter of that name.
RUNGS = optuna.distributions.IntDistribution(0, MAX_RUNGS - 1)
STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "scored",
    TrialState.PRUNED: "infeasible",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Record:
    """All that the study knows of a candidate.

    rung: the one that it is on. scores: after each rung that it is done with, results: what was
    recorded with them. result: what was recorded last, also of what failed. owner: who works on it.
    attempts: trials on this rung.
    """

    proposal: Proposal
    state: State
    rung: int = 0
    scores: tuple[float, ...] = ()
    results: tuple[Mapping[str, Any], ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    owner: Owner | None = None
    attempts: int = 1
    started_at: str | None = None
    finished_at: str | None = None

    @property
    def candidate(self) -> Candidate:
        """What evolution sees."""
        first = self.results[0] if self.results else {}
        return Candidate(
            self.proposal.number,
            self.proposal.genotype,
            self.state,
            self.scores,
            first.get("latency_ms"),
            first.get("memory_bytes"),
        )


class Study:
    """A study of one search; several processes may share it.

    records: every candidate by number, history: the same as evolution sees it; both as they were
    at the last `refresh`. changes: numbers of the records that were put, in that order. storage:
    of the study. clock: what leases go by, the same for all processes.
    """

    def __init__(
        self,
        study: optuna.Study,
        lease_seconds: float,
        space: SearchSpace,
        storage: StudyStorage,
    ) -> None:
        self.name = study.study_name
        self.owner = Owner.current()
        self.lease_seconds = lease_seconds
        self.clock: Clock = clock_of(storage)
        self.records: list[Record] = []
        self.changes: list[int] = []
        self.history = History()
        self.storage = storage
        self._study = study
        self._space = space
        most = max(space.config.max_operators, *space.config.meta_tokens)
        self._distribution = optuna.distributions.IntDistribution(0, most)
        # Of each candidate the trials that were not dropped, all by number.
        self._trials: dict[int, dict[int, FrozenTrial]] = {}
        # The last trial that has been read, and those that can still change, in order; the others
        # are not looked at again.
        self._last: FrozenTrial | None = None
        self._open: dict[int, FrozenTrial] = {}

    @classmethod
    def open(
        cls,
        config: StorageConfig,
        run_folder: Path,
        name: str,
        identity: Mapping[str, Any],
        space: SearchSpace,
        objectives: Sequence[Objective],
        works: bool = True,
    ) -> Study:
        """Create the study, or go on with it.

        identity: what must be the same for its scores to be comparable. works: False for who only
        looks on, on another device, and so does not know all of the identity. Raises ConfigError,
        saying what differs, if the study was made with another one.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = config.open(run_folder)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize"] * len(objectives),
            load_if_exists=True,
        )
        if len(study.directions) != len(objectives):
            raise ConfigError([f"name: study '{name}' has other objectives; choose another name"])
        if study.metric_names is None:
            with warnings.catch_warnings():
                # Experimental, and for people only.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(objectives))
        result = cls(study, config.lease_seconds, space, storage)
        if works:
            stored = flatten(result.settle("identity", identity))
        else:
            stored = flatten(result.fact("identity") or identity)
        wanted = flatten(identity)
        problems = [
            f"{key}: the search '{name}' was made with {stored.get(key)!r}, now it is "
            f"{wanted.get(key)!r}; choose another name, or the old value"
            for key in (stored | wanted if works else wanted)
            if stored.get(key) != wanted.get(key)
        ]
        if problems:
            raise ConfigError(problems)
        with _no_garbage_collection():
            result.refresh()
        return result

    # Facts of the study as a whole

    def settle(self, key: str, value: Any) -> Any:
        """Store a fact of the study unless it is known; the fact as stored.

        Of several processes that do so at once one is the first, and all get its fact.
        """
        return self.storage.settle_study_user_attr(self._study._study_id, key, value)

    def fact(self, key: str) -> Any:
        """A fact that `settle` stored, or None."""
        return self._study.user_attrs.get(key)

    def facts(self, prefix: str) -> dict[str, Any]:
        """The facts whose keys begin so."""
        stored = self._study.user_attrs
        return {key: value for key, value in stored.items() if key.startswith(prefix)}

    def update(self, key: str, value: Any) -> None:
        """Store a fact of the study, whether it is known or not."""
        self._study.set_user_attr(key, value)

    # Candidates

    def refresh(self) -> None:
        """Read what has happened since the last time."""
        study_id = self._study._study_id
        self._take(self.storage.changed_trials(study_id, self._open.values(), self._last))

    def _take(self, trials: Iterable[FrozenTrial]) -> None:
        """Take over trials, in the order of their numbers, that are new or may have changed."""
        changed: set[int] = set()
        for trial in trials:
            number, is_new = _proposal(trial)["number"], trial.number >= self._num_read
            if is_new:
                self._last = trial
            if trial.state.is_finished():
                self._open.pop(trial.number, None)
            else:
                # Its lease may have been renewed.
                self._open[trial.number] = trial
            others = self._trials.setdefault(number, {})
            if "dropped" in trial.user_attrs:
                others.pop(trial.number, None)
                changed.add(number)
            elif _is_other(trial, others):
                # Of two proposals of one number the earlier stands, even if its owner died since.
                continue
            elif is_new or trial.state.is_finished():
                others[trial.number] = trial
                changed.add(number)
        for number in sorted(changed):
            record = _record(list(self._trials[number].values()))
            self.records[number : number + 1] = [record]
            self.changes.append(number)
            self.history.put(record.candidate)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A block in which to choose what to claim, for one process at a time.

        Many that chose at once would choose the same, and all but one would have to undo it. Who
        chooses out of turn does no harm.
        """
        with self.storage.turn(self._study._study_id) as others_may_have_had_theirs:
            if others_may_have_had_theirs:
                self.refresh()
            yield

    def propose(self, proposal: Proposal) -> Claim | None:
        """Add a candidate and claim it; None if another process added one of that number first."""
        return self._claim(proposal, rung=0)

    def promote(self, promotion: Promotion) -> Claim | None:
        """Claim a candidate for a higher rung; None if another process was faster."""
        return self._claim(self.records[promotion.number].proposal, promotion.rung)

    def take_queued(self) -> Claim | None:
        """Claim a candidate that lost its owner; None if there is none."""
        for number in self.history.waiting():
            record = self.records[number]
            claim = self._claim(record.proposal, record.rung)
            if claim is not None:
                return claim
        return None

    def reap(self) -> int:
        """Fail the trials of dead owners, which queues their candidates; how many.

        What has happened is read before and after.
        """
        self.refresh()
        count = 0
        for trial in list(self._open.values()):
            owner = Owner(**_claim(trial)["owner"])
            silent_seconds = self.clock.silence(_claim(trial)["heartbeat"])
            if silent_seconds > self.lease_seconds or owner.is_dead():
                try:
                    # In one step: a trial that is failed without a word was lost.
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                except UpdateFinishedTrialError:
                    # Another process was faster, or the owner was done after all.
                    continue
                count += 1
        if count:
            self.refresh()
        return count

    def foreign_leases(self) -> dict[int, tuple[str, float]]:
        """Trials whose leases are held on other machines: on which, and its last heartbeat."""
        claims = {number: _claim(trial) for number, trial in self._open.items()}
        return {
            number: (claim["owner"]["host"], claim["heartbeat"])
            for number, claim in claims.items()
            if claim["owner"]["host"] != self.owner.host
            and self.clock.silence(claim["heartbeat"]) <= self.lease_seconds
        }

    @property
    def _num_read(self) -> int:
        """Trials that have been read."""
        return 0 if self._last is None else self._last.number + 1

    @property
    def num_running(self) -> int:
        """Candidates that somebody works on."""
        return len(self._open)

    def _claim(self, proposal: Proposal, rung: int) -> Claim | None:
        """Create a trial and claim it, unless there is an earlier one that was not lost."""
        parameters = self._parameters(proposal.genotype, rung)
        claim = {"rung": rung, "owner": asdict(self.owner), "heartbeat": self.clock.now()}
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            user_attrs={PROPOSAL: _to_json(proposal), CLAIM: claim},
            params=parameters,
            distributions={**dict.fromkeys(parameters, self._distribution), "rung": RUNGS},
        )
        trial = self.storage.add_trial(self._study._study_id, trial)
        if trial.number == self._num_read:
            # It follows what is known: nobody else has created one since.
            self._take([trial])
        else:
            self.refresh()
        result = Claim(self, trial._trial_id, proposal, claim)
        standing = _standing(self._trials[proposal.number].values(), rung)
        if standing is None or standing._trial_id != trial._trial_id:
            with suppress(StaleTrialError):
                # Unless we have been taken for dead, and it was failed already.
                result.drop()
            self.refresh()
            return None
        return result

    def _parameters(self, genotype: Genotype, rung: int) -> dict[str, int]:
        """What scores depend on, in numbers that Optuna's dashboard can plot: most on the rung."""
        counts = Counter(genotype.operators)
        parameters = {
            "rung": rung,
            "blocks": len(genotype.pattern),
            **{text: counts[text] for text in self._space.legend},
        }
        if len(self._space.config.meta_tokens) > 1:
            parameters["meta_tokens"] = genotype.meta_tokens
        return parameters


def _record(trials: Sequence[FrozenTrial]) -> Record:
    """What the trials of one candidate say, those of the highest rung counting."""
    rung = max(map(_rung, trials))
    done = [
        trial
        for trial in (_standing(trials, lower) for lower in range(rung + 1))
        if trial is not None and trial.state == TrialState.COMPLETE
    ]
    here = [trial for trial in trials if _rung(trial) == rung]
    trial = _standing(trials, rung)
    if trial is not None:
        state, error = STATES[trial.state], trial.user_attrs.get("error")
    else:
        trial = max(here, key=lambda each: each.number)
        state, error = "waiting", None
        deaths = sum("released" not in each.user_attrs for each in here)
        if deaths >= MAX_ATTEMPTS:
            state, error = "failed", f"its owner died, {deaths} times"
    results = [
        {**json.loads(each.user_attrs["result"]), "finished_at": _utc(each.datetime_complete)}
        for each in done
    ]
    last = trial.user_attrs.get("result")
    return Record(
        proposal=_from_json(_proposal(trial)),
        state=state,
        rung=rung,
        scores=tuple(trial.values[0] for trial in done),
        results=tuple(results),
        result=json.loads(last) if last else results[-1] if results else {},
        error=error,
        owner=Owner(**_claim(trial)["owner"]) if state == "running" else None,
        attempts=len(here),
        started_at=_utc(trials[0].datetime_start),
        finished_at=_utc(trial.datetime_complete) if state != "waiting" else None,
    )


def _is_other(trial: FrozenTrial, trials: Mapping[int, FrozenTrial]) -> bool:
    """Whether it is of another architecture than the earliest trial of the candidate."""
    first = trials[min(trials)] if trials else trial
    return bool(_proposal(first)["genotype"] != _proposal(trial)["genotype"])


def _standing(trials: Iterable[FrozenTrial], rung: int) -> FrozenTrial | None:
    """The earliest trial on a rung that was not lost: its owner owns the candidate."""
    found = (trial for trial in trials if _rung(trial) == rung and not _is_lost(trial))
    return min(found, key=lambda trial: trial.number, default=None)


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether it was failed with nothing said about the candidate."""
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def _rung(trial: FrozenTrial) -> int:
    rung: int = _claim(trial)["rung"]
    return rung


def _claim(trial: FrozenTrial) -> dict[str, Any]:
    claim: dict[str, Any] = trial.user_attrs[CLAIM]
    return claim


def _proposal(trial: FrozenTrial) -> dict[str, Any]:
    proposal: dict[str, Any] = trial.user_attrs[PROPOSAL]
    return proposal


def _to_json(proposal: Proposal) -> dict[str, Any]:
    return {**vars(proposal), "genotype": proposal.genotype.to_json()}


def _from_json(value: Mapping[str, Any]) -> Proposal:
    return Proposal(**{**value, "genotype": Genotype.from_json(value["genotype"])})


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Where much is read at once and kept: to look for garbage in it takes longer than to read."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def _utc(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat(timespec="seconds") if moment else None


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}; tuples become lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}{key}.")
        else:
            flat[path + key] = list(value) if isinstance(value, tuple | list) else value
    return flat
