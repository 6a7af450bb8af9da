"""One search in Optuna storage: claim, score, record, recover.

There is one Optuna trial per (candidate, rung). It is created WAITING with all that makes the
candidate, and its owner, in one transaction; only the owner claims it (RUNNING) and records it
(COMPLETE with loss and latency). Optuna lacks two things, which are here:

- *no duplicates*: two processes may both create a trial of the same number; the earlier trial
  stands, the later is dropped before it runs;
- *recovery*: a trial whose owner died is failed, its candidate is queued again as a new trial, and
  a late writer is refused, because a finished trial cannot change.

Any tool that reads Optuna studies reads it: two objectives, loss and latency_ms, both minimised.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from search.evolution import Candidate, Proposal, State
from search.genotype import Genotype
from slm.config import ConfigError, schema

OBJECTIVES = ("loss", "latency_ms")
# A candidate whose owners died so often is taken to kill them.
MAX_ATTEMPTS = 3
HEARTBEAT_SECONDS = 30.0


@schema
class StorageConfig:
    """Where the study lives.

    kind: sqlite and journal are files of the run's folder: the former for one process, the latter
        also for many on one machine. postgresql serves many machines, and needs its url.
    stale_seconds: an owner on another machine that has been silent for so long is dead.
    """

    kind: Literal["sqlite", "journal", "postgresql"]
    url: str | None = None
    stale_seconds: float = 300.0

    def __post_init__(self) -> None:
        problems = []
        if (self.url is not None) != (self.kind == "postgresql"):
            needs = "needs" if self.url is None else "takes no"
            problems.append(f"url: {self.kind} storage {needs} url, got {self.url!r}")
        if self.stale_seconds < 2 * HEARTBEAT_SECONDS:
            problems.append(
                f"stale_seconds: must be >= {2 * HEARTBEAT_SECONDS:g}, got {self.stale_seconds:g}"
            )
        if problems:
            raise ConfigError(problems)

    def open(self, run_folder: Path) -> optuna.storages.BaseStorage:
        """Connect."""
        if self.kind == "journal":
            from optuna.storages.journal import JournalFileBackend

            backend = JournalFileBackend(str(run_folder / "journal.log"))
            return optuna.storages.JournalStorage(backend)
        if self.kind == "sqlite":
            return optuna.storages.RDBStorage(
                f"sqlite:///{run_folder / 'study.db'}",
                engine_kwargs={"connect_args": {"timeout": 60}},
            )
        assert self.url is not None
        return optuna.storages.RDBStorage(self.url)


@dataclass(frozen=True)
class Owner:
    """A process, told apart from later ones of the same number by its start time."""

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_dead(self, heartbeat: float, stale_seconds: float) -> bool:
        """Whether it is gone; on another machine, whether it has been silent for too long."""
        if self.host != socket.gethostname():
            return time.time() - heartbeat > stale_seconds
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.started) > 1
                or process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True


class StaleTrialError(RuntimeError):
    """The trial was taken away from its owner, who has been taken for dead."""


@dataclass(frozen=True)
class Record:
    """All that the study knows of a candidate.

    attributes: what was noted with `Claim.note`. attempts: trials spent on it.
    """

    proposal: Proposal
    state: State
    rung: int = 0
    loss: float | None = None
    latency_ms: float | None = None
    error: str | None = None
    attempts: int = 1
    started_at: str | None = None
    finished_at: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def candidate(self) -> Candidate:
        """What evolution sees."""
        return Candidate(
            self.proposal.number, self.proposal.genotype, self.state, self.loss, self.latency_ms
        )


class Study:
    """A study of one search; several processes may share it."""

    def __init__(self, study: optuna.Study, stale_seconds: float) -> None:
        self.name = study.study_name
        self.owner = Owner.current()
        self._study = study
        self._storage = study._storage
        self._stale_seconds = stale_seconds

    @classmethod
    def open(
        cls, config: StorageConfig, run_folder: Path, name: str, identity: Mapping[str, Any]
    ) -> Study:
        """Create the study, or go on with it.

        identity: what must be the same for its scores to be comparable. Raises ConfigError, saying
        what differs, if the study was made with another one.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=config.open(run_folder),
            study_name=name,
            directions=["minimize"] * len(OBJECTIVES),
            load_if_exists=True,
        )
        if len(study.directions) != len(OBJECTIVES):
            raise ConfigError([f"name: study '{name}' has other objectives; choose another name"])
        if study.metric_names is None:
            with warnings.catch_warnings():
                # Experimental, and for people only.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(OBJECTIVES))
        result = cls(study, config.stale_seconds)
        stored = flatten(result.settle("identity", identity))
        wanted = flatten(identity)
        problems = [
            f"{key}: the search '{name}' was made with {stored.get(key)!r}, now it is "
            f"{wanted.get(key)!r}; choose another name, or the old value"
            for key in stored | wanted
            if stored.get(key) != wanted.get(key)
        ]
        if problems:
            raise ConfigError(problems)
        return result

    def settle(self, key: str, value: Any) -> Any:
        """Store a fact of the study unless it is known; the fact as stored."""
        if key not in self._study.user_attrs:
            self._study.set_user_attr(key, value)
        return self._study.user_attrs[key]

    def fact(self, key: str) -> Any:
        """A fact that `settle` stored, or None."""
        return self._study.user_attrs.get(key)

    def update(self, key: str, value: Any) -> None:
        """Store a fact of the study, whether it is known or not."""
        self._study.set_user_attr(key, value)

    def records(self) -> list[Record]:
        """Every candidate, in the order of their numbers."""
        trials: dict[int, list[FrozenTrial]] = {}
        for trial in self._trials():
            trials.setdefault(trial.user_attrs["candidate"], []).append(trial)
        return [_record(trials[number]) for number in sorted(trials)]

    def propose(self, proposal: Proposal) -> Claim | None:
        """Add a candidate and claim it; None if another process added one of that number first."""
        return self._create(proposal, rung=0)

    def take_queued(self) -> Claim | None:
        """Claim a candidate that lost its owner; None if there is none."""
        for record in self.records():
            if record.state == "waiting":
                claim = self._create(record.proposal, record.rung)
                if claim is not None:
                    return claim
        return None

    def reap(self) -> int:
        """Fail the trials of dead owners, which queues their candidates; how many."""
        count = 0
        for trial in self._trials():
            if trial.state.is_finished():
                continue
            attributes = trial.user_attrs
            owner = Owner(**attributes["owner"])
            if owner.is_dead(attributes["heartbeat"], self._stale_seconds):
                claim = Claim(self, trial._trial_id, _proposal(trial))
                try:
                    claim.release(f"process {owner.pid} on {owner.host} died", died=True)
                except StaleTrialError:
                    # Another process was faster.
                    continue
                count += 1
        return count

    def _create(self, proposal: Proposal, rung: int) -> Claim | None:
        """Create and claim a trial unless a live one of the same candidate and rung is earlier."""
        attributes = {
            "candidate": proposal.number,
            "rung": rung,
            "genotype": proposal.genotype.to_json(),
            "origin": proposal.origin,
            "seed_name": proposal.seed_name,
            "parent": proposal.parent,
            "factor": proposal.factor,
            "owner": asdict(self.owner),
            "heartbeat": time.time(),
        }
        template = optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=attributes)
        trial_id = self._storage.create_new_trial(self._study._study_id, template)
        key = (proposal.number, rung)
        standing = [
            trial
            for trial in self._trials()
            if (trial.user_attrs["candidate"], trial.user_attrs["rung"]) == key
            and "released" not in trial.user_attrs
        ]
        claim = Claim(self, trial_id, proposal)
        if min(standing, key=lambda trial: trial.number)._trial_id != trial_id:
            claim.drop()
            return None
        claimed = self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        assert claimed, "only its owner claims a trial"
        return claim

    def _trials(self) -> Iterator[FrozenTrial]:
        """Trials that were not dropped."""
        for trial in self._study.get_trials(deepcopy=False):
            if "dropped" not in trial.user_attrs:
                yield trial


