"""Where candidates are logged besides the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from search.config import SearchConfig, plain
from search.history import QUALITIES
from search.study import Study

LOGGED = (
    *("number", "rung", "state", *QUALITIES, "bits_per_byte", "latency_ms", "predicted_ms"),
    *("width", "parameters", "seconds"),
)


class Logger(Protocol):
    """Takes candidates as they are done."""

    def log(self, row: dict[str, Any], standing: Mapping[str, float | None]) -> None:
        """A candidate as in `candidates.json`, and how the search stands now that it is done."""

    def close(self) -> None:
        """Nothing more comes."""


class NoLogger:
    """The run folder is enough."""

    def log(self, row: dict[str, Any], standing: Mapping[str, float | None]) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class WandbLogger:
    """One Weights & Biases run per search; a resumed search goes on.

    A step is an evaluation: of a candidate on a rung. Candidates are no steps, since they come back
    when they are promoted, and W&B drops what is logged for a step that is over.

    num_evaluations: those that have been finished before.
    """

    def __init__(
        self, config: SearchConfig, run_folder: Path, study: Study, num_evaluations: int
    ) -> None:
        import wandb

        self._num_evaluations = num_evaluations
        self._run = wandb.init(
            project=config.logger.project,
            entity=config.logger.entity,
            name=config.name,
            id=study.settle("wandb_id", uuid4().hex[:8]),
            resume="allow",
            # Online is what W&B does by itself, unless the machine's WANDB_MODE says otherwise.
            mode="offline" if config.logger.offline else None,
            dir=str(run_folder),
            config=plain(config),
        )

    def log(self, row: dict[str, Any], standing: Mapping[str, float | None]) -> None:
        """A candidate's scores and how the search stands; what is not known is left out."""
        values = {**{name: row[name] for name in LOGGED}, **standing}
        values["architecture"] = row["architecture"]
        self._num_evaluations += 1
        self._run.log(
            {name: value for name, value in values.items() if value is not None},
            step=self._num_evaluations,
        )

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_logger(
    config: SearchConfig, run_folder: Path, study: Study, num_evaluations: int
) -> Logger:
    """The logger of the config's `logger` group. num_evaluations: finished before."""
    if config.logger.name == "wandb":
        return WandbLogger(config, run_folder, study, num_evaluations)
    return NoLogger()
