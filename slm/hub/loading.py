"""Loading a trained model from whatever it was written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from slm.architecture import Architecture
from slm.config import ConfigError
from slm.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size
from slm.hub import nemotron_flash
from slm.hub.weights import read_weights
from slm.model import LanguageModel
from slm.training.checkpoint import MODEL_PREFIX, TOKENIZER_FILE, load_checkpoint

CONFIG_FILE = "config.json"


def load_model(path: str | Path) -> tuple[LanguageModel, Path]:
    """The model at `path`, on the CPU in evaluation mode, and its tokenizer's file.

    `path` is a checkpoint, a run's folder, an export or a folder in the layout of Nemotron-Flash.
    Raises ConfigError naming it if it is none of them.
    """
    path = Path(path)
    try:
        return load_folder(path) if (path / CONFIG_FILE).is_file() else load_checkpoint(path)
    except OSError as error:
        raise ConfigError([f"'{path}' cannot be read: {error}"]) from None


def load_model_and_tokenizer(path: str | Path) -> tuple[LanguageModel, Tokenizer, list[int]]:
    """As `load_model`; the tokenizer itself, and the ids of the tokens that end a text."""
    model, tokenizer_file = load_model(path)
    try:
        tokenizer = load_tokenizer(tokenizer_file)
        stops = stop_tokens(tokenizer_file, tokenizer)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    known = model.architecture.vocab_size
    if vocabulary_size(tokenizer) > known or max(stops) >= known:
        raise ConfigError(
            [
                f"{tokenizer_file}: has {vocabulary_size(tokenizer)} tokens and ends texts by "
                f"{stops}, the model knows {known}"
            ]
        )
    return model, tokenizer, stops


def load_folder(folder: Path) -> tuple[LanguageModel, Path]:
    """As `load_model`, from a folder with a config.json; without the code that may lie in it."""
    config = read_folder_config(folder)
    is_theirs = nemotron_flash.is_layout(config)
    if not is_theirs and "architecture" not in config:
        kind = config.get("model_type")
        raise ConfigError(
            [f"'{folder}': {CONFIG_FILE} holds no architecture; model_type {kind!r} is not known"]
        )
    read = nemotron_flash.read_model if is_theirs else _read_export
    weights = read_weights(folder)
    try:
        model = read(config, weights)
    except ConfigError as error:
        raise ConfigError([f"'{folder}': {problem}" for problem in error.problems]) from None
    except (AttributeError, OverflowError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines())
        raise ConfigError([f"'{folder}': does not hold a model: {reason}"]) from None
    return model, folder / TOKENIZER_FILE


def stop_tokens(tokenizer_file: Path, tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that end a text of the model beside which a tokenizer's file lies.

    A folder with a config.json says which; a run's tokenizer puts it before every text. Raises
    ValueError if neither gives a token.
    """
    folder = tokenizer_file.parent
    config = read_folder_config(folder) if (folder / CONFIG_FILE).is_file() else {}
    given = config.get("eos_token_id")
    if given is None:
        return [end_of_text_id(tokenizer)]
    ids = given if isinstance(given, list) else [given]
    if not ids or not all(type(each) is int and each >= 0 for each in ids):
        raise ValueError(f"{folder / CONFIG_FILE}: eos_token_id: must be ids, got {given!r}")
    return ids


def read_folder_config(folder: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """A folder's config.json, or another such file; raises ConfigError, naming it, if damaged."""
    file = folder / name
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"config '{file}': cannot be read: {reason}"]) from None
    if not isinstance(config, dict):
        raise ConfigError([f"config '{file}': must be an object"])
    return config


def _read_export(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LanguageModel:
    """The model of an export's config.json and weights."""
    architecture = Architecture.parse(str(config["architecture"]))
    with torch.device("meta"):
        model = LanguageModel(architecture)
    named = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in weights.items()}
    model.load_state_dict(named, assign=True)
    return model.eval()
