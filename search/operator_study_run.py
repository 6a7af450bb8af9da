"""One operator study from start to end: sizes, latencies, trainings, table and figure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

from search.cell_rows import Row
from search.cell_study import CellStudy, Training, print_table
from search.cells import Cell, measurement_key, training_key
from search.operator_study_config import StudyConfig
from search.operator_study_evaluator import OperatorEvaluator
from search.operator_study_results import (
    MATCHINGS,
    Entry,
    Matching,
    results_table,
    study_row,
    write_results,
)
from search.progress import Stopwatch, format_duration
from search.study_design import Arrangement, match_latency, match_parameters
from slm.architecture import Architecture
from slm.config import ConfigError


class MeasurementError(Exception):
    """A model could not be measured; the message is the reason."""


class OperatorStudy(CellStudy[StudyConfig]):
    """A study of operators; see `CellStudy`."""

    kind: ClassVar[str] = "operator study"

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self.arrangements = config.space.arrangements()
        self.labels = config.space.labels()
        self.entries: list[Entry] = []

    def _evaluator(self) -> OperatorEvaluator:
        return OperatorEvaluator(
            **self._evaluator_settings(), accuracy_items=self.config.accuracy_items
        )

    def _make_cells(self) -> None:
        self._choose_sizes()
        self._train(self._trainings())

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
        with self._measuring() as measure:
            measure_ms = partial(_latency_ms, measure)
            self._match_all("parameters", lambda a: _measurable(matched[a], measure_ms))
            target_ms = self.target_ms
            if target_ms is None:
                cell = self.store.get(measurement_key(matched[self.arrangements[0]]))
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

    @property
    def target_ms(self) -> float | None:
        """The latency to match: what was given, else the reference's; None until it is known."""
        if self.config.target_ms is not None or not self.entries:
            return self.config.target_ms
        reference = self.entries[0].architecture
        cell = self.store.get(measurement_key(reference)) if reference is not None else None
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

    # Trainings

    def _trainings(self) -> list[Training]:
        """Every training of the study once; all models with one seed, then with the next."""
        found: dict[str, Training] = {}
        for seed in self.config.seeds:
            for entry in self.entries:
                if entry.architecture is not None:
                    name = f"{entry.name} {MATCHINGS[entry.matching]}"
                    key = training_key(entry.architecture, seed)
                    budgets = self.config.proxy.rung_tokens
                    training = Training(name, key, entry.architecture, seed, budgets)
                    found.setdefault(key, training)
        return list(found.values())

    # For people

    def _rows(self) -> list[Row]:
        rows = []
        for entry in self.entries:
            measurement, trainings = None, {}
            if entry.architecture is not None:
                measurement = self.store.get(measurement_key(entry.architecture))
                for seed in self.config.seeds:
                    cell = self.store.get(training_key(entry.architecture, seed))
                    if cell is not None:
                        trainings[seed] = cell
            rows.append(
                study_row(entry, measurement, trainings, self.config.parameters, self.target_ms)
            )
        return rows

    def _publish(self) -> list[Row]:
        if not self.entries:
            return []
        rows = self._rows()
        targets = {"target_parameters": self.config.parameters, "target_ms": self.target_ms}
        paths = write_results(self.folder, self._description() | targets, rows)
        for matching in MATCHINGS:
            print_table(results_table(matching, rows))
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
            cell = self.store.get(measurement_key(entry.architecture))
            assert cell is not None, "a size is chosen by its measurement"
            parts.append(f"{entry.num_blocks} blocks, w={entry.architecture.width}")
            parts.append(f"{entry.architecture.parameters():,} parameters")
            parts.append(f"{cell['latency_ms']:.4g} ms")
        if number < total:
            parts.append(f"ETA {format_duration(watch.seconds / number * (total - number))}")
        self.progress.say("  ".join(parts))

    def _training_words(self, cell: Cell) -> list[str]:
        words = super()._training_words(cell)
        if cell["right"]:
            words.append(f"cloze {cell['right'].count('1') / len(cell['right']):.1%}")
        return words


def _latency_ms(measure: Callable[[Architecture], Cell], architecture: Architecture) -> float:
    """Latency of one request. Raises MeasurementError with the reason if there is none."""
    cell = measure(architecture)
    if "error" in cell:
        raise MeasurementError(f"not measured: {cell['error']}")
    latency_ms: float = cell["latency_ms"]
    return latency_ms


def _measurable(
    architecture: Architecture, measure_ms: Callable[[Architecture], float]
) -> Architecture:
    """The architecture, which can be measured."""
    measure_ms(architecture)
    return architecture
