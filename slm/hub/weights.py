"""Weights of a folder: safetensors, in one file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from slm.config import ConfigError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights, in shards where they are more than 5 GB."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(weights), folder, max_shard_size=MAX_SHARD_SIZE)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, by name; raises ConfigError naming what is missing or damaged.

    Only safetensors are read: other files of weights are pickles, which can run code.
    """
    weights: dict[str, Tensor] = {}
    for file in weights_files(folder):
        weights |= _read_file(file)
    return weights


def weights_files(folder: Path) -> list[Path]:
    """The files of a folder's weights; raises ConfigError naming an index that is damaged."""
    index, whole = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError([f"weights '{index}': is damaged"]) from None
    # An index that comes from elsewhere must not lead out of its folder.
    outside = [name for name in names if Path(str(name)).name != name]
    if outside:
        raise ConfigError([f"weights '{index}': {name!r} is no file's name" for name in outside])
    return [folder / name for name in names]


def _read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        pickles = sorted(path.name for path in file.parent.glob("*.bin"))
        hint = f"; '{pickles[0]}' is a pickle, which is not read" if pickles else ""
        raise ConfigError([f"weights '{file}': no such file{hint}"])
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"weights '{file}': cannot be read: {reason}"]) from None
