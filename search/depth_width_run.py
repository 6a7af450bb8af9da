"""One study of depth and width from start to end: latencies, trainings, law, report."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from search.cell_rows import Row
from search.cell_study import CellStudy, Training, print_table
from search.cells import Cell, measurement_key, training_key
from search.depth_width_config import DepthWidthConfig, Size
from search.depth_width_results import (
    Findings,
    choices_table,
    not_converged,
    size_row,
    sizes_table,
    training_rows,
    write_results,
)
from search.progress import Stopwatch, format_count, format_duration
from slm.architecture import Architecture


class DepthWidthStudy(CellStudy[DepthWidthConfig]):
    """A study of depth and width; see `CellStudy`."""

    kind: ClassVar[str] = "study of depth and width"

    @cached_property
    def sizes(self) -> dict[Size, Architecture]:
        """Every size of the grid."""
        return self.config.grid.sizes(self.corpus.vocab_size)

    def _make_cells(self) -> None:
        self._measure_all()
        self._train(self._trainings())

    def _measure_all(self) -> None:
        """Latency of every size, before anything is trained."""
        watch = Stopwatch()
        todo = {
            size: architecture
            for size, architecture in self.sizes.items()
            if self.store.get(measurement_key(architecture)) is None
        }
        self.progress.say(
            f"{len(self.sizes)} sizes, {len(self.sizes) - len(todo)} of them measured"
        )
        with self._measuring() as measure:
            for number, (size, architecture) in enumerate(todo.items(), start=1):
                cell = measure(architecture)
                left = len(todo) - number
                self._tell_size(size, architecture, cell, watch.seconds / number * left)

    def _trainings(self) -> list[Training]:
        """Every training, all sizes with one seed, then with the next.

        The largest first, so that no long one is left to the end; what cannot be measured is not
        trained.
        """
        found = []
        for seed in self.config.seeds:
            for size, architecture in sorted(
                self.sizes.items(), key=lambda item: -item[1].parameters()
            ):
                measurement = self.store.get(measurement_key(architecture))
                if size.is_trained and measurement is not None and "error" not in measurement:
                    found += [
                        Training(
                            self._training_name(size, budgets),
                            self._training_key(architecture, seed, budgets),
                            architecture,
                            seed,
                            budgets,
                        )
                        for budgets in self.config.budgets_of_trainings
                    ]
        return found

    def _training_name(self, size: Size, budgets: tuple[int, ...]) -> str:
        is_only = len(self.config.budgets_of_trainings) == 1
        return size.name if is_only else f"{size.name}, {format_count(budgets[-1])} tokens"

    def _training_key(self, architecture: Architecture, seed: int, budgets: tuple[int, ...]) -> str:
        key = training_key(architecture, seed)
        return key if len(self.config.budgets_of_trainings) == 1 else f"{key}-{budgets[-1]}"

    # For people

    def findings(self) -> Findings:
        """All that follows from what is known."""
        rows, trainings = [], []
        for place, (size, architecture) in enumerate(self.sizes.items()):
            own = [
                row
                for cell in self._cells_of(size, architecture)
                for row in training_rows(place, size, cell)
            ]
            measurement = self.store.get(measurement_key(architecture))
            rows.append(size_row(size, architecture, measurement, own))
            trainings += own
        return Findings(rows, trainings, self.config.budgets_ms)

    def _cells_of(self, size: Size, architecture: Architecture) -> list[Cell]:
        """Those of its trainings that are known."""
        if not size.is_trained:
            return []
        cells = [
            self.store.get(self._training_key(architecture, seed, budgets))
            for seed in self.config.seeds
            for budgets in self.config.budgets_of_trainings
        ]
        return [cell for cell in cells if cell is not None]

    def _publish(self) -> list[Row]:
        if not any(self.store.get(measurement_key(each)) for each in self.sizes.values()):
            return []
        findings = self.findings()
        config = self.config
        trainings = self._trainings()
        num_missing = sum(self.store.get(each.key) is None for each in trainings)
        missing = (
            f"{num_missing} of {len(trainings)} trainings are missing" if num_missing else None
        )
        description = {**self._description(), "missing": missing}
        paths = write_results(self.folder, description, findings, config.grid, config.plugins)
        print_table(sizes_table(findings))
        if findings.choices:
            print_table(choices_table(findings.choices))
        if missing is not None:
            self.progress.say(f"{missing}; the same command makes them")
        for line in self._verdict(findings):
            self.progress.say(line)
        table, *others, report = paths
        self.progress.say(f"table: {table} and {', '.join(path.name for path in others)}")
        self.progress.say(f"look at it: {report}")
        return findings.rows

    def _verdict(self, findings: Findings) -> list[str]:
        """What is to be thought of it."""
        lines = []
        unsure = not_converged(findings.rows, self.config.protocol.max_interval_percent)
        if unsure is not None:
            lines.append(unsure)
        analysis = findings.analysis
        if analysis is None:
            return [*lines, "nothing is trained yet"]
        if analysis.is_trusted:
            summary = analysis.summary()
            for name, (value, low, high) in summary["constants"].items():
                lines.append(f"{name} = {value:.4g} [{low:.4g}, {high:.4g}]")
            error = summary["extrapolation"]["largest_error"]
            lines.append(f"held-out largest sizes are predicted within {error:.1%}")
        else:
            lines.append("the law is not to be trusted, and no size is chosen by it:")
            lines += [f"- {doubt}" for doubt in analysis.doubts]
        return [*lines, findings.summary()["finding"]]

    def _tell_size(self, size: Size, architecture: Architecture, cell: Cell, left_s: float) -> None:
        parts = [f"{size.name:<8}", f"{architecture.parameters():,} parameters"]
        parts.append(
            f"failed: {cell['error']}" if "error" in cell else f"{cell['latency_ms']:.4g} ms"
        )
        if left_s:
            parts.append(f"ETA {format_duration(left_s)}")
        self.progress.say("  ".join(parts))
