"""What a study of depth and width has found: rows, files and what is printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from search.cell_rows import Row, architecture_fields, measurement_fields
from search.cells import Cell
from search.depth_width_analysis import (
    Analysis,
    analyse,
    choose,
    default_budgets_ms,
    depth_findings,
)
from search.depth_width_config import GridConfig, Size
from search.depth_width_law import interval, relative_errors
from search.model_yaml import model_yaml, training_command, write_models
from search.noise import mean_interval
from search.progress import format_count
from search.run_folder import write_csv, write_json, write_parquet
from slm.architecture import Architecture
from slm.training.files import write_atomically

# Fields that the law fills in.
PREDICTED = ("predicted_perplexity", "predicted_low", "predicted_high")


def size_row(
    size: Size, architecture: Architecture, measurement: Cell | None, trainings: Sequence[Row]
) -> Row:
    """One flat row of a size; what is not known is None.

    trainings: the size's, see `training_rows`. Perplexity is that after the largest budget.
    """
    failures = []
    if measurement is not None and "error" in measurement:
        failures.append(f"not measured: {measurement['error']}")
    failures += [f"seed {each['seed']}: {each['error']}" for each in trainings if "error" in each]
    done = [each for each in trainings if "error" not in each]
    last = [each for each in done if each["tokens"] == max(other["tokens"] for other in done)]
    perplexities = [math.exp(each["loss"]) for each in last]
    low, high = mean_interval(perplexities)
    return {
        "depth": size.depth,
        **architecture_fields(architecture),
        "is_trained": size.is_trained,
        **measurement_fields(measurement),
        "perplexity": statistics.fmean(perplexities) if perplexities else None,
        "perplexity_low": low,
        "perplexity_high": high,
        "seeds": [each["seed"] for each in last],
        "losses": [each["loss"] for each in last],
        "training_seconds": statistics.fmean(e["seconds"] for e in last) if last else None,
        # Of the law, which knows all rows.
        **dict.fromkeys((*PREDICTED, "law_error", "is_held_out")),
        "error": "; ".join(failures) or None,
    }


def training_rows(place: int, size: Size, cell: Cell) -> list[Row]:
    """A training of the size in this place among all: a row per token budget, or one `error`."""
    row: Row = {"size": place, "depth": size.depth, "width": size.width, "seed": cell["seed"]}
    if "error" in cell:
        return [row | {"error": cell["error"]}]
    return [
        row | {"tokens": rung["tokens"], "loss": rung["loss"], "seconds": cell["seconds"]}
        for rung in cell["rungs"]
    ]


class Findings:
    """All that follows from the rows of the sizes and of their trainings.

    rows: of all sizes, with what the law says of each. choices: the best within each budget.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        trainings: Sequence[Row],
        budgets_ms: Sequence[float] | None,
    ) -> None:
        self.trainings = [each for each in trainings if "error" not in each]
        self.analysis = analyse(rows, self.trainings)
        self.rows = list(map(dict, rows))
        if self.analysis is not None and self.analysis.law is not None:
            _fill_in(self.rows, self.analysis)
        self.budgets_ms = budgets_ms if budgets_ms is not None else default_budgets_ms(rows)
        self.choices = choose(self.rows, self.budgets_ms, self.analysis)

    @property
    def is_trusted(self) -> bool:
        """Whether the law says which size is best; else the trainings do."""
        return self.analysis is not None and self.analysis.is_trusted

    def summary(self) -> Row:
        """JSON-able, and enough to find all of it again."""
        return {
            "law": self.analysis.summary() if self.analysis is not None else None,
            "budgets_ms": list(self.budgets_ms),
            "choices": self.choices,
            "finding": depth_findings(self.choices),
            "rows": self.rows,
            "trainings": self.trainings,
        }


def _fill_in(rows: Sequence[Row], analysis: Analysis) -> None:
    """What the law says of every size; a law that is not trusted only where it misses."""
    predicted, resampled = analysis.predictions(rows)
    observations = analysis.observations
    assert analysis.law is not None
    errors = relative_errors(observations, analysis.law)
    held_out = analysis.extrapolation.sizes if analysis.extrapolation is not None else ()
    is_last = (observations.factors[:, 2:] == observations.factors[:, 2:].max(axis=0)).all(axis=1)
    for place, row in enumerate(rows):
        if analysis.is_trusted:
            low, high = interval(resampled[:, place])
            values = (float(predicted[place]), low, high)
            row |= dict(zip(PREDICTED, values, strict=True))
        own = errors[(observations.sizes == place) & is_last]
        if len(own):
            row["law_error"] = float(own.mean())
            row["is_held_out"] = place in held_out


