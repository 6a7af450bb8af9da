"""Metrics: throughput over the log window, a CSV file that survives a resume, lines to read."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from slm.training.files import write_atomically

FIELDS = (
    "step",
    "tokens",
    "seconds",
    "loss",
    "lr",
    "tokens_per_s",
    "validation_loss",
    "bits_per_byte",
)


class MetricsFile(Logger):
    """`metrics.csv`, one row per log step or validation.

    Lightning's own CSV logger deletes an earlier file; this one goes on with it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

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
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row; fields that `metrics` lacks stay empty."""
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if is_new:
                writer.writeheader()
            writer.writerow({"step": step, **metrics})

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`: a resumed run writes them again."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())


class Metrics(Callback):
    """Logs loss, learning rate and throughput every `every_steps`, and shows them.

    The loss is the mean over the window since the last log, gathered on the device: nothing waits
    for it between two logs. On a terminal one line is rewritten; elsewhere a line is printed every
    `seconds_between_lines`. Raises FloatingPointError when the loss is no longer finite.
    """

    def __init__(
        self,
        every_steps: int,
        tokens_per_step: int,
        timer: Timer,
        output: TextIO | None = None,
        seconds_between_lines: float = 5.0,
    ) -> None:
        self.every_steps = every_steps
        self.tokens_per_step = tokens_per_step
        self.timer = timer
        self.output = output or sys.stderr
        self.seconds_between_lines = seconds_between_lines
        self.last_line_s = -math.inf
        self.loss_sum: Tensor | None = None
        self.num_losses = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the first window."""
        self._open_window(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rate: when the batch has ended, it is the next one's."""
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add to the window, and close it when it is full."""
        # Lightning hands over each batch's share of an accumulated step.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
        self.num_losses += 1
        step = trainer.global_step
        if step > self.window_step and (step % self.every_steps == 0 or step == trainer.max_steps):
            self._close_window(trainer)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the throughput what is not training: a validation, a checkpoint."""
        start_s = time.monotonic()
        yield
        self.window_start_s += time.monotonic() - start_s

    def record(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        """Hand metrics of the current step to every logger, with tokens and seconds so far."""
        totals = {
            "tokens": trainer.global_step * self.tokens_per_step,
            "seconds": round(self.timer.time_elapsed("train"), 3),
        }
        for logger in trainer.loggers:
            logger.log_metrics({**totals, **metrics}, step=trainer.global_step)

    def show(self, trainer: L.Trainer, text: str, *, keep: bool = False) -> None:
        """Show one line; on a terminal it is rewritten by the next unless `keep`."""
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        if self.output.isatty():
            print(f"\r\033[K{text}", end="\n" if keep else "", file=self.output, flush=True)
        elif keep or now - self.last_line_s >= self.seconds_between_lines:
            print(text, file=self.output, flush=True)
            self.last_line_s = now

    def _open_window(self, trainer: L.Trainer) -> None:
        self.window_step = trainer.global_step
        self.window_start_s = time.monotonic()
        self.loss_sum, self.num_losses = None, 0

    def _close_window(self, trainer: L.Trainer) -> None:
        assert self.loss_sum is not None
        step = trainer.global_step
        # Waits for the device, so that the time below is that of work done.
        loss = self.loss_sum.item() / self.num_losses
        seconds = time.monotonic() - self.window_start_s
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {step}: lower optimizer.lr or trainer.gradient_clip"
            )
        tokens_per_s = (step - self.window_step) * self.tokens_per_step / seconds
        self.record(trainer, {"loss": loss, "lr": self.lr, "tokens_per_s": round(tokens_per_s, 1)})
        self.show(
            trainer,
            f"step {step}/{trainer.max_steps}  loss {loss:.4f}  lr {self.lr:.2e}  "
            f"{tokens_per_s:,.0f} tokens/s",
        )
        self._open_window(trainer)
