"""Where metrics go: always `metrics.csv`, and beside it Weights & Biases or TensorBoard."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from slm.training.config import TrainConfig
from slm.training.files import write_atomically

METRICS_FILE = "metrics.csv"
TENSORBOARD_DIR = "tensorboard"
WANDB_ID_FILE = "wandb_id"


class MetricsFile(Logger):
    """`metrics.csv`, one row per log step or validation.

    Lightning's own CSV logger deletes an earlier file; this one goes on with it, once `begin` has
    said from which step and with which columns.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        """Name of the kind of logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one per run."""
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """They are in the run's config; nothing to do."""

    @rank_zero_only
    def begin(self, step: int, columns: Sequence[str]) -> None:
        """Forget the rows after `step`: a resumed run writes them again.

        Rows of an older version keep columns that are no longer written; new ones are empty there.
        """
        rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        known = rows[0] if rows else {}
        self.columns = list(dict.fromkeys([*columns, *known]))
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row; columns that `metrics` lacks stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step, **metrics})


@contextmanager
def open_loggers(config: TrainConfig, run_dir: Path, step: int) -> Iterator[list[Logger]]:
    """The loggers, closed at the end: the next job of a sweep opens its own.

    step: that the run goes on from; what TensorBoard has been told of later ones is withdrawn.
    Weights & Biases, which takes nothing back, has these steps twice.
    """
    file = MetricsFile(run_dir / METRICS_FILE)
    if config.logger.name == "csv":
        yield [file]
    elif config.logger.name == "tensorboard":
        board = TensorBoardLogger(
            run_dir,
            name=TENSORBOARD_DIR,
            version="",
            default_hp_metric=False,
            purge_step=step + 1 if step else None,
        )
        board.log_hyperparams(config.identity())
        # The Trainer closes it.
        yield [file, board]
    else:
        import wandb

        tracker = WandbLogger(
            name=config.name,
            save_dir=run_dir,
            project=config.logger.project,
            entity=config.logger.entity,
            # Lightning's own `offline` sets a variable that a session already begun does not read,
            # and that the next job of a sweep would inherit.
            mode="offline" if config.logger.offline else None,
            config=config.identity(),
            id=_wandb_id(run_dir, step),
        )
        try:
            yield [file, tracker]
        finally:
            wandb.finish()


@rank_zero_only
def _wandb_id(run_dir: Path, step: int) -> str:
    """What Weights & Biases knows the run by, however often it goes on; None on other ranks."""
    path = run_dir / WANDB_ID_FILE
    if step == 0 or not path.exists():
        write_atomically(path, uuid4().hex[:8])
    return path.read_text()


def log_texts(logger: Logger, name: str, rows: Sequence[dict[str, str]], step: int) -> None:
    """Hand texts to a logger that takes any: rows of a table, each by column."""
    if isinstance(logger, WandbLogger):
        columns = list(rows[0])
        cells = [[row[key] for key in columns] for row in rows]
        logger.log_text(name, columns, cells, step=step)
    elif isinstance(logger, TensorBoardLogger):
        for number, row in enumerate(rows):
            # Read as Markdown, in which four spaces keep a text as it is.
            lines = "".join(row.values()).splitlines()
            text = "\n".join(f"    {line}" for line in lines)
            logger.experiment.add_text(f"{name}/{number}", text, step)