class Claim:
    """A trial of ours. As a context it is released if the block ends without a result."""

    def __init__(self, study: Study, trial_id: int, proposal: Proposal) -> None:
        self.proposal = proposal
        self._storage = study._storage
        self._trial_id = trial_id
        self._is_open = True
        self._last_beat = time.monotonic()

    def note(self, **attributes: Any) -> None:
        """Store facts. Raises StaleTrialError if the trial is no longer ours."""
        for key, value in attributes.items():
            self._write(self._storage.set_trial_user_attr, key, value)

    def beat(self) -> None:
        """Tell other machines that the owner is alive."""
        if time.monotonic() - self._last_beat > HEARTBEAT_SECONDS:
            self._last_beat = time.monotonic()
            self.note(heartbeat=time.time())

    def complete(self, loss: float, latency_ms: float) -> None:
        """Record the scores."""
        self._finish(TrialState.COMPLETE, (loss, latency_ms))

    def fail(self, error: str) -> None:
        """Record that the candidate cannot be scored."""
        self.note(error=error)
        self._finish(TrialState.FAIL)

    def reject(self, reason: str) -> None:
        """Record that no width of the candidate meets the target."""
        self.note(error=reason)
        self._finish(TrialState.PRUNED)

    def release(self, reason: str, *, died: bool = False) -> None:
        """Give the candidate up, so that it is queued again; `died`: its owner did."""
        self.note(died=died, released=reason)
        self._finish(TrialState.FAIL)

    def drop(self) -> None:
        """Undo the creation of the trial."""
        self.note(dropped=True)
        self._finish(TrialState.FAIL)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_open and kind is not StaleTrialError:
            self.release(f"interrupted by {kind.__name__}" if kind else "left without a result")

    def _finish(self, state: TrialState, values: tuple[float, float] | None = None) -> None:
        self._write(self._storage.set_trial_state_values, state, values)
        self._is_open = False

    def _write(self, write: Any, *arguments: Any) -> None:
        try:
            write(self._trial_id, *arguments)
        except UpdateFinishedTrialError:
            self._is_open = False
            raise StaleTrialError(
                f"candidate {self.proposal.number} was given to another process"
            ) from None


