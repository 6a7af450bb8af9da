"""The LightningModule: a thin shell around the language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from slm.model import LanguageModel
from slm.training.config import OptimizerConfig, TrainerConfig
from slm.training.guard import clip_and_guard
from slm.training.loss import next_token_loss
from slm.training.optimizer import build_optimizer
from slm.training.precision import autocast
from slm.training.wrapping import wrap_layers


class TrainingModule(L.LightningModule):
    """Trains `model` on next-token prediction.

    time_used gives the fraction of the time budget that is used up; None: there is no budget.
    identity is stored in checkpoints, to tell whether a run may go on from one.
    The model is held as `model`, so that a checkpoint's weights are named `model.*`.

    skipped_steps: how many steps were left out since gradients were not finite, on the device.
    """

    skipped_steps: Tensor

    def __init__(
        self,
        model: LanguageModel,
        trainer_config: TrainerConfig,
        optimizer_config: OptimizerConfig,
        time_used: Callable[[], float] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.trainer_config = trainer_config
        self.optimizer_config = optimizer_config
        self.time_used = time_used
        self.identity = identity or {}
        self.register_buffer("skipped_steps", torch.zeros(()), persistent=False)
        self._is_wrapped = False

    def configure_model(self) -> None:
        """Compile and shard the layers, once."""
        if not self._is_wrapped:
            strategy, mesh = self.trainer.strategy, None
            if isinstance(strategy, ModelParallelStrategy):
                mesh = strategy.device_mesh["data_parallel"]
            wrap_layers(self.model, self.trainer_config, mesh)
            self._is_wrapped = True

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        return self.model(tokens, documents)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch; see `next_token_loss`."""
        # Lightning's own mixed precision would not clip the gradients of a fused optimizer.
        with autocast(self.device, self.trainer_config.precision):
            return next_token_loss(self.model, batch)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Between the backward pass and each optimizer step; see `clip_and_guard`."""
        is_finite = clip_and_guard(
            optimizer, list(self.model.parameters()), self.trainer_config.gradient_clip
        )
        self.skipped_steps += ~is_finite

    def configure_optimizers(self) -> Any:
        """Optimizer, and a schedule that advances with each of its steps."""
        config = self.trainer_config
        optimizer, scheduler = build_optimizer(
            self.model, self.optimizer_config, config.max_steps, config.batch_tokens, self.time_used
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the weights are of, in plain containers."""
        checkpoint["hyper_parameters"] = {
            "architecture": str(self.model.architecture),
            "identity": self.identity,
        }
