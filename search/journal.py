"""Optuna's journal, in which facts can be settled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from uuid import uuid4

from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

# Between the name of a fact that is settled and that of who wants to.
SETTLED_BY = "#"


class StudyJournal(JournalStorage):
    """Whoever settles an attribute writes it under a name of its own, of which the first stands.

    Optuna takes the last that was written under a name; all read the journal in one order.
    """

    def turn(self, study_id: int) -> AbstractContextManager[bool]:
        """Of the few processes of one machine none waits for its turn: False."""
        return nullcontext(False)

    def add_trial(self, study_id: int, trial: FrozenTrial) -> FrozenTrial:
        """Create a trial like this one; as it was created."""
        return self.get_trial(self.create_new_trial(study_id, trial))

    def changed_trials(
        self, study_id: int, unfinished: Iterable[FrozenTrial], last: FrozenTrial | None
    ) -> list[FrozenTrial]:
        """The unfinished trials as they are now, and those that follow the last, in order."""
        trials = self.get_all_trials(study_id, deepcopy=False)
        num_known = 0 if last is None else last.number + 1
        return [*(trials[trial.number] for trial in unfinished), *trials[num_known:]]

    def complete_trial(
        self,
        trial_id: int,
        values: Sequence[float],
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
    ) -> None:
        """Finish a trial with its values and attributes.

        Raises UpdateFinishedTrialError if it was finished already.
        """
        for key, value in user_attrs.items():
            self.set_trial_user_attr(trial_id, key, value)
        for key, value in system_attrs.items():
            self.set_trial_system_attr(trial_id, key, value)
        self.set_trial_state_values(trial_id, TrialState.COMPLETE, values)

    def settle_study_user_attr(self, study_id: int, key: str, value: Any) -> Any:
        """Set an attribute of a study unless it is set; its value."""
        if key not in self.get_study_user_attrs(study_id):
            self.set_study_user_attr(study_id, f"{key}{SETTLED_BY}{uuid4().hex}", value)
        return self.get_study_user_attrs(study_id)[key]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """All of them, in the order in which they were first written."""
        found: dict[str, Any] = {}
        for name, value in super().get_study_user_attrs(study_id).items():
            found.setdefault(name.partition(SETTLED_BY)[0], value)
        return found
