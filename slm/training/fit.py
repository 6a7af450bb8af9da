"""One training run, from its config to `result.json`; stopped, it goes on where it was.

runs/<name>/
    checkpoints/last.ckpt   weights, optimizer, data position; previous.ckpt is the one before
    metrics.csv             one row per log step and per validation
    samples.jsonl           what the model writes, at each validation
    result.json             written last: a run that has it is finished
    tokenizer.json
    wandb_id                the run's id in Weights & Biases, with which a resumed run goes on
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_only

from slm.config import ConfigError
from slm.data import PackedCorpus, prepare
from slm.data.datamodule import PackedDataModule
from slm.data.dataset import PackedDataset
from slm.kernels.backend import set_backend
from slm.model import LanguageModel
from slm.training import kept_checkpoints
from slm.training.callbacks import Checkpoints, Validation
from slm.training.checkpoint import (
    LAST_CHECKPOINT,
    TOKENIZER_FILE,
    load_checkpoint,
)
from slm.training.config import TrainConfig, TrainerConfig
from slm.training.files import alone, write_atomically
from slm.training.loggers import METRICS_FILE, TENSORBOARD_DIR, WANDB_ID_FILE, open_loggers
from slm.training.metrics import Metrics
from slm.training.module import TrainingModule
from slm.training.samples import SAMPLES_FILE, Samples

RESULT_FILE = "result.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run gave.

    architecture, digest: canonical text, and its digest. seconds: of training and validation.
    validation_loss: nats per token. config: what decides the weights (`TrainConfig.identity`).
    """

    architecture: str
    digest: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    validation_loss: float
    bits_per_byte: float
    config: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """The numbers alone."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if isinstance(value, int | float)}


def fit(config: TrainConfig, run_dir: Path) -> TrainResult:
    """Train, or go on training, in `run_dir`; a finished run is not trained again.

    Raises ConfigError if `run_dir` holds another run, if another command trains there at the
    moment, or if a checkpoint cannot be read.
    """
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    with alone(run_dir) if is_first else nullcontext():
        return _fit(config, run_dir, is_first)


def _fit(config: TrainConfig, run_dir: Path, is_first: bool) -> TrainResult:
    folder = run_dir / LAST_CHECKPOINT.parent
    checkpoint, resumed_step = None, 0
    if config.resume == "auto":
        finished = _finished(config, run_dir / RESULT_FILE)
        if finished is not None:
            print(f"{run_dir} is finished; resume=never trains it again")
            return finished
        checkpoint, resumed_step = _resumable(config, folder)

    corpus = prepare(config.data, config.tokenizer, progress=print)
    _check_lengths(config, corpus)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    set_backend(config.backend)
    model = _build_model(config, corpus)
    if is_first:
        if config.resume == "never":
            _forget(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            kept_checkpoints.set_aside(folder, checkpoint)
        shutil.copyfile(corpus.tokenizer_path, run_dir / TOKENIZER_FILE)
    return _train(config, run_dir, corpus, model, checkpoint, resumed_step)


def _train(
    config: TrainConfig,
    run_dir: Path,
    corpus: PackedCorpus,
    model: LanguageModel,
    checkpoint: Path | None,
    resumed_step: int,
) -> TrainResult:
    """Train `model`, from `checkpoint` on if there is one, and write the result."""
    settings = config.trainer
    budget = None if settings.max_seconds is None else timedelta(seconds=settings.max_seconds)
    timer = Timer(duration=budget, verbose=False)
    metrics = Metrics(
        settings.log_every_steps,
        settings.batch_tokens,
        settings.sequence_tokens,
        corpus.train,
        timer,
    )
    validation = Validation(
        corpus.validation,
        settings.sequence_tokens,
        settings.batch_size,
        settings.validation_tokens,
        settings.validate_every_steps,
        metrics,
    )
    samples = Samples(
        run_dir / SAMPLES_FILE,
        corpus,
        settings.samples,
        settings.sample_tokens,
        validation,
        metrics,
    )
    checkpoints = Checkpoints(
        run_dir / LAST_CHECKPOINT.parent, settings.checkpoint_every_steps, metrics
    )
    # A checkpoint keeps what was found at its step.
    callbacks = [timer, metrics, validation, samples, checkpoints]

    def time_used() -> float:
        return 0.0 if budget is None else timer.time_elapsed("train") / budget.total_seconds()

    module = TrainingModule(model, settings, config.optimizer, time_used, config.identity())
    data = PackedDataModule(
        corpus,
        sequence_tokens=settings.sequence_tokens,
        batch_size=settings.batch_size,
        seed=config.seed,
        num_workers=settings.loader_workers,
    )
    with _quiet(), open_loggers(config, run_dir, resumed_step) as loggers:
        trainer = _trainer(config, callbacks, loggers, metrics.loader_clock)
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:
            # Lightning turns Ctrl-C into an exit of its own.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    result = TrainResult(
        architecture=str(model.architecture),
        digest=model.architecture.digest,
        parameters=model.architecture.parameters(),
        steps=trainer.global_step,
        tokens=trainer.global_step * settings.batch_tokens,
        seconds=round(timer.time_elapsed("train"), 3),
        validation_loss=validation.loss,
        bits_per_byte=validation.bits_per_byte,
        config=config.identity(),
    )
    if trainer.is_global_zero:
        _write(result, run_dir)
    return result


def _write(result: TrainResult, run_dir: Path) -> None:
    text = json.dumps(dataclasses.asdict(result), indent=2)
    write_atomically(run_dir / RESULT_FILE, text + "\n")
    print(
        f"validation loss {result.validation_loss:.4f}, {result.bits_per_byte:.4f} bits per "
        f"byte after {result.tokens:,} tokens in {result.seconds:.0f} s"
    )


def _check_lengths(config: TrainConfig, corpus: PackedCorpus) -> None:
    """Raise ConfigError if a split is shorter than a row."""
    problems = []
    for split in (corpus.train, corpus.validation):
        try:
            PackedDataset(split, config.trainer.sequence_tokens)
        except ConfigError as error:
            problems += [f"trainer.{problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def _build_model(config: TrainConfig, corpus: PackedCorpus) -> LanguageModel:
    """The model with its first weights: drawn from the seed, or those of `init_from`."""
    architecture = config.model.architecture(corpus.vocab_size)
    if config.init_from is None:
        torch.manual_seed(config.seed)
        return LanguageModel(architecture)
    model, tokenizer_file = load_checkpoint(config.init_from)
    if model.architecture != architecture:
        raise ConfigError(
            [f"init_from: '{config.init_from}' holds '{model.architecture}', not '{architecture}'"]
        )
    if tokenizer_file.is_file() and (
        tokenizer_file.read_bytes() != corpus.tokenizer_path.read_bytes()
    ):
        raise ConfigError([f"init_from: '{config.init_from}' was trained with another tokenizer"])
    return model.train()


def _trainer(
    config: TrainConfig, callbacks: list[L.Callback], loggers: list[Logger], profiler: Profiler
) -> Any:
    settings = config.trainer
    if config.device_type == "cuda":
        # TF32 for what is left in float32.
        torch.set_float32_matmul_precision("high")
    return L.Trainer(
        accelerator=config.device_type,
        devices=settings.devices,
        strategy=_strategy(settings),
        plugins=_cluster(),
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        callbacks=callbacks,
        logger=loggers,
        profiler=profiler,
        # `Validation` and `Checkpoints` do these between two steps, `Metrics` shows the progress.
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _cluster() -> Any:
    """Where Slurm has started the processes: that Lightning is not to queue the job again.

    It would write a checkpoint of its own and go on from that; `slm.slurm` goes on from ours.
    """
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    return SLURMEnvironment(auto_requeue=False)


def _strategy(settings: TrainerConfig) -> Any:
    """What Lightning calls the way in which devices share the work."""
    if settings.devices == 1:
        return "auto"
    if settings.strategy == "ddp":
        return "ddp"
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=settings.devices, tensor_parallel_size=1)


def _finished(config: TrainConfig, result_file: Path) -> TrainResult | None:
    """The result of a run that is finished."""
    if not result_file.exists():
        return None
    try:
        result = TrainResult(**json.loads(result_file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ConfigError([f"'{result_file}': is damaged; resume=never starts afresh"]) from None
    _refuse_other_run(config, result.config, result_file.parent)
    return result


def _resumable(config: TrainConfig, folder: Path) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and its step; None and 0 if there is none."""
    found = kept_checkpoints.newest(folder)
    if found is None:
        return None, 0
    checkpoint, content = found
    identity = content.get("hyper_parameters", {}).get("identity", {})
    _refuse_other_run(config, identity, folder.parent)
    return checkpoint, content["global_step"]


