"""Where candidates are logged besides the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from search.config import SearchConfig, plain
from search.history import QUALITIES
from search.study import Study

LOGGED = (
    *QUALITIES,
    *("bits_per_byte", "latency_ms", "predicted_ms", "width", "parameters", "seconds"),
)


class Logger(Protocol):
    """Takes candidates as they are done."""

    def log(self, row: dict[str, Any], best: dict[str, Any] | None) -> None:
        """A candidate, and the chosen one so far; both as in `candidates.json`."""

    def close(self) -> None:
        """Nothing more comes."""


class NoLogger:
    """The run folder is enough."""

    def log(self, row: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class WandbLogger:
    """One Weights & Biases run per search, one step per candidate; a resumed search goes on."""

    def __init__(self, config: SearchConfig, run_folder: Path, study: Study) -> None:
        import wandb

        self._quality = config.evolution.quality
        self._run = wandb.init(
            project=config.logger.project,
            entity=config.logger.entity,
            name=config.name,
            id=study.settle("wandb_id", uuid4().hex[:8]),
            resume="allow",
            mode="offline" if config.logger.offline else "online",
            dir=str(run_folder),
            config=plain(config),
        )

    def log(self, row: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Scores of a candidate; those of one that failed are left out."""
        values = {name: row[name] for name in LOGGED if row[name] is not None}
        values |= {"state": row["state"], "architecture": row["architecture"] or ""}
        if best is not None:
            values[f"best_{self._quality}"] = best["score"]
            values["best_latency_ms"] = best["latency_ms"]
        self._run.log(values, step=row["number"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_logger(config: SearchConfig, run_folder: Path, study: Study) -> Logger:
    """The logger of the config's `logger` group."""
    if config.logger.name == "wandb":
        return WandbLogger(config, run_folder, study)
    return NoLogger()
