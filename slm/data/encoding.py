"""Text to token ids, a shard at a time, in as many processes as there are cores.

Threads of the tokenizer's own would do for few cores; processes of one thread each are a quarter
faster on two, since taking ids over into arrays holds Python's lock, and share no cache.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from slm.data.journal import HashedFile, Record, write_files
from slm.data.packing import SPLITS, TOKENIZER, starts_file, tokens_file
from slm.data.spool import TextShard
from slm.data.tokenizer import load_tokenizer

# A process takes a second to start: with fewer shards the tokenizer's own threads do.
SHARDS_PER_PROCESS = 2


class EncodingTask(NamedTuple):
    """A shard of text to encode. held_out: a boolean for each of its documents."""

    number: int
    shard: TextShard
    held_out: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """Encodes into a folder that holds the tokenizer."""

    folder: Path
    token_dtype: str

    def load_tokenizer(self) -> Tokenizer:
        """The folder's tokenizer."""
        return load_tokenizer(self.folder / TOKENIZER)

    def encode(self, task: EncodingTask, tokenizer: Tokenizer) -> Record:
        """Write a shard of each split; return what is to be recorded of it."""
        names = [
            file(split, task.number) for split in SPLITS for file in (tokens_file, starts_file)
        ]
        with write_files(self.folder, names) as (files, record):
            train, validation = _SplitWriter(*files[:2]), _SplitWriter(*files[2:])
            for places, texts in task.shard.batches():
                encodings = tokenizer.encode_batch_fast(texts)
                sizes = task.shard.index[places, 0].tolist()
                rows = zip(encodings, sizes, task.held_out[places].tolist(), strict=True)
                for encoding, num_bytes, is_validation in rows:
                    split = validation if is_validation else train
                    split.add(np.array(encoding.ids, self.token_dtype), num_bytes)
            record |= {"train": train.finish(), "validation": validation.finish()}
        return record


def encode_all(encoder: Encoder, tasks: Sequence[EncodingTask]) -> Iterator[tuple[int, Record]]:
    """Encode shards, and yield the number and record of each as it is done.

    Raises RuntimeError if a process ends before its time.
    """
    num_processes = min(len(os.sched_getaffinity(0)), len(tasks) // SHARDS_PER_PROCESS)
    if num_processes > 1:
        yield from _encode_in_processes(encoder, tasks, num_processes)
    else:
        tokenizer = encoder.load_tokenizer()
        for task in tasks:
            yield task.number, encoder.encode(task, tokenizer)


def _encode_in_processes(
    encoder: Encoder, tasks: Sequence[EncodingTask], num_processes: int
) -> Iterator[tuple[int, Record]]:
    # Not forked: the tokenizer may have threads here.
    context = multiprocessing.get_context("spawn")
    workers = {}
    try:
        for index in range(num_processes):
            receiver, sender = context.Pipe(duplex=False)
            part = tasks[index::num_processes]
            worker = context.Process(target=_work, args=(encoder, part, sender), daemon=True)
            worker.start()
            # The worker holds the only sender left: its end is the pipe's end.
            sender.close()
            workers[receiver] = worker
        num_done = 0
        while num_done < len(tasks):
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                try:
                    yield ready.recv()
                    num_done += 1
                except EOFError:
                    worker = workers.pop(ready)
                    worker.join()
                    if worker.exitcode != 0:
                        raise RuntimeError(
                            f"a process that encodes text ended with exit code {worker.exitcode}"
                        ) from None
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _work(encoder: Encoder, tasks: Sequence[EncodingTask], sender: Connection) -> None:
    """What a process does. One whose parent is gone ends with the shard it is at."""
    # Ctrl-C goes to all processes; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = encoder.load_tokenizer()
    for task in tasks:
        try:
            sender.send((task.number, encoder.encode(task, tokenizer)))
        except BrokenPipeError:
            return


class _SplitWriter:
    """Appends documents to a shard of a split: token ids to one file, indices to another."""

    def __init__(self, tokens: HashedFile, starts: HashedFile) -> None:
        self._tokens = tokens
        self._starts_file = starts
        self._starts: list[int] = []
        self._num_tokens = self._num_bytes = 0

    def add(self, document: np.ndarray, num_bytes: int) -> None:
        """Append the ids of a document of so many bytes of text."""
        self._starts.append(self._num_tokens)
        self._tokens.write(document)
        self._num_tokens += len(document)
        self._num_bytes += num_bytes

    def finish(self) -> dict[str, int]:
        """Write the indices; return the counts."""
        self._starts_file.write(np.array(self._starts, np.int64))
        return {
            "num_tokens": self._num_tokens,
            "num_documents": len(self._starts),
            "num_bytes": self._num_bytes,
        }
