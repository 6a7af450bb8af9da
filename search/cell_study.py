"""A study that measures models, trains them, and makes a report of it, from start to end.

What is known lives in cells. Everything else follows from them, so the same command goes on
wherever the last one ended.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from latency.device import Device
from search.cell_evaluator import CellEvaluator
from search.cell_rows import Row
from search.cell_study_config import CellStudyConfig
from search.cells import Cell, CellStore, measurement_key
from search.config import plain
from search.devices import visible_devices
from search.progress import Progress, Stopwatch, format_duration
from search.worker import JobError, Worker
from slm.architecture import Architecture
from slm.config import ConfigError
from slm.kernels.backend import set_backend
from slm.training.files import alone

if TYPE_CHECKING:
    from rich.table import Table

    from latency.reference import ReferenceTimes
    from slm.data import PackedCorpus

# Width of a table that goes to a file.
FILE_COLUMNS = 150

C = TypeVar("C", bound=CellStudyConfig)


@dataclass(frozen=True)
class Training:
    """One training that is to be done.

    name: what people see. key: of its cell. budgets: tokens after which it is validated; the
    schedule ends with the last.
    """

    name: str
    key: str
    architecture: Architecture
    seed: int
    budgets: tuple[int, ...]

    @property
    def cost(self) -> float:
        """How long it takes, in a unit of its own."""
        return float(self.architecture.parameters()) * self.budgets[-1]


class Stopping(Exception):  # noqa: N818
    """The study ends, and so does what it was waiting for."""


class CellStudy(ABC, Generic[C]):
    """A study in its run folder; make it, then `run` it.

    Raises ConfigError if the folder holds another study.
    """

    # What people call it.
    kind: ClassVar[str]

    def __init__(self, config: C, folder: Path) -> None:
        self.config = config
        self.folder = folder
        set_backend(config.backend)
        self.device = Device.current(threads=config.latency_threads)
        identity = {**config.identity(), "device": self.device.key}
        self.store = CellStore(folder, config.name, identity)
        self.progress = Progress(total=0, num_workers=config.processes)

    def run(self) -> list[Row]:
        """Study; the rows of the table. Raises ConfigError if it is being made already."""
        watch = Stopwatch()
        with alone(self.folder):
            self._introduce()
            try:
                self._make_cells()
            except KeyboardInterrupt:
                self.progress.say("interrupted; the same command goes on from here")
                raise
            finally:
                self.progress.end()
                rows = self._publish()
        self.progress.say(f"done in {format_duration(watch.seconds)}")
        return rows

    @abstractmethod
    def _make_cells(self) -> None:
        """Measure and train."""

    @abstractmethod
    def _publish(self) -> list[Row]:
        """Write and show what is known, if anything is; the rows of the table."""

    # What is studied with

    @cached_property
    def corpus(self) -> PackedCorpus:
        """The packed corpus, prepared the first time."""
        from slm.data import prepare

        return prepare(self.config.data, self.config.tokenizer, progress=self.progress.say)

    def _introduce(self) -> None:
        self.progress.say(f"{self.kind} '{self.config.name}' on {self.device.key}")
        self.progress.say(
            f"corpus: {len(self.corpus.train):,} tokens to train on, "
            f"vocabulary {self.corpus.vocab_size}"
        )

    def _evaluator(self) -> CellEvaluator:
        """What makes the cells."""
        return CellEvaluator(**self._evaluator_settings())

    def _evaluator_settings(self) -> dict[str, Any]:
        """What every evaluator needs."""
        config = self.config
        return {
            "runtime": config.runtime(),
            "corpus_folder": self.corpus.folder.resolve(),
            "workload": config.workload,
            "protocol": config.protocol,
            "proxy": config.proxy,
            "latency_threads": config.latency_threads,
            "training_threads": config.training_threads,
        }

    def _new_worker(self, index: int = 0) -> Worker:
        return Worker(self._evaluator(), visible_devices(index))

    def _run_job(self, worker: Worker, method: str, *arguments: Any, **options: Any) -> Cell:
        limit_s = self.config.proxy.time_limit_s
        cell: Cell = worker.run(method, *arguments, time_limit_s=limit_s, **options)
        return cell

    # Latencies

    @contextmanager
    def _measuring(self) -> Iterator[Callable[[Architecture], Cell]]:
        """What gives the cell of an architecture's latencies, measured unless it is known."""
        worker = self._new_worker()
        try:
            yield partial(self._measure, worker, self._yardstick(worker))
        finally:
            worker.close()

    def _yardstick(self, worker: Worker) -> ReferenceTimes:
        """The machine speed that all times are brought to, settled once."""
        from latency.reference import ReferenceTimes

        cell = self.store.get("yardstick")
        if cell is None:
            try:
                measured = self._run_job(worker, "yardstick")
            except JobError as error:
                raise ConfigError([f"the reference model cannot be measured: {error}"]) from None
            cell = self.store.settle("yardstick", measured)
        try:
            return ReferenceTimes.from_dict(cell)
        except ValueError as error:
            raise ConfigError([f"the study's yardstick is none: {error}"]) from None

    def _measure(
        self, worker: Worker, reference_times: ReferenceTimes, architecture: Architecture
    ) -> Cell:
        key = measurement_key(architecture)
        cell = self.store.get(key)
        if cell is None:
            self.progress.live(f"measuring {architecture}")
            try:
                cell = self._run_job(worker, "measure", str(architecture), reference_times)
            except JobError as error:
                cell = {"architecture": str(architecture), "error": str(error)}
            cell = self.store.settle(key, cell)
        return cell

    # Trainings

    def _train(self, trainings: Sequence[Training]) -> None:
        """Do the trainings that are not known yet, several at a time."""
        todo = [training for training in trainings if self.store.get(training.key) is None]
        num_known = len(trainings) - len(todo)
        self.progress.say(f"{len(trainings)} trainings, {num_known} of them done")
        watch, done, left = Stopwatch(), 0.0, sum(training.cost for training in todo)
        stopping = threading.Event()
        idle: SimpleQueue[tuple[int, Worker]] = SimpleQueue()
        workers = [self._new_worker(index) for index in range(self.config.processes)]
        for each in enumerate(workers):
            idle.put(each)
        with ThreadPoolExecutor(len(workers)) as pool:
            futures = {
                pool.submit(self._train_one, idle, stopping, training): training
                for training in todo
            }
            try:
                for number, future in enumerate(as_completed(futures), start=num_known + 1):
                    training = futures[future]
                    cell = self.store.settle(training.key, future.result())
                    done, left = done + training.cost, left - training.cost
                    left_s = watch.seconds / done * left if number < len(trainings) else 0.0
                    self._tell_training(f"{number}/{len(trainings)}", training, cell, left_s)
            finally:
                # First nothing new is begun, then what runs is ended, by the thread that waits.
                stopping.set()
                pool.shutdown(cancel_futures=True)
                for worker in workers:
                    worker.close()

    def _train_one(
        self, idle: SimpleQueue[tuple[int, Worker]], stopping: threading.Event, training: Training
    ) -> Cell:
        """Train in a worker that has nothing to do; the pool has as many threads as workers."""
        index, worker = idle.get()

        def on_wait() -> None:
            if stopping.is_set():
                raise Stopping

        def on_report(progress: dict[str, Any]) -> None:
            share, loss = progress["share"], progress["loss"]
            self.progress.live(f"{training.name} {share:4.0%}  loss {loss:.4f}", index)

        text = str(training.architecture)
        arguments = (text, training.seed, training.budgets)
        try:
            return self._run_job(worker, "train", *arguments, on_report=on_report, on_wait=on_wait)
        except JobError as error:
            return {"architecture": text, "seed": training.seed, "error": str(error)}
        finally:
            self.progress.left(index)
            idle.put((index, worker))

    # For people

    def _description(self) -> Row:
        """What a file of results begins with."""
        return {
            "name": self.config.name,
            "device": self.device.describe(),
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": plain(self.config),
        }

    def _tell_training(self, place: str, training: Training, cell: Cell, left_s: float) -> None:
        words = [f"failed: {cell['error']}"] if "error" in cell else self._training_words(cell)
        parts = [place, f"{training.name}, seed {training.seed}", *words]
        if left_s:
            parts.append(f"ETA {format_duration(left_s)}")
        self.progress.say("  ".join(parts))

    def _training_words(self, cell: Cell) -> list[str]:
        """What is said of a training that went well."""
        return [f"loss {cell['loss']:.4f}"]


def print_table(table: Table) -> None:
    """Show a table: in a file, what is cut to the width of a terminal is hard to read."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else FILE_COLUMNS).print(table)
