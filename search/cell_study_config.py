"""What the studies that are made of cells have in common in their configs."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import Field

from latency.timer import Protocol
from latency.workload import Workload
from search.config import plain
from search.proxy import ProxyConfig
from slm.config import schema
from slm.data.config import DataConfig, TokenizerConfig
from slm.plugins import plugin_digests
from slm.runtime import RuntimeConfig

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@schema
class CellStudyConfig(RuntimeConfig):
    """A study that measures models and trains them with several seeds.

    name: names the run's folder.
    seeds: each model is trained once with each; more may be added to go on with a study.
    processes: models that are trained at the same time; they take the visible GPUs in turn.
    latency_threads, training_threads: CPU threads to measure and to train with; None: torch's
        choice.
    """

    data: DataConfig
    tokenizer: TokenizerConfig
    workload: Workload
    protocol: Protocol
    proxy: ProxyConfig
    name: str
    seeds: tuple[Seed, ...]
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
    def _check_warm_start(cls, proxy: ProxyConfig) -> ProxyConfig:
        if proxy.warm_start:
            raise ValueError("warm_start must be false: nothing has a parent here, got true")
        return proxy

    def identity(self) -> dict[str, Any]:
        """What must stay the same for the cells of a study to be comparable.

        Seeds may be added: their cells are new ones.
        """
        values = plain(self)
        for key in ("name", "seeds", "processes", "latency_threads"):
            del values[key]
        del values["data"]["cache_dir"], values["proxy"]["time_limit_s"]
        return {**values, "plugins": plugin_digests()}
