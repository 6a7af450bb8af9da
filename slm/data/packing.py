"""Packed corpora: the tokens of all documents, one after another, in memory-mapped files.

A packed corpus is a folder `<cache_dir>/<source>-<digest>/`:

    metadata.json               sizes, ids, versions; written last
    tokenizer.json
    train.tokens.bin            uint16, or uint32 for a vocabulary above 65,536
    train.documents.bin         int64, index of each document's first token
    validation.tokens.bin, validation.documents.bin

The digest covers the configs and what identifies the source (versions, or sizes and times of
files), so that a second call reads nothing. A folder appears complete or not at all.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer

from slm.config import ConfigError
from slm.data.config import DataConfig, TokenizerConfig
from slm.data.corpus import Source, open_source
from slm.data.spool import Spool, is_held_out
from slm.data.tokenizer import (
    build_tokenizer,
    end_of_text_id,
    tokenizer_identity,
    vocabulary_size,
)

logger = logging.getLogger(__name__)

# Part of the digest: raised when documents, splits or files come out otherwise than before.
FORMAT_VERSION = 1
METADATA = "metadata.json"
TOKENIZER = "tokenizer.json"
START_BYTES = np.dtype(np.int64).itemsize
# Bytes that a tokenizer is trained on.
TOKENIZER_TRAINING_BYTES = 256 * 2**20


class CorruptCorpusError(ValueError):
    """A file of a packed corpus is not what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSplit:
    """The training or validation part of a packed corpus.

    num_bytes: of the text in UTF-8.
    """

    folder: Path
    name: str
    token_dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def tokens_path(self) -> Path:
        """File of the token ids."""
        return self.folder / f"{self.name}.tokens.bin"

    @property
    def documents_path(self) -> Path:
        """File of the indices of first tokens."""
        return self.folder / f"{self.name}.documents.bin"

    @cached_property
    def tokens(self) -> np.memmap:
        """Token ids [num_tokens]."""
        return np.memmap(self.tokens_path, self.token_dtype, mode="r")

    @cached_property
    def document_starts(self) -> np.memmap:
        """Index of each document's first token [num_documents] int64."""
        return np.memmap(self.documents_path, np.int64, mode="r")

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, the end of text before it left out."""
        starts = self.document_starts
        end = starts[index + 1] if index + 1 < len(starts) else self.num_tokens
        return self.tokens[starts[index] + 1 : end]

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
        """Open a folder that `prepare` has written. Raises CorruptCorpusError naming a bad file."""
        path = folder / METADATA
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
            corpus = cls(
                folder=folder,
                digest=metadata["digest"],
                vocab_size=metadata["vocab_size"],
                end_of_text=metadata["end_of_text"],
                train=PackedSplit(folder=folder, name="train", **metadata["train"]),
                validation=PackedSplit(folder=folder, name="validation", **metadata["validation"]),
            )
            _check_size(corpus.tokenizer_path, metadata["tokenizer_bytes"])
            for split in (corpus.train, corpus.validation):
                _check_size(
                    split.tokens_path, split.num_tokens * np.dtype(split.token_dtype).itemsize
                )
                _check_size(split.documents_path, split.num_documents * START_BYTES)
        except CorruptCorpusError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptCorpusError(f"{path}: {type(error).__name__}: {error}") from error
        return corpus


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    progress: Callable[[str], None] = logger.info,
) -> PackedCorpus:
    """Return the packed corpus of a configuration, which is built the first time.

    Any number of processes may call it: one builds, the others wait. A damaged corpus is named
    and built again. Raises ConfigError if the text cannot be had.
    """
    source = open_source(data)
    identity = {
        "format": FORMAT_VERSION,
        "source": {data.source: source.identity},
        "validation_fraction": data.validation_fraction,
        "tokenizer": tokenizer_identity(tokenizer),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = data.cache_dir / f"{data.source}-{digest}"
    if folder.is_dir():
        try:
            return PackedCorpus.open(folder)
        except CorruptCorpusError as error:
            logger.warning("%s; building the corpus again", error)
    data.cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data.cache_dir / f".{folder.name}.lock"):
        if _is_intact(folder):
            return PackedCorpus.open(folder)
        partial = data.cache_dir / f".{folder.name}.partial"
        # What a killed process left behind: whoever holds the lock is the only builder.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            metadata = _build(partial, source, data, tokenizer, progress)
            _write_json(partial / METADATA, {"digest": digest, "identity": identity} | metadata)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return PackedCorpus.open(folder)


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise CorruptCorpusError(f"{path}: has {size} bytes instead of {expected}")


def _is_intact(folder: Path) -> bool:
    try:
        PackedCorpus.open(folder)
    except CorruptCorpusError:
        return False
    return True


def _build(
    folder: Path,
    source: Source,
    data: DataConfig,
    config: TokenizerConfig,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Write a corpus into `folder`; return its metadata."""
    progress(f"reading {data.source}")
    spool_path = folder / "documents.txt"
    spool = Spool(spool_path, source.documents())
    if not len(spool):
        raise ConfigError([f"data: there is no text in source '{data.source}'"])
    held_out = is_held_out(spool.hashes, data.validation_fraction)
    progress(f"building the tokenizer from {spool.num_bytes / 1e6:.1f} MB")
    training_documents = (text for texts in spool.batches(~held_out) for text in texts)
    tokenizer = build_tokenizer(config, _up_to(training_documents, TOKENIZER_TRAINING_BYTES))
    tokenizer.save(str(folder / TOKENIZER))
    vocab_size = vocabulary_size(tokenizer)
    metadata = {
        "end_of_text": end_of_text_id(tokenizer),
        "vocab_size": vocab_size,
        "tokenizer_bytes": (folder / TOKENIZER).stat().st_size,
        "versions": {name: version(name) for name in ("tokenizers", "numpy")},
    }
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    for name, chosen in {"train": ~held_out, "validation": held_out}.items():
        progress(f"packing the {name} split: {chosen.sum()} documents")
        metadata[name] = _write_split(folder, name, dtype, tokenizer, spool.batches(chosen))
    spool_path.unlink()
    return metadata


def _write_split(
    folder: Path, name: str, dtype: str, tokenizer: Tokenizer, batches: Iterable[list[str]]
) -> dict[str, Any]:
    """Encode documents and append them to the split's files; return the fields of PackedSplit."""
    num_tokens = num_documents = num_bytes = 0
    with (
        (folder / f"{name}.tokens.bin").open("wb") as tokens_file,
        (folder / f"{name}.documents.bin").open("wb") as documents_file,
    ):
        for batch in batches:
            documents = [encoding.ids for encoding in tokenizer.encode_batch_fast(batch)]
            lengths = np.array([len(document) for document in documents], np.int64)
            (num_tokens + np.cumsum(lengths) - lengths).tofile(documents_file)
            np.concatenate([np.array(document, dtype) for document in documents]).tofile(
                tokens_file
            )
            num_tokens += int(lengths.sum())
            num_documents += len(documents)
            num_bytes += sum(len(text.encode()) for text in batch)
        _sync(tokens_file)
        _sync(documents_file)
    return {
        "token_dtype": dtype,
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "num_bytes": num_bytes,
    }


def _up_to(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    num_bytes = 0
    for document in documents:
        if num_bytes >= max_bytes:
            return
        num_bytes += len(document.encode())
        yield document


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        file.write(json.dumps(content, indent=1).encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
