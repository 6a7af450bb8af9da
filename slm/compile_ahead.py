"""Compiles what many decoders will ask for, in as many processes as there are CPUs.

A latency table needs dozens of operators compiled, each for some seconds of one CPU.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from slm.architecture import Architecture
from slm.compilation import CompilationError
from slm.decoding_step import CompileUnit, Piece, init_state, pieces
from slm.model import LanguageModel
from slm.runtime import Runtime, thread_count

PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """What decides what a `Decoder` compiles.

    architecture: its text, which other processes read once they have the user's operators.
    threads: of torch on the CPU, while decoding.
    """

    architecture: str
    max_tokens: int
    batch_size: int
    compile_unit: CompileUnit
    dtype: torch.dtype
    device: torch.device
    threads: int

    def pieces(self) -> list[Piece]:
        """What is compiled."""
        if self.compile_unit == "eager":
            return []
        model = LanguageModel(Architecture.parse(self.architecture))
        model = model.to(self.device, self.dtype).eval()
        # As in a decoder: parameters are ordinary tensors, the state is not.
        with torch.inference_mode():
            state = init_state(model, self.batch_size, self.max_tokens)
            return pieces(model, state, self.batch_size, self.compile_unit)


Job = tuple[Decoding, int]  # and the number of one of its pieces


def compile_ahead(
    decodings: Iterable[Decoding], progress: Callable[[str], None] | None = None
) -> None:
    """Compile what is missing, side by side.

    `progress` is told how much that is. What cannot be compiled is left to the decoder that asks
    for it, which says why.
    """
    jobs = _missing(decodings)
    if not jobs:
        return
    if progress:
        progress(f"compiling {len(jobs)} parts of models, once for this machine")
    num_processes = min(len(jobs), len(os.sched_getaffinity(0)))
    context, runtime = multiprocessing.get_context("spawn"), Runtime.current()
    processes = [
        context.Process(target=_compile, args=(jobs[rank::num_processes], runtime), daemon=True)
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            log.warning("a process that compiles ended with code %d", process.exitcode)


def _missing(decodings: Iterable[Decoding]) -> list[Job]:
    """What is not on disk, each library once."""
    jobs: dict[Path, Job] = {}
    for decoding in decodings:
        with thread_count(decoding.threads):
            for number, piece in enumerate(decoding.pieces()):
                path = piece.library_path
                if not path.exists():
                    jobs.setdefault(path, (decoding, number))
    return list(jobs.values())


def _compile(jobs: list[Job], runtime: Runtime) -> None:
    """What a process does."""
    # Ctrl-C ends it, as it ends the compiler, without a word; and so does its parent's end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    runtime.apply()
    for decoding, number in jobs:
        with thread_count(decoding.threads):
            try:
                with torch.inference_mode():
                    decoding.pieces()[number].library()
            except CompilationError as error:
                log.warning("%s", error)
