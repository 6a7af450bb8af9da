"""The LightningModule: a thin shell around the language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor

from slm.model import LanguageModel
from slm.training.config import OptimizerConfig
from slm.training.loss import next_token_loss
from slm.training.optimizer import build_optimizer
from slm.training.precision import Precision, autocast


class TrainingModule(L.LightningModule):
    """Trains `model` on next-token prediction.

    time_used gives the fraction of the time budget that is used up; None: there is no budget.
    identity is stored in checkpoints, to tell whether a run may go on from one.
    The model is held as `model`, so that a checkpoint's weights are named `model.*`.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: OptimizerConfig,
        max_steps: int,
        precision: Precision = "float32",
        time_used: Callable[[], float] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.max_steps = max_steps
        self.precision: Precision = precision
        self.time_used = time_used
        self.identity = identity or {}

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        return self.model(tokens, documents)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch; see `next_token_loss`."""
        # Lightning's own mixed precision would not clip the gradients of a fused optimizer.
        with autocast(self.device, self.precision):
            return next_token_loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        """Optimizer, and a schedule that advances with each of its steps."""
        optimizer, scheduler = build_optimizer(
            self.model, self.optimizer_config, self.max_steps, self.time_used
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the weights are of, in plain containers."""
        checkpoint["hyper_parameters"] = {
            "architecture": str(self.model.architecture),
            "identity": self.identity,
        }
