"""Documents on disk between reading and packing, and which of them are held out."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from slm.config import ConfigError

# Bytes that are read, and then encoded, at a time.
BATCH_BYTES = 4 * 2**20


class Spool:
    """Documents on disk, read back any number of times; only their sizes and hashes are in memory.

    A stream can be read once, but the split, the tokenizer and the packing each need the text.
    """

    def __init__(self, path: Path, documents: Iterable[str]) -> None:
        self.path = path
        sizes, hashes = array("q"), array("Q")
        with path.open("wb") as file:
            for document in documents:
                # Text out of JSON may hold lone surrogates, which no UTF-8 can.
                content = document.encode("utf-8", errors="replace")
                file.write(content)
                sizes.append(len(content))
                digest = hashlib.blake2b(content, digest_size=8).digest()
                hashes.append(int.from_bytes(digest, "little"))
        self.sizes = np.asarray(sizes)
        self.hashes = np.asarray(hashes)
        self.num_bytes = int(self.sizes.sum())

    def __len__(self) -> int:
        return len(self.sizes)

    def batches(self, chosen: np.ndarray) -> Iterator[list[str]]:
        """Yield the chosen documents, a boolean for each, in batches of about BATCH_BYTES."""
        batch: list[str] = []
        batch_bytes = 0
        with self.path.open("rb") as file:
            for size, is_chosen in zip(self.sizes.tolist(), chosen.tolist(), strict=True):
                if not is_chosen:
                    file.seek(size, os.SEEK_CUR)
                    continue
                batch.append(file.read(size).decode("utf-8"))
                batch_bytes += size
                if batch_bytes >= BATCH_BYTES:
                    yield batch
                    batch, batch_bytes = [], 0
        if batch:
            yield batch


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
