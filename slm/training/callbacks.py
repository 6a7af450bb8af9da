"""Validation and checkpoints, both between two optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from slm.data.packing import PackedSplit
from slm.evaluation import bits_per_byte, evaluate_loss
from slm.training import kept_checkpoints
from slm.training.metrics import Metrics
from slm.training.module import TrainingModule
from slm.training.precision import autocast
from slm.training.signals import StopSignals, stop


class Validation(Callback):
    """Validation loss and bits per byte every `every_steps`, and at the end.

    step, loss: those of the last validation; kept in checkpoints.
    """

    def __init__(
        self,
        split: PackedSplit,
        sequence_tokens: int,
        batch_size: int,
        max_tokens: int | None,
        every_steps: int,
        metrics: Metrics,
    ) -> None:
        self.split = split
        self.sequence_tokens = sequence_tokens
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.every_steps = every_steps
        self.metrics = metrics
        self.step = 0
        self.loss = float("nan")

    @property
    def bits_per_byte(self) -> float:
        """The last loss, per byte of text."""
        return bits_per_byte(self.loss, self.split)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Validate when it is time; the last time before the last checkpoint, which keeps it."""
        if trainer.global_step % self.every_steps == 0 or _is_last(trainer):
            self._validate(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the final weights, if time ended the run within a step."""
        self._validate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The last validation."""
        return {"step": self.step, "loss": self.loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the last validation."""
        self.step, self.loss = state_dict["step"], state_dict["loss"]

    def _validate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # With accumulation, several batches end at the same step.
        if self.step == trainer.global_step:
            return
        assert isinstance(pl_module, TrainingModule)
        self.step = trainer.global_step
        with self.metrics.paused(), autocast(pl_module.device, pl_module.trainer_config.precision):
            self.loss = evaluate_loss(
                pl_module.model,
                self.split,
                self.sequence_tokens,
                self.batch_size,
                max_tokens=self.max_tokens,
                share_rows=trainer.world_size > 1,
            )
        values = {"validation_loss": self.loss, "bits_per_byte": self.bits_per_byte}
        self.metrics.record(trainer, values)
        self.metrics.progress.say(
            f"step {self.step}: validation loss {self.loss:.4f}, "
            f"{self.bits_per_byte:.4f} bits per byte"
        )


class Checkpoints(Callback):
    """Saves a run's checkpoint every `every_steps`, at the end, and when asked to stop.

    SIGTERM, SIGUSR1 and Ctrl-C let the optimizer step in hand finish and save, so that the run goes
    on exactly where it stopped; a second one stops at once.
    """

    def __init__(self, folder: Path, every_steps: int, metrics: Metrics) -> None:
        self.folder = folder
        self.every_steps = every_steps
        self.metrics = metrics
        self.saved_step = 0
        self._signals: StopSignals | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Catch the signals from here on."""
        self.saved_step = self.last_step = trainer.global_step
        self._signals = StopSignals()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save when it is time, or when asked to stop."""
        if trainer.global_step == self.last_step:
            # Gradients of a step in hand are not part of a checkpoint.
            return
        self.last_step = trainer.global_step
        assert self._signals is not None
        received = self._signals.received()
        if received or _is_last(trainer) or trainer.global_step % self.every_steps == 0:
            self._save(trainer)
        if received:
            stop(received)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final weights, if time ended the run within a step."""
        self._save(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._release()

    def _release(self) -> None:
        if self._signals is not None:
            self._signals.release()
            self._signals = None

    def _save(self, trainer: L.Trainer) -> None:
        if self.saved_step == trainer.global_step:
            return
        self.saved_step = trainer.global_step
        with self.metrics.paused():
            trainer.save_checkpoint(self.folder / kept_checkpoints.PARTIAL)
            if trainer.is_global_zero:
                kept_checkpoints.keep(self.folder)
            trainer.strategy.barrier()


def _is_last(trainer: L.Trainer) -> bool:
    return trainer.should_stop or trainer.global_step == trainer.max_steps
