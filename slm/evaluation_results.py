"""What evaluation found of a model: a table, and a JSON file that further results are added to.

    {"model": {"path": "runs/train", "sha256": …},
     "tasks": {"piqa": {"metric": "acc", "value": 0.61, "stderr": 0.011, "low": 0.59, "high": 0.63,
                        "n": 1838, "metrics": {"acc": {…}, "acc_norm": {…}},
                        "settings": {…}, "versions": {…}, "seed": 0}, …}}

`metric` is the task's first, and its figures stand beside it; `metrics` holds all. `low` and `high`
are a 95 % interval, null where there is none. `n` counts questions or documents.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from slm.training.files import write_atomically

if TYPE_CHECKING:
    import rich.table

# Its name in the folder of a run or of an export.
EVALUATION_FILE = "evaluation.json"
PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Figure:
    """A metric's value with its standard error and 95 % interval, where there are any."""

    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """As it stands in the file: null also for what is infinite."""
        return {
            name: None if value is None or not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Result:
    """What came out of a task.

    metrics: by name, the one to look at first. n: questions or documents. counts, settings,
    versions: what else is to be known of it.
    """

    metrics: dict[str, Figure]
    n: int
    settings: dict[str, Any]
    seed: int
    versions: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        name, figure = next(iter(self.metrics.items()))
        return {
            "metric": name,
            **figure.to_json(),
            "n": self.n,
            "metrics": {name: each.to_json() for name, each in self.metrics.items()},
            "settings": self.settings,
            "versions": {name: version(name) for name in PACKAGES} | self.versions,
            "seed": self.seed,
        }


def is_result_file(path: Path) -> bool:
    """Whether a file holds results."""
    return bool(_read(path))


def known_results(path: Path, weights: Sequence[Path]) -> dict[str, Any]:
    """By task, what a file holds as `Result.to_json` gives it, if it is of these weights."""
    known = _read(path)
    # Of large weights the digest takes seconds.
    return known["tasks"] if known and known["model"]["sha256"] == _digest(weights) else {}


def is_of(path: Path, weights: Sequence[Path]) -> bool:
    """Whether the results in a file, if there are any, are of these weights."""
    known = _read(path)
    return not known or known["model"]["sha256"] == _digest(weights)


def add_results(
    path: Path, model: Path, weights: Sequence[Path], results: Mapping[str, Result]
) -> None:
    """Add results of a model to a file; those of other tasks stay, if they are of these weights.

    model: its path, as it was given. weights: the files, or the folders, that hold them.
    """
    identity = {"path": str(model), "sha256": _digest(weights)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another evaluation may end at the same moment. The lock, a file that stays, lies beside the
    # folder: what lies in an export is uploaded.
    folder = path.parent.resolve()
    with FileLock(folder.parent / f".{folder.name}.lock"):
        tasks = known_results(path, weights)
        tasks |= {name: result.to_json() for name, result in results.items()}
        write_atomically(path, json.dumps({"model": identity, "tasks": tasks}, indent=2) + "\n")


def results_table(results: Mapping[str, Result]) -> rich.table.Table:
    """A line for each metric of each task."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(caption="intervals: 95 %")
    for column in ("task", "metric", "value", "interval", "n"):
        is_text = column in ("task", "metric")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for task, result in results.items():
        for name, figure in result.metrics.items():
            interval = "" if figure.low is None else f"{figure.low:.4f} – {figure.high:.4f}"
            table.add_row(escape(task), name, f"{figure.value:.4f}", interval, f"{result.n:,}")
    return table


def _digest(weights: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in (file for each in weights for file in _files(each)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) or [path]


def _read(path: Path) -> dict[str, Any]:
    """What a file of results holds; empty if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_ours = isinstance(content["tasks"], dict) and isinstance(content["model"]["sha256"], str)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return content if is_ours else {}
