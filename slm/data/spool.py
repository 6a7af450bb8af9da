"""Documents on disk between reading and packing, and which of them are held out."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm.config import ConfigError
from slm.data.corpus import Source
from slm.data.journal import Journal, Record
from slm.data.reader import Reader, to_bytes

# Text of a shard: what a kill costs at most, and what one thread packs at a time. Another size
# makes other files of the same tokens: raise FORMAT_VERSION with it.
SHARD_BYTES = 32 * 2**20
# Text that is decoded, and then encoded, at a time.
BATCH_BYTES = 2**20
# Columns of a shard's index, uint64: bytes of each document, and the hash of its text.
INDEX_COLUMNS = 2


@dataclass(frozen=True)
class TextShard:
    """Consecutive documents in one file. index: [N, 2] uint64, each one's bytes and hash."""

    path: Path
    index: np.ndarray

    def batches(self) -> Iterator[tuple[slice, list[str]]]:
        """Yield all documents in batches of about BATCH_BYTES, each with its place in the shard."""
        sizes = self.index[:, 0]
        ends = np.cumsum(sizes)
        begin = 0
        with self.path.open("rb") as file:
            while begin < len(sizes):
                limit = ends[begin] - sizes[begin] + BATCH_BYTES
                end = max(begin + 1, int(np.searchsorted(ends, limit, side="right")))
                yield (
                    slice(begin, end),
                    [file.read(size).decode("utf-8") for size in sizes[begin:end].tolist()],
                )
                begin = end

    def texts(self, chosen: np.ndarray) -> Iterator[str]:
        """Yield the chosen documents, a boolean for each."""
        with self.path.open("rb") as file:
            for size, is_chosen in zip(self.index[:, 0].tolist(), chosen.tolist(), strict=True):
                if is_chosen:
                    yield file.read(size).decode("utf-8")
                else:
                    file.seek(size, os.SEEK_CUR)


class Spool:
    """A source's documents in shards on disk; only their sizes and hashes are in memory.

    A stream can be read once, but the split, the tokenizer and the packing each need the text. What
    the journal knows is not read again: reading goes on after the last whole shard.

    digest: of all text.
    """

    def __init__(self, journal: Journal, source: Source) -> None:
        self.shards: list[TextShard] = []
        digest = hashlib.sha256()
        state = None
        while (record := journal.done(_step(len(self.shards)))) is not None:
            self._add(journal.folder, record, digest)
            state = record["state"]
        self.num_kept = len(self.shards)
        reader = source.open_reader(state)
        while (record := _write_shard(journal, len(self.shards), reader)) is not None:
            self._add(journal.folder, record, digest)
        self.digest = digest.hexdigest()
        self.num_bytes = sum(int(shard.index[:, 0].sum()) for shard in self.shards)

    @property
    def hashes(self) -> np.ndarray:
        """Hashes of all documents [N] uint64."""
        return np.concatenate([shard.index[:, 1] for shard in self.shards])

    def _add(self, folder: Path, record: Record, digest: Any) -> None:
        path, index_path = (folder / name for name in record["files"])
        index = np.fromfile(index_path, np.uint64).reshape(-1, INDEX_COLUMNS)
        self.shards.append(TextShard(path, index))
        digest.update(record["files"][path.name]["sha256"].encode())


def is_text_step(name: str) -> bool:
    """Whether a step of a journal has written a shard of text."""
    return name.startswith("text-")


def is_worth_keeping(journal: Journal) -> bool:
    """Whether a build that failed has read so much that it should not be read again."""
    read = [record for name, record in journal.records.items() if is_text_step(name)]
    files = (file for record in read for file in record["files"].values())
    return "text" in journal.records or sum(file["bytes"] for file in files) >= SHARD_BYTES


def remove_text(folder: Path) -> None:
    """Remove the shards of a spool."""
    for path in folder.glob("text-*"):
        path.unlink()


def is_held_out(document_hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Tell validation documents by their hashes [N] uint64, evenly spread.

    Equal documents share a side, and a document keeps its side when others come or go. Where few
    documents leave one side empty, the one nearest to it changes over. Raises ConfigError if there
    are no two different documents.
    """
    lowest, highest = (document_hashes.min(), document_hashes.max())
    if lowest == highest:
        raise ConfigError(
            ["data: has only one document, but one to train on and one to hold out are needed"]
        )
    held_out = document_hashes < fraction * 2.0**64
    held_out |= document_hashes == lowest
    return held_out & (document_hashes != highest)


def _step(number: int) -> str:
    return f"text-{number:05d}"


def _write_shard(journal: Journal, number: int, reader: Reader) -> Record | None:
    """Write the next documents, up to SHARD_BYTES; None if there are no more."""
    first = next(reader, None)
    if first is None:
        return None
    step = _step(number)
    index: list[tuple[int, int]] = []
    num_bytes = 0
    with journal.step(step, f"{step}.txt", f"{step}.index.bin") as ((text, table), record):
        document: str | None = first
        while document is not None:
            content = to_bytes(document)
            text.write(content)
            digest = hashlib.blake2b(content, digest_size=8).digest()
            index.append((len(content), int.from_bytes(digest, "little")))
            num_bytes += len(content)
            document = next(reader, None) if num_bytes < SHARD_BYTES else None
        table.write(np.array(index, np.uint64))
        record["state"] = reader.state()
    return journal.records[step]
