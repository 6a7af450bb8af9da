"""Loading a trained model from whatever it was written to."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from slm.architecture import Architecture
from slm.config import ConfigError
from slm.model import LanguageModel
from slm.training.checkpoint import MODEL_PREFIX, TOKENIZER_FILE, load_checkpoint

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def load_model(path: str | Path) -> tuple[LanguageModel, Path]:
    """The model at `path`, on the CPU in evaluation mode, and its tokenizer's file.

    `path` is a checkpoint, a run's folder or an export. Raises ConfigError naming it if it is none
    of them.
    """
    path = Path(path)
    return load_export(path) if (path / CONFIG_FILE).is_file() else load_checkpoint(path)


def load_export(folder: Path) -> tuple[LanguageModel, Path]:
    """As `load_model`, from an export; without the code that lies in it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        architecture = Architecture.parse(config["architecture"])
        weights = load_file(folder / WEIGHTS_FILE)
        with torch.device("meta"):
            model = LanguageModel(architecture)
        named = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in weights.items()}
        model.load_state_dict(named, assign=True)
    except KeyError:
        raise ConfigError([f"export '{folder}': {CONFIG_FILE} holds no architecture"]) from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"export '{folder}': does not hold a model: {reason}"]) from None
    return model.eval(), folder / TOKENIZER_FILE