def write_results(
    folder: Path,
    description: Mapping[str, Any],
    findings: Findings,
    grid: GridConfig,
    plugins: Sequence[str],
) -> list[Path]:
    """Write depth_width.json, .parquet and .csv, report.html and a model config per choice.

    Their paths, the report's last.
    """
    from search.depth_width_figure import report_page

    paths = [folder / f"depth_width.{ending}" for ending in ("json", "parquet", "csv")]
    summary = {**description, **findings.summary()}
    write_json(paths[0], summary)
    write_parquet(paths[1], findings.rows)
    write_csv(paths[2], findings.rows)
    budgets: dict[str, list[str]] = {}
    for choice in findings.choices:
        budgets.setdefault(choice["digest"], []).append(f"{choice['budget_ms']:g}")
    within = {digest: ", ".join(texts) for digest, texts in budgets.items()}
    commands = {within[digest]: training_command(folder, digest, plugins) for digest in within}
    texts = {
        choice["digest"]: _choice_yaml(choice, findings.rows, grid, commands, within)
        for choice in findings.choices
    }
    write_models(folder, texts)
    report = folder / "report.html"
    write_atomically(report, report_page(summary, findings, commands))
    return [*paths, report]


def _choice_yaml(
    choice: Row,
    rows: Sequence[Row],
    grid: GridConfig,
    commands: Mapping[str, str],
    within: Mapping[str, str],
) -> str:
    """A Hydra config of the group `model`.

    within: the budgets of which it is the best, by digest. commands: what trains it, by these.
    """
    row = next(row for row in rows if row["digest"] == choice["digest"])
    budgets = within[row["digest"]]
    by = "by the law" if choice["by"] == "law" else "of those trained"
    return model_yaml(
        Architecture.parse(row["architecture"]),
        grid.pattern,
        row["depth"],
        {letter: list(map(str, block.parse())) for letter, block in grid.blocks.items()},
        [
            commands[budgets],
            f"The best depth and width within {budgets} ms, {by}: "
            f"{row['latency_ms']:.4g} ms, perplexity {choice['perplexity']:.4g}.",
        ],
    )


def sizes_table(findings: Findings) -> Table:
    """Every size; with the law's perplexity where it is to be trusted."""
    table = Table(
        title="depth × width",
        caption="± and [ ]: 95 % intervals; !: other work took the CPU meanwhile; "
        "~: the interval of the latency is wider than asked",
    )
    columns: dict[str, Literal["left", "right"]] = {
        "blocks × width": "right",
        "parameters": "right",
        "request, ms": "right",
        "perplexity": "right",
        **({"by the law": "right"} if findings.is_trusted else {}),
        "remark": "left",
    }
    for column, justify in columns.items():
        table.add_column(column, justify=justify)
    for row in findings.rows:
        texts = [f"{row['depth']} × {row['width']}", format_count(row["parameters"])]
        texts += [_latency(row), _perplexity(row)]
        if findings.is_trusted:
            low, high = row["predicted_low"], row["predicted_high"]
            texts.append(f"{row['predicted_perplexity']:.4g} [{low:.4g}, {high:.4g}]")
        remark = "" if row["is_trained"] else "only measured"
        table.add_row(*texts, row["error"] or remark)
    return table


def choices_table(choices: Sequence[Row]) -> Table:
    """The best size within each budget."""
    by_law = any(choice["by"] == "law" for choice in choices)
    table = Table(title=f"best within a budget, {'by the law' if by_law else 'of those trained'}")
    columns = ["budget, ms", "blocks × width", "parameters", "request, ms", "perplexity"]
    for column in [*columns, *(["best depth, 95 %"] if by_law else [])]:
        table.add_column(column, justify="right")
    for choice in choices:
        texts = [
            f"{choice['budget_ms']:g}",
            f"{choice['depth']} × {choice['width']}",
            format_count(choice["parameters"]),
            f"{choice['latency_ms']:.4g}{'' if choice['has_converged'] else '~'}",
            f"{choice['perplexity']:.4g}",
        ]
        if by_law:
            texts.append(f"{choice['depth_low']} to {choice['depth_high']}")
        table.add_row(*texts)
    return table


def not_converged(rows: Sequence[Row], max_interval_percent: float) -> str | None:
    """Which latencies are less certain than asked, in a sentence; None if none is."""
    names = [f"{row['depth']} × {row['width']}" for row in rows if row["has_converged"] is False]
    if not names:
        return None
    return (
        f"latency of {len(names)} of {len(rows)} sizes is not known to {max_interval_percent:g} %: "
        f"{', '.join(names)}"
    )


def _latency(row: Row) -> str:
    if row["latency_ms"] is None:
        return "–"
    half = (row["latency_high_ms"] - row["latency_low_ms"]) / 2
    marks = ("" if row["is_quiet"] else "!") + ("" if row["has_converged"] else "~")
    return f"{row['latency_ms']:.4g} ± {half:.2g}{marks}"


def _perplexity(row: Row) -> str:
    if row["perplexity"] is None:
        return "–"
    if row["perplexity_low"] is None:
        return f"{row['perplexity']:.4g}"
    return f"{row['perplexity']:.4g} ± {row['perplexity'] - row['perplexity_low']:.2g}"