def _proposal(trial: FrozenTrial) -> Proposal:
    attributes = trial.user_attrs
    return Proposal(
        number=attributes["candidate"],
        genotype=Genotype.from_json(attributes["genotype"]),
        origin=attributes["origin"],
        seed_name=attributes["seed_name"],
        parent=attributes["parent"],
        factor=attributes["factor"],
    )


def _record(trials: list[FrozenTrial]) -> Record:
    """What all trials of one candidate say, the highest rung's counting."""
    rung = max(trial.user_attrs["rung"] for trial in trials)
    trials = [trial for trial in trials if trial.user_attrs["rung"] == rung]
    standing = [trial for trial in trials if "released" not in trial.user_attrs]
    trial = min(standing, key=lambda t: t.number) if standing else trials[-1]
    state, error = _state(trial), trial.user_attrs.get("error")
    deaths = [t.user_attrs["released"] for t in trials if t.user_attrs.get("died")]
    if not standing and len(deaths) >= MAX_ATTEMPTS:
        state, error = "failed", f"{deaths[-1]}, the {len(deaths)}th owner to do so"
    values = trial.values if state == "scored" else (None, None)
    return Record(
        proposal=_proposal(trial),
        state=state,
        rung=rung,
        loss=values[0],
        latency_ms=values[1],
        error=error,
        attempts=len(trials),
        started_at=_utc(trial.datetime_start),
        finished_at=_utc(trial.datetime_complete),
        attributes=trial.user_attrs,
    )


def _state(trial: FrozenTrial) -> State:
    if "released" in trial.user_attrs:
        return "waiting"
    states: dict[TrialState, State] = {
        TrialState.WAITING: "running",
        TrialState.RUNNING: "running",
        TrialState.COMPLETE: "scored",
        TrialState.PRUNED: "infeasible",
        TrialState.FAIL: "failed",
    }
    return states[trial.state]


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
