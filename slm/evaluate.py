"""How good a trained model is, on a text or in tasks of lm-evaluation-harness.

python -m slm.evaluate model=runs/train
python -m slm.evaluate model=runs/train tasks=cloze,continuation
python -m slm.evaluate model=runs/train tasks=piqa,arc_easy
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field
from tokenizers import Tokenizer

from slm.config import ConfigError, entry_point, read, schema
from slm.data.build import prepare
from slm.data.choices import texts
from slm.data.config import DataConfig, TokenizerConfig
from slm.data.corpus import open_source
from slm.data.tokenizer import load_tokenizer
from slm.evaluation_results import (
    EVALUATION_FILE,
    Figure,
    Result,
    add_results,
    is_of,
    is_result_file,
    results_table,
)
from slm.harness import answering, exported_model, run_tasks, task_problems
from slm.hub.loading import CONFIG_FILE, load_model_and_tokenizer
from slm.hub.weights import weights_files
from slm.kernels.backend import set_backend
from slm.model import LanguageModel
from slm.perplexity import perplexity
from slm.runtime import RuntimeConfig
from slm.tasks import TASKS, write_tasks
from slm.training.checkpoint import LAST_CHECKPOINT, checkpoint_file

Positive = Annotated[int, Field(gt=0)]


@schema
class EvaluateConfig(RuntimeConfig):
    """What `configs/evaluate.yaml` holds; its comments say what each field is."""

    checkpoint: Path
    data: DataConfig
    tokenizer: TokenizerConfig
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    harness: Literal["decoder", "hf"] = "decoder"
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    task_items: Positive = 1000
    split: Literal["validation", "all"] = "validation"
    limit: Positive | None = None
    batch_size: Positive = 16
    context_tokens: Positive | None = 1024
    stride_tokens: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    out: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        problems = []
        missing = [file for file in self.weights if not file.exists()]
        if missing:
            problems.append(f"model: '{self.checkpoint}': there is no model, no '{missing[0]}'")
        elif self.harness == "hf" and not self.is_export:
            problems.append(
                f"harness: 'hf' runs an export, and '{self.checkpoint}' is none: "
                f"python -m slm.hub.export checkpoint={self.checkpoint}"
            )
        if self.harness == "hf" and not self.tasks:
            problems.append("harness: 'hf' runs tasks, and there are none: tasks=cloze")
        if self.stride_tokens is not None and self.stride_tokens > (self.context_tokens or 0):
            problems.append(
                f"stride_tokens: must be <= context_tokens={self.context_tokens}, "
                f"got {self.stride_tokens}"
            )
        if self.result_file.exists() and not is_result_file(self.result_file):
            problems.append(f"out: '{self.result_file}' exists and holds no results")
        elif self.out is not None and not missing and not is_of(self.out, self.weights):
            problems.append(f"out: '{self.out}' holds results of other weights")
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("device: 'cuda': there is no GPU")
        if self.task_folder is not None and not self.task_folder.is_dir():
            problems.append(f"task_folder: '{self.task_folder}': there is no such folder")
        elif self.tasks:
            problems += task_problems(self.tasks, self.task_folder)
        if problems:
            raise ConfigError(problems)

    @property
    def device_type(self) -> str:
        """'cuda' or 'cpu': where the model runs."""
        return super().device_type if self.device == "auto" else self.device

    @property
    def is_export(self) -> bool:
        """Whether the model is an export."""
        return (self.checkpoint / CONFIG_FILE).is_file()

    @property
    def weights(self) -> list[Path]:
        """What holds the model's weights."""
        if self.is_export:
            return weights_files(self.checkpoint)
        return [checkpoint_file(self.checkpoint)]

    @property
    def result_file(self) -> Path:
        """Where results are added to."""
        if self.out is not None:
            return self.out
        if self.is_export:
            return self.checkpoint / EVALUATION_FILE
        # That of the last checkpoint is the run's; others have files of their own.
        weights, file = self.weights[0], Path(EVALUATION_FILE)
        if weights.name != LAST_CHECKPOINT.name:
            file = file.with_stem(f"{file.stem}-{weights.stem}")
        return weights.parent.parent / file

    @property
    def text(self) -> str:
        """What the text is called in results."""
        data = self.data
        parts = {
            "text": [*data.files],
            "hub": [str(data.repository), *filter(None, [data.subset])],
            "mixture": [*data.components],
        }
        return " ".join(parts.get(data.source, [data.source]))

    @property
    def stride(self) -> int | None:
        """By how much a window moves on."""
        if self.stride_tokens is None and self.context_tokens is not None:
            return max(1, self.context_tokens // 2)
        return self.stride_tokens


def evaluate(config: EvaluateConfig) -> dict[str, Result]:
    """Results by task, which are added to the file as well."""
    set_backend(config.backend)
    results = _in_tasks(config) if config.tasks else _on_text(config)
    add_results(config.result_file, config.checkpoint, config.weights, results)
    return results


def _on_text(config: EvaluateConfig) -> dict[str, Result]:
    """Bits per byte, perplexity and loss."""
    model, tokenizer, _ = _load(config)
    documents = islice(_documents(config), config.limit)
    try:
        found = perplexity(
            model, tokenizer, documents, config.batch_size, config.context_tokens, config.stride
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    figures = {
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity,
        "nats_per_token": found.loss,
    }
    result = Result(
        metrics={
            name: Figure(each.value, low=each.low, high=each.high) for name, each in figures.items()
        },
        n=found.num_documents,
        settings={
            "context_tokens": config.context_tokens,
            "stride_tokens": config.stride,
            "limit": config.limit,
            "tokens": found.num_tokens,
            "bytes": found.num_bytes,
        },
        seed=config.seed,
    )
    return {f"{config.text} ({config.split})": result}


def _in_tasks(config: EvaluateConfig) -> dict[str, Result]:
    """What lm-eval measures."""
    arguments = (config.batch_size, config.context_tokens)
    if config.harness == "hf":
        model = exported_model(config.checkpoint, config.device_type, *arguments)
    else:
        model = answering(*_load(config), *arguments)
    folders = [config.task_folder] if config.task_folder is not None else []
    if own := [name for name in config.tasks if name in TASKS]:
        corpus = prepare(config.data, config.tokenizer, progress=_say)
        folders.append(
            write_tasks(corpus, own, config.data.cache_dir, config.task_items, config.seed)
        )
    settings = {
        "harness": config.harness,
        "context_tokens": config.context_tokens,
        "num_fewshot": config.num_fewshot,
        "limit": config.limit,
    }
    results = run_tasks(model, config.tasks, folders, settings, config.seed)
    made = {"text": config.text, "task_items": config.task_items}
    for name in own:
        results[name] = replace(results[name], settings=settings | made)
    return results


def _load(config: EvaluateConfig) -> tuple[LanguageModel, Tokenizer, list[int]]:
    """The model, where it is to run, its tokenizer, and the tokens that end a text."""
    model, tokenizer, stops = load_model_and_tokenizer(config.checkpoint)
    return model.to(config.device_type), tokenizer, stops


def _documents(config: EvaluateConfig) -> Iterator[str]:
    """The text to score."""
    if config.split == "all":
        return open_source(config.data).documents()
    corpus = prepare(config.data, config.tokenizer, progress=_say)
    return texts(corpus.validation, load_tokenizer(corpus.tokenizer_path))


def _say(text: str) -> None:
    """Beside the results, which are printed."""
    print(text, file=sys.stderr, flush=True)


def _check(config: DictConfig) -> EvaluateConfig:
    return read(EvaluateConfig, config)


@entry_point("evaluate", _check)
def _program(config: DictConfig) -> None:
    from rich.console import Console

    settings = _check(config)
    Console().print(results_table(evaluate(settings)))
    print(f"{settings.result_file}: added")


def as_hydra_wants(argument: str) -> str:
    """What a person types, as Hydra takes it.

    To Hydra `model` is a group of configs, and several names behind commas are several runs.
    """
    name, equals, value = argument.partition("=")
    if equals and name == "model":
        return f"checkpoint={value}"
    if equals and name == "tasks" and not value.startswith("["):
        return f"tasks=[{value}]"
    return argument


def main() -> None:
    """Evaluate, print a table, and add the results to the model's file."""
    sys.argv[1:] = [as_hydra_wants(argument) for argument in sys.argv[1:]]
    _program()


if __name__ == "__main__":
    main()
