"""Optuna's storage of relational databases, with fewer statements and facts that are settled."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyUserAttributeModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


INSERT = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


class RelationalStorage(RDBStorage):
    """Takes a statement where Optuna takes three, and reads nothing twice."""

    def turn(self, study_id: int) -> AbstractContextManager[bool]:
        """Of the few processes of one machine none waits for its turn: False."""
        return nullcontext(False)

    def add_trial(self, study_id: int, trial: FrozenTrial) -> FrozenTrial:
        """Create a trial like this one; as it was created."""
        return self._create_new_trial(study_id, trial)

    def changed_trials(
        self, study_id: int, unfinished: Iterable[FrozenTrial], last: FrozenTrial | None
    ) -> list[FrozenTrial]:
        """The unfinished trials as they are now, and those that follow the last, in order.

        Trials get their ids one after the other, as they get their numbers.
        """
        ids = {trial._trial_id for trial in unfinished}
        return self._get_trials(study_id, None, ids, -1 if last is None else last._trial_id)

    def complete_trial(
        self,
        trial_id: int,
        values: Sequence[float],
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
    ) -> None:
        """Finish a trial with its values, and attributes that it has not had.

        All in one transaction. Raises UpdateFinishedTrialError, and writes nothing, if it was
        finished already.
        """
        finish = (
            sqlalchemy.update(TrialModel)
            .where(TrialModel.trial_id == trial_id, TrialModel.state == TrialState.RUNNING)
            .values(
                {
                    TrialModel.state: TrialState.COMPLETE,
                    # Optuna stores UTC without saying so.
                    TrialModel._datetime_complete_utc: datetime.now(UTC).replace(tzinfo=None),
                }
            )
        )
        stored = enumerate(map(TrialValueModel.value_to_stored_repr, values))
        rows: dict[Any, list[dict[str, Any]]] = {
            TrialValueModel: [
                {"objective": objective, "value": value, "value_type": kind}
                for objective, (value, kind) in stored
            ],
            TrialUserAttributeModel: _attributes(user_attrs),
            TrialSystemAttributeModel: _attributes(system_attrs),
        }
        with self.engine.begin() as connection:
            if not connection.execute(finish).rowcount:
                raise UpdateFinishedTrialError(f"trial {trial_id} is finished")
            for model, found in rows.items():
                if found:
                    own = [{"trial_id": trial_id} | row for row in found]
                    connection.execute(sqlalchemy.insert(model), own)

    def settle_study_user_attr(self, study_id: int, key: str, value: Any) -> Any:
        """Set an attribute of a study unless it is set; its value. The database sees who is first.

        Optuna's own way to set one takes the last.
        """
        insert: Any = INSERT[self.engine.dialect.name]
        row = {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
        with self.engine.begin() as connection:
            connection.execute(insert(StudyUserAttributeModel).values(row).on_conflict_do_nothing())
        return self.get_study_user_attrs(study_id)[key]

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> TrialModel:
        if template_trial is None:
            return super()._get_prepared_new_trial(study_id, None, session)
        # Optuna asks for each attribute whether the trial can still change.
        bare = copy.copy(template_trial)
        bare.user_attrs = {}
        trial = super()._get_prepared_new_trial(study_id, bare, session)
        session.add_all(
            TrialUserAttributeModel(trial_id=trial.trial_id, **row)
            for row in _attributes(template_trial.user_attrs)
        )
        return trial

    def _set_trial_param_without_commit(
        self,
        session: Session,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None = None,
    ) -> None:
        # Optuna asks whether the trial can still change, and whether others of the study have the
        # parameter with the same distribution. Ours have it when they are created, with
        # distributions that follow from what identifies the study.
        session.add(
            TrialParamModel(
                trial_id=trial_id,
                param_name=param_name,
                param_value=param_value_internal,
                distribution_json=distribution_to_json(distribution),
            )
        )


def _attributes(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in values.items()]
