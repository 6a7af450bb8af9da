"""Optuna's journal, in which facts can be settled."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from uuid import uuid4

from optuna.storages import JournalStorage

# Between the name of a fact that is settled and that of who wants to.
SETTLED_BY = "#"


class StudyJournal(JournalStorage):
    """Whoever settles an attribute writes it under a name of its own, of which the first stands.

    Optuna takes the last that was written under a name; all read the journal in one order.
    """

    def turn(self, study_id: int) -> AbstractContextManager[None]:
        """Of the few processes of one machine none has to wait for its turn."""
        return nullcontext()

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
