"""Checkpoints: Lightning's files, read without running code from them.

Of a run whose weights are sharded they are folders, see `slm.training.sharded_checkpoint`.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from slm.architecture import Architecture
from slm.config import ConfigError
from slm.model import LanguageModel
from slm.training import sharded_checkpoint

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
TOKENIZER_FILE = "tokenizer.json"
# Prefix of the weights' names: the LightningModule holds the language model under this name.
MODEL_PREFIX = "model."


def load_checkpoint(path: str | Path) -> tuple[LanguageModel, Path]:
    """The model of a checkpoint, on the CPU in evaluation mode, and its tokenizer's file.

    `path` is a checkpoint or a run's folder. Raises ConfigError, naming the file, if it is not a
    whole checkpoint of this project.
    """
    file = checkpoint_file(path)
    checkpoint = read_checkpoint(file)
    try:
        architecture = Architecture.parse(checkpoint["hyper_parameters"]["architecture"])
        weights = {
            name.removeprefix(MODEL_PREFIX): tensor
            for name, tensor in checkpoint["state_dict"].items()
        }
        # Built without storage and then given the checkpoint's tensors: no second copy in memory.
        with torch.device("meta"):
            model = LanguageModel(architecture)
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"checkpoint '{file}': does not hold a model: {reason}"]) from None
    return model.eval(), file.parent.parent / TOKENIZER_FILE


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a checkpoint; raises ConfigError, naming it, if it is damaged.

    Of a sharded one without the optimizer.
    """
    if sharded_checkpoint.is_sharded(file):
        return sharded_checkpoint.read(file)
    if not file.is_file():
        raise ConfigError([f"checkpoint '{file}': no such file"])
    if not zipfile.is_zipfile(file):
        raise ConfigError([f"checkpoint '{file}': is truncated or no checkpoint"])
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"checkpoint '{file}': cannot be read: {reason}"]) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ConfigError([f"checkpoint '{file}': does not hold a model"])
    return content


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint meant by its own path, or by that of a run's folder."""
    path = Path(path)
    is_run = path.is_dir() and not sharded_checkpoint.is_sharded(path)
    return path / LAST_CHECKPOINT if is_run else path