def _refuse_other_run(config: TrainConfig, there: dict[str, Any], run_dir: Path) -> None:
    """Raise ConfigError if a run's folder was begun under another config."""
    # As JSON has it: lists for tuples.
    here = json.loads(json.dumps(config.identity()))
    there = json.loads(json.dumps(there))
    problems = [
        f"{key}: '{run_dir}' was begun with {there.get(key)!r}, not {here.get(key)!r}; "
        "give the run another name=, or resume=never"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    if problems:
        raise ConfigError(problems)


def _forget(run_dir: Path) -> None:
    """Remove what a run has written; its result first, so that no half of it looks finished."""
    (run_dir / RESULT_FILE).unlink(missing_ok=True)
    kept_checkpoints.forget(run_dir / LAST_CHECKPOINT.parent)
    for name in (METRICS_FILE, SAMPLES_FILE, WANDB_ID_FILE):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / TENSORBOARD_DIR, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's banners, and warnings that call for nothing to be done."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                # Rows of a memory map need no workers; validation is a callback's.
                ".*does not have many workers.*",
                ".*have no `validation_step`.*",
                # Of Lightning and torchdata about themselves.
                ".*treespec, LeafSpec.*",
                ".*'set_vital' is deprecated.*",
                # Where Slurm is installed and not used.
                ".*`srun` command is available.*",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)
