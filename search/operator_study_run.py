"""One operator study from start to end: sizes, latencies, trainings, table and figure.

What is known lives in cells. Everything else follows from them, so the same command goes on
wherever the last one ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from latency.device import Device
from search.config import plain
from search.operator_study_cells import Cell, CellEvaluator, CellStore
from search.operator_study_config import StudyConfig
from search.operator_study_results import (
    MATCHINGS,
    Entry,
    Matching,
    Row,
    results_table,
    study_row,
    write_results,
)
from search.progress import Progress, Stopwatch, format_duration
from search.study_design import Arrangement, match_latency, match_parameters
from search.worker import JobError, Worker
from slm.architecture import Architecture
from slm.config import ConfigError
from slm.kernels.backend import set_backend

if TYPE_CHECKING:
    from slm.data import PackedCorpus


# Width of a table that goes to a file.
FILE_COLUMNS = 150


class MeasurementError(Exception):
    """A model could not be measured; the message is the reason."""


@dataclass(frozen=True)
class Training:
    """One training that is to be done; `name` is what people see."""

    name: str
    architecture: Architecture
    seed: int

    @property
    def key(self) -> str:
        """Of its cell."""
        return f"training-{self.architecture.digest}-{self.seed}"


class OperatorStudy:
    """A study in its run folder; make it, then `run` it.

    Raises ConfigError if the folder holds another study.
    """

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        set_backend(config.backend)
        self.device = Device.current(threads=config.latency_threads)
        identity = {**config.identity(), "device": self.device.key}
        self.store = CellStore(folder, config.name, identity)
        self.arrangements = config.space.arrangements()
        self.labels = config.space.labels()
        self.entries: list[Entry] = []
        self.progress = Progress(len(self.arrangements))

    def run(self) -> list[Row]:
        """Study; the rows of the table."""
        watch = Stopwatch()
        with self._alone():
            try:
                self._prepare()
                self._choose_sizes()
                self._train()
            except KeyboardInterrupt:
                self.progress.say("interrupted; the same command goes on from here")
                raise
            finally:
                self.progress.end()
                if self.entries:
                    rows = self._publish()
        self.progress.say(f"done in {format_duration(watch.seconds)}")
        return rows

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out of the folder; the system lets go when this one ends."""
        lock = FileLock(self.folder / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError([f"name: the study '{self.config.name}' is running now"]) from None
        with lock:
            yield

    # What is studied with

    @cached_property
    def corpus(self) -> PackedCorpus:
        """The packed corpus, prepared the first time."""
        from slm.data import prepare

        return prepare(self.config.data, self.config.tokenizer, progress=self.progress.say)

    def _new_worker(self) -> Worker:
        config = self.config
        return Worker(
            CellEvaluator(
                runtime=config.runtime(),
                corpus_folder=self.corpus.folder.resolve(),
                workload=config.workload,
                protocol=config.protocol,
                proxy=config.proxy,
                accuracy_items=config.accuracy_items,
                latency_threads=config.latency_threads,
                training_threads=config.training_threads,
            )
        )

    def _run_job(self, worker: Worker, method: str, *arguments: Any, **options: Any) -> Cell:
        limit_s = self.config.proxy.time_limit_s
        cell: Cell = worker.run(method, *arguments, time_limit_s=limit_s, **options)
        return cell

    def _prepare(self) -> None:
        self.progress.say(f"operator study '{self.config.name}' on {self.device.key}")
        self.progress.say(
            f"corpus: {len(self.corpus.train):,} tokens to train on, "
            f"vocabulary {self.corpus.vocab_size}"
        )

    def _name(self, arrangement: Arrangement) -> str:
        return " + ".join(self.labels[mixer] for mixer in arrangement.mixers)

    # Sizes

    def _choose_sizes(self) -> None:
        """Match every arrangement in both ways; `entries` in the order of the design."""
        config, space = self.config, self.config.space
        matched = {
            arrangement: match_parameters(
                arrangement, space, self.corpus.vocab_size, config.parameters
            )
            for arrangement in self.arrangements
        }
        worker = self._new_worker()
        try:
            yardstick = self._yardstick(worker)
            measure_ms = partial(self._measure_ms, worker, yardstick)
            self._match_all("parameters", lambda a: self._checked(matched[a], measure_ms))
            target_ms = self.target_ms
            if target_ms is None:
                cell = self.store.get(_measurement_key(matched[self.arrangements[0]]))
                reason = cell["error"] if cell else "it was not measured"
                raise ConfigError([f"target_ms: the reference has no latency: {reason}"])
            self.progress.say(f"target: {target_ms:.4g} ms per request")
            self._match_all(
                "latency",
                lambda arrangement: match_latency(
                    arrangement,
                    space,
                    matched[arrangement],
                    measure_ms,
                    target_ms,
                    config.latency_tolerance,
                ),
            )
        finally:
            worker.close()

    @property
    def target_ms(self) -> float | None:
        """The latency to match: what was given, else the reference's; None until it is known."""
        if self.config.target_ms is not None or not self.entries:
            return self.config.target_ms
        reference = self.entries[0].architecture
        cell = self.store.get(_measurement_key(reference)) if reference is not None else None
        return cell.get("latency_ms") if cell is not None else None

    def _match_all(self, matching: Matching, match: Callable[[Arrangement], Architecture]) -> None:
        """Add an entry per arrangement."""
        watch = Stopwatch()
        for number, arrangement in enumerate(self.arrangements, start=1):
            mixers = tuple(self.labels[mixer] for mixer in arrangement.mixers)
            try:
                architecture = match(arrangement)
            except MeasurementError as error:
                entry = Entry(matching, mixers, None, None, str(error))
            else:
                num_blocks = arrangement.count_blocks(self.config.space, architecture)
                entry = Entry(matching, mixers, num_blocks, architecture)
            self.entries.append(entry)
            self._tell_entry(entry, number, watch)

    @staticmethod
    def _checked(
        architecture: Architecture, measure_ms: Callable[[Architecture], float]
    ) -> Architecture:
        """The architecture, which can be measured."""
        measure_ms(architecture)
        return architecture

    def _yardstick(self, worker: Worker) -> float:
        """The machine speed that all times are brought to, settled once."""
        cell = self.store.get("yardstick")
        if cell is None:
            cell = self.store.settle("yardstick", self._run_job(worker, "yardstick"))
        reference_ms: float = cell["reference_ms"]
        return reference_ms

    def _measure_ms(self, worker: Worker, yardstick: float, architecture: Architecture) -> float:
        """Latency of one request, measured unless it is known."""
        key = _measurement_key(architecture)
        cell = self.store.get(key)
        if cell is None:
            self.progress.live(f"measuring {architecture}")
            try:
                cell = self._run_job(worker, "measure", str(architecture), yardstick)
            except JobError as error:
                cell = {"architecture": str(architecture), "error": str(error)}
            cell = self.store.settle(key, cell)
        if "error" in cell:
            raise MeasurementError(f"not measured: {cell['error']}")
        latency_ms: float = cell["latency_ms"]
        return latency_ms

    # Trainings

    def _trainings(self) -> list[Training]:
        """Every training of the study once; all models with one seed, then with the next."""
        found: dict[str, Training] = {}
        for seed in self.config.seeds:
            for entry in self.entries:
                if entry.architecture is not None:
                    training = Training(
                        f"{entry.name} {MATCHINGS[entry.matching]}", entry.architecture, seed
                    )
                    found.setdefault(training.key, training)
        return list(found.values())

    def _train(self) -> None:
        """Do the trainings that are not known yet, several at a time."""
        trainings = self._trainings()
        todo = [training for training in trainings if self.store.get(training.key) is None]
        num_known = len(trainings) - len(todo)
        self.progress.say(f"{len(trainings)} trainings, {num_known} of them done")
        watch = Stopwatch()
        idle: SimpleQueue[Worker] = SimpleQueue()
        workers = [self._new_worker() for _ in range(min(self.config.processes, len(todo)))]
        for worker in workers:
            idle.put(worker)
        with ThreadPoolExecutor(max(1, len(workers))) as pool:
            futures = {pool.submit(self._train_one, idle, training): training for training in todo}
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    training = futures[future]
                    cell = self.store.settle(training.key, future.result())
                    left_s = watch.seconds / number * (len(todo) - number)
                    place = f"{num_known + number}/{len(trainings)}"
                    self._tell_training(place, training, cell, left_s)
            finally:
                # First nothing new is begun, then what runs is ended.
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.close()

    def _train_one(self, idle: SimpleQueue[Worker], training: Training) -> Cell:
        """Train in a worker that has nothing to do; the pool has as many threads as workers."""
        worker = idle.get()

        def on_report(progress: dict[str, Any]) -> None:
            share, loss = progress["share"], progress["loss"]
            self.progress.live(f"{training.name} {share:4.0%}  loss {loss:.4f}")

        text = str(training.architecture)
        try:
            return self._run_job(worker, "train", text, training.seed, on_report=on_report)
        except JobError as error:
            return {"architecture": text, "seed": training.seed, "error": str(error)}
        finally:
            idle.put(worker)

    # For people

    def _rows(self) -> list[Row]:
        rows = []
        for entry in self.entries:
            measurement, trainings = None, {}
            if entry.architecture is not None:
                measurement = self.store.get(_measurement_key(entry.architecture))
                for seed in self.config.seeds:
                    training = Training(entry.name, entry.architecture, seed)
                    cell = self.store.get(training.key)
                    if cell is not None:
                        trainings[seed] = cell
            rows.append(
                study_row(entry, measurement, trainings, self.config.parameters, self.target_ms)
            )
        return rows

    def _publish(self) -> list[Row]:
        """Write and show what is known."""
        from rich.console import Console

        rows = self._rows()
        description = {
            "name": self.config.name,
            "target_parameters": self.config.parameters,
            "target_ms": self.target_ms,
            "device": self.device.describe(),
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": plain(self.config),
        }
        paths = write_results(self.folder, description, rows)
        # In a file, what is cut to the width of a terminal is hard to read.
        console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
        for matching in MATCHINGS:
            console.print(results_table(matching, rows))
        table, *others, figure = paths
        self.progress.say(f"table: {table} and {', '.join(path.name for path in others)}")
        self.progress.say(f"look at it: {figure}")
        return rows

    def _tell_entry(self, entry: Entry, number: int, watch: Stopwatch) -> None:
        total = len(self.arrangements)
        parts = [f"{number}/{total}", f"{entry.name:<30}", MATCHINGS[entry.matching]]
        if entry.architecture is None:
            parts.append(f"failed: {entry.error}")
        else:
            cell = self.store.get(_measurement_key(entry.architecture))
            assert cell is not None, "a size is chosen by its measurement"
            parts.append(f"{entry.num_blocks} blocks, w={entry.architecture.width}")
            parts.append(f"{entry.architecture.parameters():,} parameters")
            parts.append(f"{cell['latency_ms']:.4g} ms")
        if number < total:
            parts.append(f"ETA {format_duration(watch.seconds / number * (total - number))}")
        self.progress.say("  ".join(parts))

    def _tell_training(self, place: str, training: Training, cell: Cell, left_s: float) -> None:
        parts = [place, f"{training.name}, seed {training.seed}"]
        if "error" in cell:
            parts.append(f"failed: {cell['error']}")
        else:
            parts.append(f"loss {cell['loss']:.4f}")
            if cell["right"]:
                parts.append(f"cloze {cell['right'].count('1') / len(cell['right']):.1%}")
        if left_s:
            parts.append(f"ETA {format_duration(left_s)}")
        self.progress.say("  ".join(parts))


def _measurement_key(architecture: Architecture) -> str:
    return f"measurement-{architecture.digest}"
