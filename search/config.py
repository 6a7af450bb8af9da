"""What `python -m search` is configured by: `configs/search.yaml`, typed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from latency.timer import Protocol
from latency.workload import Workload
from search.audit import AuditConfig
from search.devices import device_names
from search.evolution import EvolutionConfig
from search.proxy import ProxyConfig
from search.space import SpaceConfig
from search.storage import StorageConfig
from search.target import LatencyLimit
from search.task import TaskConfig
from slm import slurm
from slm.config import ConfigError, read, schema
from slm.data.config import DataConfig, TokenizerConfig
from slm.plugins import plugin_digests
from slm.runtime import RuntimeConfig
from slm.training.config import LoggerConfig

Positive = Annotated[int, Field(gt=0)]
# What questions made of held-out text are asked for.
QUESTIONED = ("cloze_error", "continuation_error")


@schema
class SearchConfig(RuntimeConfig):
    """One search.

    name: names the study and the run's folder.
    target_ms: latency of one request of the workload; None: that of the space's reference.
    limits: further workloads, by name, whose latency candidates must meet as well.
    screen_margin: what the table predicts to exceed a target by no more than this share is still
        measured.
    num_candidates: how many are trained, seeds included; may be raised to go on with a search.
    max_infeasible: the search gives up after so many proposals in a row that miss the target.
    accuracy_items: questions of the word cloze, and of continuations, wherever one of them is
        asked: of the frontier's members the cloze, of all candidates what the objective says, in
        the audit what that says. 0: none.
    task: of lm-evaluation-harness, wherever `task_error` is asked.
    workers: processes that evaluate candidates side by side; they take the visible GPUs in turn.
        More may be started by hand, here or elsewhere, with the same command and storage.
    devices_per_candidate: processes that train a candidate together, each on a GPU of its own where
        there are GPUs; its latency is measured on the first.
    latency_threads, training_threads: CPU threads to measure and to train with; None: torch's
        choice, several processes share the cores.
    """

    space: SpaceConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    workload: Workload
    protocol: Protocol
    evolution: EvolutionConfig
    audit: AuditConfig
    proxy: ProxyConfig
    storage: StorageConfig
    logger: LoggerConfig
    name: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    target_ms: Annotated[float, Field(gt=0)] | None
    limits: dict[str, LatencyLimit]
    screen_margin: Annotated[float, Field(ge=0)]
    num_candidates: Positive
    max_infeasible: Positive
    accuracy_items: Annotated[int, Field(ge=0)]
    task: TaskConfig
    workers: Positive
    devices_per_candidate: Positive
    latency_threads: Positive | None
    training_threads: Positive | None

    def __post_init__(self) -> None:
        problems = []
        if self.num_candidates < len(self.space.seeds):
            problems.append(
                f"num_candidates: must be >= the {len(self.space.seeds)} seeds of the space, "
                f"got {self.num_candidates}"
            )
        if self.evolution.quality in QUESTIONED and not self.accuracy_items:
            problems.append(
                f"accuracy_items: must be > 0 for the objective {self.evolution.quality}, got 0"
            )
        audited = self.audit.qualities if self.audit.candidates else ()
        asked = [name for name in audited if name in QUESTIONED]
        if asked and not self.accuracy_items:
            problems.append(
                f"audit.qualities: {' and '.join(asked)} need accuracy_items > 0, got 0"
            )
        if "task_error" in (self.evolution.quality, *audited) and self.task.name is None:
            problems.append("task.name: task_error needs the name of a task, got None")
        if self.workers > 1 and self.storage.kind == "sqlite":
            problems.append(
                f"workers: sqlite storage is for one, got {self.workers}; take storage=journal"
            )
        if self.proxy.batch_size % self.devices_per_candidate:
            problems.append(
                f"devices_per_candidate: must divide proxy.batch_size {self.proxy.batch_size}, "
                f"got {self.devices_per_candidate}"
            )
        if self.logger.name == "tensorboard":
            problems.append("logger.name: must be 'csv' or 'wandb' in a search, got 'tensorboard'")
        if self.protocol.compile_unit == "step":
            problems.append(
                "protocol.compile_unit: must be 'operator', which candidates share, or 'eager', "
                "got 'step'"
            )
        if problems:
            raise ConfigError(problems)

    def device_problems(self) -> list[str]:
        """What the GPUs that this process may use are too few for."""
        count = self.devices_per_candidate
        if count == 1:
            return []
        num_visible = len(device_names())
        # Unlike workers of one GPU each, ranks cannot share a GPU. A CPU all can share.
        if 0 < num_visible < self.workers * count:
            return [
                f"devices_per_candidate: {self.workers} workers with {count} GPUs each need "
                f"{self.workers * count}, {num_visible} are visible"
            ]
        return []

    @property
    def threads_to_train(self) -> int | None:
        """CPU threads of each process: of torch's choice each would take all cores."""
        processes = self.workers * self.devices_per_candidate
        if self.training_threads is None and processes > 1:
            return max(1, len(os.sched_getaffinity(0)) // processes)
        return self.training_threads

    def identity(self) -> dict[str, Any]:
        """What must stay the same for the scores of a search to be comparable."""
        decisive = (
            *("space", "data", "tokenizer", "workload", "protocol", "evolution", "proxy"),
            *("backend", "seed", "target_ms", "limits", "screen_margin", "accuracy_items"),
            *("devices_per_candidate", "training_threads"),
        )
        values = plain(self)
        identity = {key: values[key] for key in decisive}
        identity["plugins"] = plugin_digests()
        if self.task.name is not None:
            identity["task"] = values["task"]
        # Where prepared data lies, and when a candidate is given up, decide no score.
        del identity["data"]["cache_dir"], identity["proxy"]["time_limit_s"]
        return identity


def read_config(config: DictConfig) -> SearchConfig:
    """Build and check a composed config; raises ConfigError with every problem."""
    result = read(SearchConfig, config)
    launcher = slurm_launcher()
    problems = result.device_problems() if launcher is None else _slurm_problems(result, launcher)
    if problems:
        raise ConfigError(problems)
    return result


def slurm_launcher() -> dict[str, Any] | None:
    """Options of Slurm's launcher if the command that is being run names it, for its workers.

    A job of a multirun is a search of its own, in one place. Raises ConfigError if the command
    names a launcher that cannot launch workers.
    """
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    name = hydra.runtime.choices.get("hydra/launcher")
    if hydra.mode == RunMode.MULTIRUN or name in (None, "basic"):
        return None
    if not slurm.is_chosen(hydra):
        raise ConfigError([f"hydra/launcher: workers are launched by 'slurm', got '{name}'"])
    launcher: Any = OmegaConf.to_container(hydra.launcher, resolve=True)
    return dict(launcher)


def _slurm_problems(config: SearchConfig, launcher: Mapping[str, Any]) -> list[str]:
    """What jobs with the launcher's options could not do."""
    found = slurm.problems()
    if config.storage.kind != "postgresql":
        found.append(
            f"storage.kind: Slurm's jobs may run on several machines, for which "
            f"{config.storage.kind} is not made; take storage=postgresql (docs/postgresql.md), or "
            f"start the search with all its workers within one job (docs/slurm.md)"
        )
    gpus = launcher["gpus_per_node"]
    if gpus is not None and gpus != config.devices_per_candidate:
        found.append(
            f"hydra.launcher.gpus_per_node: must be devices_per_candidate="
            f"{config.devices_per_candidate}, or null where there are no GPUs, got {gpus}"
        )
    for name in ("nodes", "tasks_per_node"):
        if launcher[name] != 1:
            found.append(f"hydra.launcher.{name}: a worker needs 1, got {launcher[name]}")
    return found


def plain(config: Any) -> Any:
    """A config as JSON has it: dictionaries, lists, numbers and strings."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        return value if isinstance(value, bool | int | float | None) else str(value)

    return convert(dataclasses.asdict(config))
