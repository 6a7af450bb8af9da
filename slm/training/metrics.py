"""Metrics: what every few steps is told to the loggers and shown."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.profilers import Profiler
from torch.optim import Optimizer

from slm.data.packing import PackedSplit
from slm.evaluation import bits_per_byte
from slm.training.loggers import MetricsFile
from slm.training.module import TrainingModule
from slm.training.norms import gradients, norm, parameters_by_kind
from slm.training.precision import uses_bfloat16
from slm.training.progress import Progress, Standing
from slm.training.throughput import mfu, peak_flops, training_flops_per_token


class LoaderClock(Profiler):
    """Seconds that the training loop has waited for its data loader.

    A profiler is what Lightning tells when it fetches a batch; between the hooks of two steps it
    may wait for other things too, such as other processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._start_s = 0.0

    def start(self, action_name: str) -> None:
        """Something begins."""
        if action_name.endswith("train_dataloader_next"):
            self._start_s = time.monotonic()

    def stop(self, action_name: str) -> None:
        """It has ended."""
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.monotonic() - self._start_s


class Metrics(Callback):
    """Every `every_steps` a window of steps is closed, logged and shown.

    Columns of a closed window:

        loss                  nats per token, mean of what is finite over the window and devices
        train_bits_per_byte   the same per byte of the training text
        lr                    of the last step
        tokens_per_s          of all devices, without validations, checkpoints and samples
        data_share            of the window's time, how much was waiting for the data loader
        memory_bytes          peak of the window on the GPU; on a CPU what the process holds
        mfu, mfu_causal       see `slm.training.throughput`; empty where the peak is unknown
        gradient_norm         of the last step, before it is clipped: in total and, with the kind
                              after a slash, of each kind of `slm.training.norms`
        weight_norm/<kind>    after the last step
        skipped_steps         left out since training began, or went on, as gradients were not
                              finite

    All of it is gathered on the device: nothing waits for it between two logs, and closing a window
    reads one tensor. Raises FloatingPointError when no step of a window had finite numbers.
    """

    def __init__(
        self,
        every_steps: int,
        tokens_per_step: int,
        sequence_tokens: int,
        split: PackedSplit,
        timer: Timer,
    ) -> None:
        self.every_steps = every_steps
        self.tokens_per_step = tokens_per_step
        self.sequence_tokens = sequence_tokens
        self.split = split
        self.timer = timer
        self.loader_clock = LoaderClock()
        self.progress = Progress()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See what is to be measured; open the first window."""
        assert isinstance(pl_module, TrainingModule)
        # Now that weights are where they stay, in shards or whole.
        self.kinds = parameters_by_kind(pl_module.model)
        self.device = pl_module.device
        self.peak_flops = None
        if self.device.type == "cuda":
            is_bfloat16 = uses_bfloat16(self.device, pl_module.trainer_config.precision)
            of_one = peak_flops(torch.cuda.get_device_name(self.device), bfloat16=is_bfloat16)
            self.peak_flops = None if of_one is None else of_one * trainer.world_size
        self.flops_per_token = {
            name: training_flops_per_token(
                pl_module.model.architecture, self.sequence_tokens, causal=causal
            )
            for name, causal in (("mfu", False), ("mfu_causal", True))
        }
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.begin(trainer.global_step, self.columns())
        self.skipped_steps = 0.0
        self.progress.is_shown = trainer.is_global_zero
        self.progress.begin(self._standing(trainer))
        self._open_window(trainer)

    def columns(self) -> list[str]:
        """Everything that a row may hold, in order."""
        return [
            *("step", "tokens", "seconds", "loss", "train_bits_per_byte", "lr", "tokens_per_s"),
            *("data_share", "memory_bytes", "mfu", "mfu_causal"),
            *("validation_loss", "bits_per_byte"),
            *self._figure_names(),
        ]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rate: when the batch has ended, it is the next one's."""
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the gradients' norms, if this step closes a window.

        They are whole here: summed over the batches and processes of the step, and not yet clipped.
        """
        if self._closes_window(trainer, trainer.global_step + 1):
            self.gradient_norms = [
                norm(gradients(each), self.device) for each in self.kinds.values()
            ]

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
        self.losses += torch.stack([loss.nan_to_num(0.0, 0.0, 0.0), loss.isfinite()])
        step = trainer.global_step
        if step > self.window_step and self._closes_window(trainer, step):
            self._close_window(trainer)
        self.progress.step(self._standing(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the terminal as it was."""
        self.progress.end()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self.progress.end()

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

    def _closes_window(self, trainer: L.Trainer, step: int) -> bool:
        return step % self.every_steps == 0 or step == trainer.max_steps

    def _open_window(self, trainer: L.Trainer) -> None:
        self.window_step = trainer.global_step
        self.window_start_s = time.monotonic()
        self.loader_clock.seconds = 0.0
        # Their sum, and how many they are.
        self.losses = torch.zeros(2, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _close_window(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        loss, figures = self._read(trainer)
        seconds = time.monotonic() - self.window_start_s
        skipped_before, self.skipped_steps = self.skipped_steps, figures["skipped_steps"]
        if not math.isfinite(loss) or (
            self.skipped_steps - skipped_before == step - self.window_step
        ):
            raise FloatingPointError(
                f"the loss is {loss} at step {step}, its gradients are not finite: "
                "lower optimizer.lr or trainer.gradient_clip"
            )
        tokens_per_s = (step - self.window_step) * self.tokens_per_step / seconds
        efficiency = {
            name: mfu(flops, tokens_per_s, self.peak_flops)
            for name, flops in self.flops_per_token.items()
        }
        metrics = {
            "loss": loss,
            "train_bits_per_byte": bits_per_byte(loss, self.split),
            "lr": self.lr,
            "tokens_per_s": round(tokens_per_s, 1),
            "data_share": round(self.loader_clock.seconds / seconds, 4),
            "memory_bytes": self._memory_bytes(),
            **{name: round(value, 4) for name, value in efficiency.items() if value is not None},
            **figures,
        }
        self.record(trainer, metrics)
        self.progress.figures(
            self._standing(trainer),
            f"loss {loss:.4f}  lr {self.lr:.2e}  {tokens_per_s:,.0f} tokens/s",
        )
        self._open_window(trainer)

    def _read(self, trainer: L.Trainer) -> tuple[float, dict[str, float]]:
        """Loss over all devices, norms and skipped steps by name.

        Waits for the device, once, so that the time that has passed then is that of work done.
        """
        total, number = trainer.strategy.reduce(self.losses, reduce_op="sum")
        assert isinstance(trainer.lightning_module, TrainingModule)
        skipped = trainer.lightning_module.skipped_steps
        by_kind = torch.stack(self.gradient_norms)
        weights = [norm(each, self.device) for each in self.kinds.values()]
        read = torch.stack([total / number, skipped, by_kind.norm(), *by_kind, *weights]).tolist()
        return read[0], dict(zip(self._figure_names(), read[1:], strict=True))

    def _figure_names(self) -> list[str]:
        """Of what `_read` reads after the loss."""
        per_kind = [f"{of}_norm/{kind}" for of in ("gradient", "weight") for kind in self.kinds]
        return ["skipped_steps", "gradient_norm", *per_kind]

    def _memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import psutil

        return psutil.Process().memory_info().rss

    def _standing(self, trainer: L.Trainer) -> Standing:
        return Standing(
            trainer.global_step,
            trainer.max_steps,
            self.timer.time_elapsed("train"),
            self.timer.time_remaining("train"),
        )
