"""A claim: the right to work on a candidate's rung, a lease that its owner renews.

It is an Optuna trial that is RUNNING. Whoever has lost the lease is refused, since a finished trial
cannot change.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

if TYPE_CHECKING:
    from search.history import Proposal
    from search.study import Study

# A lease is renewed when so much of it is over.
RENEWAL_SHARE = 0.25
# Where Optuna's dashboard, too, looks for constraints: above zero they are missed.
CONSTRAINTS = "constraints"
# Attributes of a trial: its candidate's proposal; rung, owner and when the owner was last heard of.
# Few, since storage takes its time for each.
PROPOSAL = "proposal"
CLAIM = "claim"


class StaleTrialError(RuntimeError):
    """The trial was taken away from its owner, who has been taken for dead."""


class Claim:
    """A trial of ours. As a context it is released if the block ends without a result."""

    def __init__(
        self, study: Study, trial_id: int, proposal: Proposal, claim: dict[str, Any]
    ) -> None:
        self.proposal = proposal
        self.rung: int = claim["rung"]
        self._claim = claim
        self._storage = study.storage
        self._clock = study.clock
        self._trial_id = trial_id
        self._is_open = True
        self._renewal_seconds = RENEWAL_SHARE * study.lease_seconds
        self._last_beat = time.monotonic()

    @property
    def name(self) -> str:
        """Tells its files apart from those of any other claim of the study."""
        return f"{self.proposal.number}-{self.rung}-{self._trial_id}"

    def beat(self) -> None:
        """Renew the lease if it is time. Raises StaleTrialError if the trial is no longer ours."""
        if time.monotonic() - self._last_beat > self._renewal_seconds:
            self._last_beat = time.monotonic()
            self._note(CLAIM, {**self._claim, "heartbeat": self._clock.now()})

    def complete(
        self,
        values: Sequence[float],
        result: Mapping[str, Any],
        excess_ms: Sequence[float],
    ) -> None:
        """Record the objectives, what else is known, and the latency beyond each target.

        excess_ms: beyond the search's own target first, then beyond each limit.
        """
        attributes = {"result": json.dumps(result)}, {CONSTRAINTS: list(excess_ms)}
        self._write(self._storage.complete_trial, values, *attributes)
        self._is_open = False

    def fail(self, error: str, result: Mapping[str, Any]) -> None:
        """Record that the candidate cannot be scored, and what else is known."""
        self._note("result", json.dumps(result))
        self._note("error", error)
        self._finish(TrialState.FAIL)

    def reject(self, reason: str, result: Mapping[str, Any]) -> None:
        """Record that no width of the candidate meets every target, and what else is known."""
        self._note("result", json.dumps(result))
        self._note("error", reason)
        self._finish(TrialState.PRUNED)

    def release(self, reason: str) -> None:
        """Give the candidate up, so that it is queued again."""
        self._note("released", reason)
        self._finish(TrialState.FAIL)

    def drop(self) -> None:
        """Undo the creation of the trial."""
        self._note("dropped", True)
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
            with suppress(StaleTrialError):
                self.release(f"interrupted by {kind.__name__}" if kind else "left without a result")

    def _note(self, key: str, value: Any) -> None:
        self._write(self._storage.set_trial_user_attr, key, value)

    def _finish(self, state: TrialState) -> None:
        self._write(self._storage.set_trial_state_values, state)
        self._is_open = False

    def _write(self, write: Any, *arguments: Any) -> None:
        try:
            write(self._trial_id, *arguments)
        except UpdateFinishedTrialError:
            self._is_open = False
            raise StaleTrialError(
                f"candidate {self.proposal.number} was given to another process"
            ) from None
