"""What of a folder has been written whole: files by size and checksum, a step at a time.

A folder that takes hours to write keeps a journal: a line of JSON for each step that is done, with
its files and whatever the next steps need to know. Whoever finds the folder after a kill goes on
from there; a file that is not what was written is named, and its step done again.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

READ_BYTES = 2**20

# A step that is done: {"files": {name: {"bytes": …, "sha256": …}}, and what it found out}.
Record = dict[str, Any]


class HashedFile:
    """A file open for writing that keeps its size and SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0

    def write(self, content: Any) -> None:
        """Append bytes, or an array's."""
        view = memoryview(content).cast("B")
        self._file.write(view)
        self._sha256.update(view)
        self._num_bytes += len(view)

    def close(self) -> dict[str, Any]:
        """Put everything on disk; return size and checksum."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}


class Journal:
    """The steps done in a folder, in a file that is only ever appended to.

    Threads may share it.
    """

    FILE = "journal.jsonl"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        self._lock = threading.Lock()
        path = folder / self.FILE
        if path.exists():
            lines = path.read_bytes().split(b"\n")
            # A kill leaves at most the last line torn.
            for line in lines[:-1]:
                self._take(*json.loads(line))
            os.truncate(path, path.stat().st_size - len(lines[-1]))

    @contextmanager
    def step(self, name: str, *files: str) -> Iterator[tuple[list[HashedFile], Record]]:
        """Write files for a step, which is done when the block ends without an error.

        Yields the open files, and a dictionary for what else there is to record.
        """
        found: Record = {}
        opened = [(self.folder / file).open("wb") for file in files]
        try:
            hashed = [HashedFile(file) for file in opened]
            yield hashed, found
            found["files"] = {file: each.close() for file, each in zip(files, hashed, strict=True)}
        finally:
            for file in opened:
                file.close()
        self.add(name, found)

    def add(self, name: str, record: Record | None) -> None:
        """Record a step as done; None: as not done."""
        line = json.dumps([name, record]).encode() + b"\n"
        with self._lock, (self.folder / self.FILE).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._take(name, record)

    def done(self, name: str) -> Record | None:
        """What a step recorded, if it is done and its files are what was written."""
        record = self.records.get(name)
        if record is None:
            return None
        problems = file_problems(self.folder, record["files"], check_content=True)
        for problem in problems:
            logger.warning("%s; writing it again", problem)
        return None if problems else record

    def forget(self, names: Sequence[str]) -> None:
        """Record steps as not done."""
        for name in names:
            if name in self.records:
                self.add(name, None)

    def remove(self) -> None:
        """Take the journal away, leaving the files."""
        (self.folder / self.FILE).unlink()

    def _take(self, name: str, record: Record | None) -> None:
        self.records.pop(name, None)
        if record is not None:
            self.records[name] = record


def file_problems(
    folder: Path, files: Mapping[str, Mapping[str, Any]], *, check_content: bool
) -> list[str]:
    """What is wrong with files, one line each: by their sizes alone, or reading all of them."""
    problems = []
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != expected["bytes"]:
            problems.append(f"{path}: has {size} bytes instead of {expected['bytes']}")
        elif check_content and _sha256(path) != expected["sha256"]:
            problems.append(f"{path}: its bytes are not those that were written (SHA-256)")
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
