"""Packed corpora: the tokens of all documents, one after another, in memory-mapped files.

A packed corpus is a folder `<cache_dir>/<source>-<digest>/`:

    metadata.json                 source, tokenizer, counts, and size and SHA-256 of all other files
    tokenizer.json
    train-00000.tokens.bin, …     token ids in shards: uint16, or uint32 above 65,536 of them
    train-00000.documents.bin, …  int64, index in the shard of each document's first token
    train.documents.bin           int64, the same over all shards
    validation…                   likewise

Sizes are checked whenever a corpus is opened, contents by `PackedCorpus.verify`, which reads all.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slm.data.journal import file_problems
from slm.data.token_shards import TokenShards

METADATA = "metadata.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")


class CorruptCorpusError(ValueError):
    """Files of a packed corpus are not what was written; a line for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSplit:
    """The training or validation part of a packed corpus.

    shard_tokens: token ids in each shard. num_bytes: of the text in UTF-8.
    """

    folder: Path
    name: str
    token_dtype: str
    shard_tokens: tuple[int, ...]
    num_documents: int
    num_bytes: int

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Of all documents, each with the end of text before it."""
        return sum(self.shard_tokens)

    @cached_property
    def tokens(self) -> TokenShards:
        """Token ids [num_tokens]."""
        paths = [
            self.folder / tokens_file(self.name, number) for number in range(len(self.shard_tokens))
        ]
        return TokenShards(paths, self.shard_tokens, self.token_dtype)

    @cached_property
    def document_starts(self) -> np.memmap:
        """Index of each document's first token [num_documents] int64."""
        return np.memmap(self.folder / starts_file(self.name), np.int64, mode="r")

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, the end of text before it left out."""
        starts = self.document_starts
        end = starts[index + 1] if index + 1 < len(starts) else self.num_tokens
        return self.tokens[int(starts[index]) + 1 : int(end)]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the tokens along; a worker process opens its own.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedCorpus:
    """A tokenized corpus on disk. Every document begins with the token `end_of_text`."""

    folder: Path
    digest: str
    vocab_size: int
    end_of_text: int
    train: PackedSplit
    validation: PackedSplit

    @property
    def tokenizer_path(self) -> Path:
        """The `tokenizer.json`."""
        return self.folder / TOKENIZER

    @classmethod
    def open(cls, folder: Path) -> "PackedCorpus":
        """Open a folder that `prepare` has written.

        Raises CorruptCorpusError naming every file that is not there, or not as long as it was.
        """
        path = folder / METADATA
        metadata = read_metadata(folder)
        try:
            corpus = cls(
                folder=folder,
                digest=metadata["digest"],
                vocab_size=metadata["vocab_size"],
                end_of_text=metadata["end_of_text"],
                train=_split(folder, "train", metadata),
                validation=_split(folder, "validation", metadata),
            )
            files = _files(metadata)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptCorpusError(f"{path}: {type(error).__name__}: {error}") from error
        if problems := file_problems(folder, files, check_content=False):
            raise CorruptCorpusError("\n".join(problems))
        return corpus

    def verify(self) -> None:
        """Read every file; raise CorruptCorpusError naming each that is not what was written."""
        files = _files(read_metadata(self.folder))
        if problems := file_problems(self.folder, files, check_content=True):
            raise CorruptCorpusError("\n".join(problems))


def tokens_file(split: str, number: int) -> str:
    """Name of a shard's token ids."""
    return f"{split}-{number:05d}.tokens.bin"


def starts_file(split: str, number: int | None = None) -> str:
    """Name of the first tokens' indices, of a shard or of a whole split."""
    return f"{split}.documents.bin" if number is None else f"{split}-{number:05d}.documents.bin"


def read_metadata(folder: Path) -> dict[str, Any]:
    """What a packed corpus says of itself. Raises CorruptCorpusError if it says nothing."""
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCorpusError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, dict):
        raise CorruptCorpusError(f"{path}: holds no object")
    return metadata


def _split(folder: Path, name: str, metadata: Mapping[str, Any]) -> PackedSplit:
    counts = metadata[name]
    return PackedSplit(
        folder=folder,
        name=name,
        token_dtype=metadata["token_dtype"],
        shard_tokens=tuple(counts["shard_tokens"]),
        num_documents=counts["num_documents"],
        num_bytes=counts["num_bytes"],
    )


def _files(metadata: Mapping[str, Any]) -> dict[str, Any]:
    records = metadata["records"].values()
    return {name: file for record in records for name, file in record["files"].items()}
