"""What `python train.py` is configured by: `configs/train.yaml`, typed."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import Field

from slm.config import ConfigError, read, schema
from slm.data.config import DataConfig, TokenizerConfig
from slm.model_config import ModelConfig
from slm.plugins import plugin_digests
from slm.runtime import RuntimeConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


@schema
class OptimizerConfig:
    """Optimizer, learning-rate schedule and weight normalization.

    lr: peak learning rate, reached after `warmup_steps` and followed by a cosine that ends at
        lr · min_lr_ratio.
    weight_decay: of matrices only.
    weight_norm: project matrices to unit norm after each step; see `slm.weight_norm`.
    """

    name: Literal["adamw", "adam"] = "adamw"
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Fraction = 0.1
    weight_norm: bool = False

    def __post_init__(self) -> None:
        if self.weight_decay and (self.name == "adam" or self.weight_norm):
            cause = "weight_norm" if self.weight_norm else "adam"
            raise ConfigError([f"weight_decay: must be 0 with {cause}, got {self.weight_decay}"])


@schema
class TrainerConfig:
    """How long, how much at a time, and on what.

    max_steps: optimizer steps.
    max_seconds: if given, training ends after so many seconds and the cosine follows whichever of
        the two is nearer its end; such a run cannot be repeated bit for bit.
    batch_size, sequence_tokens: sequences of one forward pass on one device; tokens of each.
    accumulate: forward passes of one optimizer step.
    gradient_clip: largest norm of the gradient; None: no clipping.
    validation_tokens: tokens of the validation split to use; None: all.
    precision: auto computes in bfloat16 where the device does so fast; weights stay in float32.
    samples, sample_tokens: how many texts the model goes on with at each validation, and by how
        many tokens; 0: none.
    threads: CPU threads; None leaves torch's choice.
    """

    max_steps: Positive
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 16
    sequence_tokens: Positive = 256
    accumulate: Positive = 1
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    validate_every_steps: Positive = 200
    validation_tokens: Positive | None = None
    checkpoint_every_steps: Positive = 200
    log_every_steps: Positive = 10
    samples: Positive = 2
    sample_tokens: Annotated[int, Field(ge=0)] = 64
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Positive = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Positive | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all devices."""
        return self.batch_size * self.sequence_tokens * self.accumulate * self.devices


@schema
class LoggerConfig:
    """Where metrics go besides `metrics.csv`; the other fields are Weights & Biases' own."""

    name: Literal["csv", "wandb", "tensorboard"] = "csv"
    project: str = "slm-frontier"
    entity: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        if self.name == "tensorboard" and find_spec("tensorboard") is None:
            raise ConfigError(["name: 'tensorboard' needs `pip install slm-frontier[tensorboard]`"])


@schema
class TrainConfig(RuntimeConfig):
    """One training run.

    name: names the run's folder.
    init_from: checkpoint, or run folder, whose weights training starts from.
    resume: 'auto' goes on from the run folder's last checkpoint; 'never' starts afresh.
    """

    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    name: str = "train"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    init_from: Path | None = None
    resume: Literal["auto", "never"] = "auto"

    @property
    def device_type(self) -> str:
        """'cuda' or 'cpu': where the model runs."""
        chosen = self.trainer.accelerator
        return super().device_type if chosen == "auto" else chosen

    def identity(self) -> dict[str, Any]:
        """What decides the weights, flat: {'optimizer.lr': 0.001, …}.

        A run may only be continued under the same identity.
        """
        decisive = ("model", "data", "tokenizer", "optimizer", "seed", "init_from")
        decisive_trainer = (
            "max_steps",
            "max_seconds",
            "batch_size",
            "sequence_tokens",
            "accumulate",
            "gradient_clip",
            "devices",
            "precision",
        )
        values = dataclasses.asdict(self)
        kept = {key: values[key] for key in decisive}
        kept["trainer"] = {key: values["trainer"][key] for key in decisive_trainer}
        # Where prepared data lies decides nothing.
        kept["data"].pop("cache_dir", None)
        kept["plugins"] = plugin_digests()
        return _flatten(kept)


def read_config(config: DictConfig) -> TrainConfig:
    """Build and check a composed config; raises ConfigError with every problem."""
    result = read(TrainConfig, config)
    if result.init_from is not None and not result.init_from.exists():
        raise ConfigError([f"init_from: '{result.init_from}' does not exist"])
    return result


def _flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{path}{key}.")
        elif isinstance(value, tuple | list):
            flat[path + key] = [str(item) if isinstance(item, Path) else item for item in value]
        else:
            flat[path + key] = str(value) if isinstance(value, Path) else value
    return flat
