"""Optuna's storage of relational databases, with fewer statements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialParamModel

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


class RelationalStorage(RDBStorage):
    """Adds each parameter of a new trial in one statement, where Optuna takes three."""

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
