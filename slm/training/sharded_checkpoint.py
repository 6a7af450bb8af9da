"""Checkpoints of runs whose weights are sharded: folders, each process having written its part.

torch.distributed.checkpoint writes them, Lightning adds what is not a tensor, and a manifest holds
the size and checksum of every file; it is written last. A run goes on from one on any number of
devices. As a single file, without the optimizer, it is had by

python -m slm.training.sharded_checkpoint runs/<name>/checkpoints/last.ckpt model.ckpt
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from slm.config import EXIT_BAD_CONFIG, ConfigError

MANIFEST = "manifest.json"
# What Lightning and torch.distributed.checkpoint write beside the tensors.
META, INDEX = "meta.pt", ".metadata"
WEIGHTS = "state_dict"
# What an index is made of, besides number formats; a pickle that names anything else is not read.
INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
}


def is_sharded(path: Path) -> bool:
    """Whether a path is that of a sharded checkpoint, whole or not."""
    return (path / INDEX).exists() or (path / MANIFEST).exists()


def write_manifest(folder: Path) -> None:
    """Describe all files of a folder."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest = {path.name: _describe(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def check(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: all but weights and optimizer.

    Raises ConfigError, naming the file, if any is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError([f"checkpoint '{folder}': is not whole, {MANIFEST} is missing"]) from None
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file() or _describe(file) != expected:
            raise ConfigError([f"checkpoint '{file}': is missing or damaged"])
    content: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=True)
    return content


def read(folder: Path) -> dict[str, Any]:
    """A checkpoint without its optimizer, all of it in memory.

    Raises ConfigError, naming the file, if any is missing, damaged or of something else.
    """
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    content = check(folder)
    weights: dict[str, Any] = {}
    try:
        _load_state_dict(
            weights,
            storage_reader=_Reader(folder, _read_index(folder)),
            planner=_EmptyStateDictLoadPlanner(keys={WEIGHTS}),
            no_dist=True,
        )
        return {**content, WEIGHTS: weights[WEIGHTS]}
    except (pickle.UnpicklingError, KeyError, ValueError, CheckpointException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"checkpoint '{folder}': cannot be read: {reason}"]) from None


class _Reader(FileSystemReader):
    """Reads what an index that is known already says."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index."""
        return self._index


def _read_index(folder: Path) -> Metadata:
    """The index, a pickle, without running what it may hold; raises UnpicklingError."""
    index = _IndexUnpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"{INDEX} is no index")
    for name, item in index.state_dict_metadata.items():
        # Anything else is stored as a pickle of its own.
        if name.startswith(WEIGHTS) and not isinstance(item, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"{name} is no tensor")
    return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what an index is made of."""
        is_number_format = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_number_format and name not in INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}")
        return super().find_class(module, name)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}


def main() -> None:
    """Write a sharded checkpoint as one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    try:
        content = read(arguments.folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_CONFIG)
    partial = arguments.file.with_name(f".{arguments.file.name}.partial")
    torch.save(content, partial)
    os.replace(partial, arguments.file)


if __name__ == "__main__":
    main()
