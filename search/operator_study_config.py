"""What `python -m search.operator_study` is configured by: `configs/operator_study.yaml`, typed."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from omegaconf import DictConfig
from pydantic import Field

from search.cell_study_config import CellStudyConfig, Positive
from search.proxy import ProxyConfig
from search.study_design import StudySpaceConfig
from slm.config import read, schema


@schema
class StudyConfig(CellStudyConfig):
    """One operator study.

    parameters: of every model in the comparison at equal parameters, embedding included.
    target_ms: latency of one request of the workload in the comparison at equal latency; None: that
        of the first operator alone at equal parameters.
    latency_tolerance: share of the target that a model may miss it by.
    accuracy_items: questions of the word cloze put to each model.
    """

    space: StudySpaceConfig
    parameters: Positive
    target_ms: Annotated[float, Field(gt=0)] | None
    latency_tolerance: Annotated[float, Field(gt=0, lt=1)]
    accuracy_items: Annotated[int, Field(ge=0)]

    @pydantic.field_validator("proxy")
    @classmethod
    def _check_rungs(cls, proxy: ProxyConfig) -> ProxyConfig:
        if len(proxy.rung_tokens) != 1:
            raise ValueError(f"rung_tokens must be one number, got {list(proxy.rung_tokens)}")
        return proxy

    def identity(self) -> dict[str, Any]:
        """See `CellStudyConfig.identity`; operators and partners may be added, too."""
        values = super().identity()
        operators = values["space"].pop("operators")
        del values["space"]["partners"]
        # Its latency is the target.
        return {**values, "reference": operators[0]}


def read_config(config: DictConfig) -> StudyConfig:
    """Build and check a composed config; raises ConfigError with every problem."""
    return read(StudyConfig, config)
