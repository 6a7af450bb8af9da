"""The proxy: a short training that stands in for a long one.

A bare loop, so that a candidate of a few million parameters costs seconds and not the start of a
framework. Every candidate sees the same batches in the same order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from search.worker import Report
from slm.config import ConfigError, schema
from slm.training.config import OptimizerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from slm.architecture import Architecture
    from slm.data import PackedCorpus, PackedSplit
    from slm.model import LanguageModel

# Steps between two points of the loss curve, where the device is waited for.
STEPS_PER_POINT = 10
Positive = Annotated[int, Field(gt=0)]


@schema
class ProxyConfig:
    """How candidates are trained and scored.

    rung_tokens: tokens to train on, one number per rung.
    batch_size, sequence_tokens: sequences of one step; tokens of each.
    validation_tokens: tokens of the validation split that the loss is taken over.
    precision: auto computes in bfloat16 where the device does so fast.
    time_limit_s: a candidate that trains longer has failed.
    """

    rung_tokens: tuple[Positive, ...]
    batch_size: Positive
    sequence_tokens: Positive
    validation_tokens: Positive
    time_limit_s: Annotated[float, Field(gt=0)]
    optimizer: OptimizerConfig
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        problems = []
        if len(self.rung_tokens) != 1:
            problems.append(f"rung_tokens: must be one number, got {list(self.rung_tokens)}")
        elif self.rung_tokens[0] < self.tokens_per_step:
            problems.append(
                f"rung_tokens: must be >= the {self.tokens_per_step} tokens of one step, "
                f"got {self.rung_tokens[0]}"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.sequence_tokens


@dataclass(frozen=True)
class ProxyResult:
    """What training a candidate gave.

    loss: on the validation subset, train_loss: mean of the last points of the curve; nats per
    token. loss_curve: (tokens, loss) pairs. seconds: of training alone.
    """

    loss: float
    train_loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    loss_curve: list[tuple[int, float]]


def train_proxy(
    architecture: Architecture,
    corpus: PackedCorpus,
    config: ProxyConfig,
    *,
    tokens: int,
    seed: int,
    report: Report = lambda _: None,
) -> tuple[LanguageModel, ProxyResult]:
    """Train on about `tokens` tokens, and score.

    The same arguments give the same weights on the same device with the same number of threads.
    Raises FloatingPointError when the loss is no longer finite.
    """
    import torch

    from latency.lock import device_lock
    from slm.evaluation import evaluate_loss
    from slm.model import LanguageModel
    from slm.training.optimizer import build_optimizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    model = LanguageModel(architecture).to(device)
    num_steps = max(1, tokens // config.tokens_per_step)
    optimizer, scheduler = build_optimizer(model, config.optimizer, num_steps)
    curve: list[tuple[int, float]] = []
    window: list[Tensor] = []
    batches = _batches(corpus.train, config, seed)
    start_s = time.monotonic()
    for step, batch in zip(range(1, num_steps + 1), batches, strict=False):
        # Shared: no latency is measured beside a step.
        with device_lock(exclusive=False):
            window.append(_step(model, batch, optimizer, config))
        scheduler.step()
        if step % STEPS_PER_POINT == 0 or step == num_steps:
            loss = torch.stack(window).mean().item()
            window.clear()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}")
            curve.append((step * config.tokens_per_step, loss))
            report({"share": step / num_steps, "loss": loss})
    seconds = time.monotonic() - start_s
    with device_lock(exclusive=False):
        loss = evaluate_loss(
            model,
            corpus.validation,
            config.sequence_tokens,
            config.batch_size,
            config.validation_tokens,
        )
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss is {loss}")
    num_tokens = num_steps * config.tokens_per_step
    last = [loss for _, loss in curve[-3:]]
    result = ProxyResult(
        loss, sum(last) / len(last), num_tokens, seconds, num_tokens / seconds, curve
    )
    return model, result


def _step(
    model: LanguageModel, batch: dict[str, Tensor], optimizer: Any, config: ProxyConfig
) -> Tensor:
    """One optimizer step; its loss, detached."""
    import torch

    from slm.training.loss import next_token_loss
    from slm.training.precision import autocast

    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with autocast(device, config.precision):
        loss = next_token_loss(model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    optimizer.step()
    return loss.detach()


def _batches(split: PackedSplit, config: ProxyConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches in random order, epoch after epoch, for ever."""
    import torch
    from torch.utils.data import default_collate

    from slm.data.dataset import PackedDataset

    dataset = PackedDataset(split, config.sequence_tokens)
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    while True:
        while len(rows) < config.batch_size:
            rows += torch.randperm(len(dataset), generator=generator).tolist()
        chosen, rows = rows[: config.batch_size], rows[config.batch_size :]
        yield default_collate([dataset[row] for row in chosen])
