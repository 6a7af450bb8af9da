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
from slm.training.sweep import sweep_problems

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


@schema
class OptimizerConfig:
    """Optimizer, learning-rate schedule and weight normalization.

    name: 'muon' orthogonalises the updates of the operators' matrices and leaves the rest to AdamW,
        for which lr, betas, eps and weight_decay hold; its updates are scaled to AdamW's size, so
        that the same lr and weight_decay serve both.
    lr: peak learning rate, reached after the warm-up.
    weight_decay: of matrices only.
    momentum: of Muon.
    warmup_steps, warmup_tokens: length of the linear warm-up, in one or the other.
    schedule: 'cosine' ends at lr · min_lr_ratio; 'wsd' stays at lr and falls to there on a line
        over the last `decay_share` of training; 'constant' stays at lr.
    weight_norm: project matrices to unit norm after each step; see `slm.weight_norm`.
    weight_norm_embeddings: also the rows of embedding and head.
    """

    name: Literal["adamw", "adam", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_tokens: Annotated[int, Field(ge=0)] = 0
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    min_lr_ratio: Fraction = 0.1
    weight_norm: bool = False
    weight_norm_embeddings: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.weight_decay and (self.name == "adam" or self.weight_norm):
            cause = "weight_norm" if self.weight_norm else "adam"
            problems.append(f"weight_decay: must be 0 with {cause}, got {self.weight_decay}")
        if self.warmup_steps and self.warmup_tokens:
            problems.append(
                f"warmup_tokens: must be 0 where warmup_steps is {self.warmup_steps}, "
                f"got {self.warmup_tokens}"
            )
        if self.weight_norm_embeddings and not self.weight_norm:
            problems.append("weight_norm_embeddings: needs weight_norm=true, got true")
        if problems:
            raise ConfigError(problems)


@schema
class TrainerConfig:
    """How long, how much at a time, and on what.

    max_steps: optimizer steps.
    max_seconds: if given, training ends after so many seconds and the schedule follows whichever of
        the two is nearer its end; such a run cannot be repeated bit for bit.
    batch_tokens: tokens of one optimizer step, over all devices.
    sequence_tokens: tokens of one sequence.
    micro_batch_size: sequences of one forward pass on one device, as many as its memory holds;
        gradients of several are added up to a step's. None: all of a step's at once.
    gradient_clip: largest norm of the gradient; None: no clipping.
    validation_tokens: tokens of the validation split to use; None: all.
    devices: of this machine.
    strategy: of several devices: 'ddp' keeps the whole model on each, 'fsdp' shares weights,
        gradients and optimizer out over them (FSDP2).
    precision: auto computes in bfloat16 where the device does so fast; weights stay in float32.
    compile: layer by layer, by torch.compile.
    activation_checkpointing: keep only what is between layers for the backward pass and compute
        the rest anew, for memory.
    loader_workers: processes that read batches; 0: the training process itself.
    samples, sample_tokens: how many texts the model goes on with at each validation, and by how
        many tokens; 0: none.
    threads: CPU threads; None leaves torch's choice.
    """

    max_steps: Positive
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    batch_tokens: Positive = 4096
    sequence_tokens: Positive = 256
    micro_batch_size: Positive | None = None
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    validate_every_steps: Positive = 200
    validation_tokens: Positive | None = None
    checkpoint_every_steps: Positive = 200
    log_every_steps: Positive = 10
    samples: Positive = 2
    sample_tokens: Annotated[int, Field(ge=0)] = 64
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Positive = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    loader_workers: Annotated[int, Field(ge=0)] = 0
    threads: Positive | None = None

    def __post_init__(self) -> None:
        problems = []
        per_sequence = self.sequence_tokens * self.devices
        if self.batch_tokens % per_sequence:
            problems.append(
                f"batch_tokens: must be a multiple of sequence_tokens x devices = {per_sequence}, "
                f"got {self.batch_tokens}"
            )
        elif self.sequences_per_step % self.batch_size:
            problems.append(
                f"micro_batch_size: must divide the {self.sequences_per_step} sequences of one "
                f"step on one device, got {self.micro_batch_size}"
            )
        if self.strategy == "fsdp" and self.devices == 1:
            problems.append("strategy: fsdp shares a model out over devices, got devices=1")
        if problems:
            raise ConfigError(problems)

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step on one device."""
        return self.batch_tokens // (self.sequence_tokens * self.devices)

    @property
    def batch_size(self) -> int:
        """Sequences of one forward pass on one device."""
        return self.micro_batch_size or self.sequences_per_step

    @property
    def accumulate(self) -> int:
        """Forward passes of one optimizer step."""
        return self.sequences_per_step // self.batch_size


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
            "batch_tokens",
            "sequence_tokens",
            "micro_batch_size",
            "gradient_clip",
            "devices",
            "strategy",
            "precision",
            "compile",
            "loader_workers",
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
    problems = sweep_problems(result.trainer.devices)
    if result.init_from is not None and not result.init_from.exists():
        problems.append(f"init_from: '{result.init_from}' does not exist")
    if problems:
        raise ConfigError(problems)
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
