"""What an operator study has found: rows, intervals, files and what is printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from search.cell_rows import Row, architecture_fields, measurement_fields
from search.cells import Cell
from search.noise import mean_interval
from search.run_folder import write_csv, write_json, write_parquet
from slm.architecture import Architecture
from slm.evaluation import wilson_interval
from slm.training.files import write_atomically

Matching = Literal["parameters", "latency"]

MATCHINGS: dict[Matching, str] = {
    "parameters": "at equal parameter count",
    "latency": "at equal measured latency",
}


@dataclass(frozen=True)
class Entry:
    """An arrangement at the size that a matching gave it; without one, `error` says why.

    mixers: labels of the one or two mixers. num_blocks: how often the block is repeated.
    """

    matching: Matching
    mixers: tuple[str, ...]
    num_blocks: int | None
    architecture: Architecture | None
    error: str | None = None

    @property
    def name(self) -> str:
        """'deltanet + mamba2'."""
        return " + ".join(self.mixers)


def study_row(
    entry: Entry,
    measurement: Cell | None,
    trainings: Mapping[int, Cell],
    target_parameters: int,
    target_ms: float | None,
) -> Row:
    """One flat row of the study; what is not known is None.

    trainings: by seed.
    """
    architecture = entry.architecture
    row: Row = {
        "matching": entry.matching,
        "name": entry.name,
        "mixers": list(entry.mixers),
        "blocks": entry.num_blocks,
        **architecture_fields(architecture),
        "parameters_deviation": None,
        "latency_deviation": None,
        **measurement_fields(measurement),
    }
    if architecture is not None:
        row["parameters_deviation"] = row["parameters"] / target_parameters - 1
    if row["latency_ms"] is not None and target_ms is not None:
        row["latency_deviation"] = row["latency_ms"] / target_ms - 1
    failures = [] if entry.error is None else [entry.error]
    failures += [f"seed {seed}: {c['error']}" for seed, c in trainings.items() if "error" in c]
    done = {seed: cell for seed, cell in trainings.items() if "error" not in cell}
    losses = [cell["loss"] for cell in done.values()]
    loss_low, loss_high = mean_interval(losses)
    accuracy, accuracy_low, accuracy_high = pooled_accuracy([c["right"] for c in done.values()])
    return row | {
        "loss": statistics.fmean(losses) if losses else None,
        "loss_low": loss_low,
        "loss_high": loss_high,
        "bits_per_byte": _mean([cell["bits_per_byte"] for cell in done.values()]),
        "accuracy": accuracy,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "accuracy_items": max((len(cell["right"]) for cell in done.values()), default=0),
        "seeds": list(done),
        "losses": losses,
        "training_seconds": _mean([cell["seconds"] for cell in done.values()]),
        "error": "; ".join(failures) or None,
    }


def pooled_accuracy(answers: Sequence[str]) -> tuple[float | None, float | None, float | None]:
    """Share of right answers over seeds, with its 95 % interval over the questions.

    Every seed answers the same questions, so answers to one question are not independent: Wilson's
    interval is taken at the effective number of answers (Dean and Pagano 2015), at which a
    binomial share would vary as the mean over questions does.
    answers: of each seed, '0110…'.
    """
    if not answers or not answers[0]:
        return None, None, None
    shares = [statistics.fmean(map(int, column)) for column in zip(*answers, strict=True)]
    accuracy = statistics.fmean(shares)
    num_answers = len(answers) * len(shares)
    variance = statistics.pvariance(shares) / len(shares)
    # Where nothing varies, only the questions count.
    effective = accuracy * (1 - accuracy) / variance if variance else len(shares)
    effective = min(effective, num_answers)
    result = wilson_interval(accuracy * effective, effective)
    return accuracy, result.low, result.high


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def write_results(folder: Path, description: Row, rows: Sequence[Row]) -> list[Path]:
    """Write operators.json, .parquet, .csv and .html; their paths."""
    from search.operator_study_figure import figure_page

    paths = [folder / f"operators.{ending}" for ending in ("json", "parquet", "csv", "html")]
    write_json(paths[0], {**description, "rows": rows})
    write_parquet(paths[1], rows)
    write_csv(paths[2], rows)
    write_atomically(paths[3], figure_page(description, rows))
    return paths


def results_table(matching: Matching, rows: Sequence[Row]) -> Table:
    """The rows of a matching, lowest loss first."""
    table = Table(
        title=f"operators {MATCHINGS[matching]}",
        caption="± and [ ]: 95 % intervals; !: other work took the CPU meanwhile",
    )
    columns: dict[str, Literal["left", "right"]] = {
        "block": "left",
        "model": "left",
        "parameters": "right",
        "request, ms": "right",
        "per token, ms": "right",
        "first token, ms": "right",
        "state, bytes": "right",
        "loss, nats": "right",
        "cloze, %": "right",
    }
    for column, justify in columns.items():
        is_name = column == "block"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=is_name)
    chosen = [row for row in rows if row["matching"] == matching]
    for row in sorted(chosen, key=lambda row: math.inf if row["loss"] is None else row["loss"]):
        table.add_row(*_texts(row))
        if row["error"] is not None:
            table.add_row(f"  failed: {row['error']}")
    return table


def _texts(row: Row) -> list[str]:
    """A row as the table has it."""
    if row["architecture"] is None:
        return [row["name"]]
    texts = [
        row["name"],
        f"{row['blocks']} × w={row['width']}",
        f"{row['parameters']:,} ({row['parameters_deviation']:+.1%})",
    ]
    if row["latency_ms"] is None:
        texts += ["–"] * 4
    else:
        mark = "" if row["is_quiet"] else "!"
        deviation = row["latency_deviation"]
        share = "" if deviation is None else f" ({deviation:+.1%})"
        texts.append(f"{_time(row, 'latency')}{mark}{share}")
        texts += [_time(row, "tpot"), _time(row, "ttft"), f"{row['state_bytes']:,}"]
    if row["loss"] is None:
        return [*texts, "–", "–"]
    half = "" if row["loss_low"] is None else f" ± {row['loss'] - row['loss_low']:.4f}"
    texts.append(f"{row['loss']:.4f}{half}")
    if row["accuracy"] is None:
        return [*texts, "–"]
    low, high = 100 * row["accuracy_low"], 100 * row["accuracy_high"]
    return [*texts, f"{100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}]"]


def _time(row: Row, name: str) -> str:
    half = (row[f"{name}_high_ms"] - row[f"{name}_low_ms"]) / 2
    return f"{row[f'{name}_ms']:.4g} ± {half:.2g}"
