"""What `python -m search.operator_study` is configured by: `configs/operator_study.yaml`, typed."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from omegaconf import DictConfig
from pydantic import Field

from latency.timer import Protocol
from latency.workload import Workload
from search.config import plain
from search.proxy import ProxyConfig
from search.study_design import StudySpaceConfig
from slm.config import read, schema
from slm.data.config import DataConfig, TokenizerConfig
from slm.plugins import plugin_digests
from slm.runtime import RuntimeConfig

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@schema
class StudyConfig(RuntimeConfig):
    """One operator study.

    name: names the run's folder.
    seeds: each model is trained once with each; more may be added to go on with a study.
    parameters: of every model in the comparison at equal parameters, embedding included.
    target_ms: latency of one request of the workload in the comparison at equal latency; None: that
        of the first operator alone at equal parameters.
    latency_tolerance: share of the target that a model may miss it by.
    accuracy_items: questions of the word cloze put to each model.
    processes: models that are trained at the same time.
    latency_threads, training_threads: CPU threads to measure and to train with; None: torch's
        choice.
    """

    space: StudySpaceConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    workload: Workload
    protocol: Protocol
    proxy: ProxyConfig
    name: str
    seeds: tuple[Seed, ...]
    parameters: Positive
    target_ms: Annotated[float, Field(gt=0)] | None
    latency_tolerance: Annotated[float, Field(gt=0, lt=1)]
    accuracy_items: Annotated[int, Field(ge=0)]
    processes: Positive
    latency_threads: Positive | None
    training_threads: Positive | None

    @pydantic.field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("must not be empty")
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"must differ, got {list(seeds)}")
        return seeds

    @pydantic.field_validator("proxy")
    @classmethod
    def _check_rungs(cls, proxy: ProxyConfig) -> ProxyConfig:
        if len(proxy.rung_tokens) != 1:
            raise ValueError(f"rung_tokens must be one number, got {list(proxy.rung_tokens)}")
        if proxy.warm_start:
            raise ValueError("warm_start must be false: nothing has a parent here, got true")
        return proxy

    def identity(self) -> dict[str, Any]:
        """What must stay the same for the cells of a study to be comparable.

        Operators, partners and seeds may be added: their cells are new ones.
        """
        values = plain(self)
        for key in ("name", "seeds", "processes", "latency_threads"):
            del values[key]
        del values["data"]["cache_dir"], values["proxy"]["time_limit_s"]
        operators = values["space"].pop("operators")
        del values["space"]["partners"]
        # Its latency is the target.
        return {**values, "reference": operators[0], "plugins": plugin_digests()}


def read_config(config: DictConfig) -> StudyConfig:
    """Build and check a composed config; raises ConfigError with every problem."""
    return read(StudyConfig, config)
