"""The files of a run folder, written from what the study knows.

search.json             what is searched, where, with what
candidates.json         every candidate; history.parquet: the same as a table
frontier.json           the frontier as a whole
frontier/model/*.yaml   its members as Hydra configs, frontier/chosen: the digest of the best
report.html             all of it, to look at
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from search.audit import audit_summary, noise_of
from search.config import SearchConfig, plain
from search.model_yaml import write_models
from search.results import (
    Row,
    candidate_yaml,
    frontier_summary,
    is_scored,
    mark,
    table_summary,
)
from search.space import SearchSpace
from search.standings import Standings
from search.study import Study, flatten
from slm.training.files import temporary_path, write_atomically

PACKAGES = ("torch", "optuna", "moocore", "slm-frontier")
# What `frontier.json` repeats of `search.json`, so that it can be read alone.
COMMON = (
    *("name", "seed", "target_ms", "target_source", "reference", "limits", "workload"),
    *("device", "device_key", "machine", "versions"),
)


class RunFolder:
    """Writes the files of a search."""

    def __init__(
        self,
        folder: Path,
        config: SearchConfig,
        space: SearchSpace,
        study: Study,
        command: Sequence[str],
    ) -> None:
        self.folder = folder
        self.config = config
        self.space = space
        self.study = study
        self.command = command
        self.standings = Standings(
            study, space, config.workload.max_tokens, config.evolution.quality
        )

    def rows(self) -> list[Row]:
        """Every candidate, in the order of their numbers, with what others decide about it."""
        self.standings.update()
        mark(self.standings.rows, self.study.fact("cloze_errors") or {})
        return self.standings.rows

    def summary(self) -> Row:
        """The frontier as a whole."""
        setup = self.study.fact("setup")
        quality = self.config.evolution.quality
        audit = audit_summary(self.config, self.study)
        return {
            **frontier_summary(
                self.rows(),
                setup["target_ms"],
                setup["vocab_size"],
                quality,
                noise_of(audit, quality),
            ),
            "audit": audit,
        }

    def publish(self, status: str, seconds: float) -> None:
        """Write all files but the report. status: running, interrupted or finished."""
        self.study.update("seconds", seconds)
        rows = self.rows()
        description = self._description(rows, status, seconds)
        write_json(self.folder / "search.json", description)
        write_json(self.folder / "candidates.json", rows)
        if any(map(is_scored, rows)):
            self._write_frontier(self.summary() | {key: description[key] for key in COMMON})
        if status != "running":
            write_parquet(self.folder / "history.parquet", list(map(_with_limits_spread, rows)))
        self.study.update("status", status)

    def write_report(self) -> None:
        """Write `report.html`."""
        from search.report import write_report

        write_report(self.folder)

    def _write_frontier(self, summary: Row) -> None:
        """Write `frontier.json`, and a model config per member."""
        texts = {
            row["digest"]: candidate_yaml(row, self.folder, self.config.plugins)
            for row in summary["members"]
        }
        write_models(self.folder, texts)
        if summary["chosen"] is not None:
            write_atomically(self.folder / "frontier" / "chosen", summary["chosen"] + "\n")
        write_json(self.folder / "frontier.json", summary)

    def _description(self, rows: list[Row], status: str, seconds: float) -> Row:
        """What `search.json` holds."""
        setup, config = self.study.fact("setup"), plain(self.config)
        sizes = ("vocab_size", "train_tokens", "validation_tokens", "bytes_per_token")
        return {
            "name": self.config.name,
            "status": status,
            "seed": self.config.seed,
            "started_at": setup["started_at"],
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "command": ["python", "-m", "search", *self.command],
            "num_candidates": self.config.num_candidates,
            "quality": self.config.evolution.quality,
            **{key: setup[key] for key in ("target_ms", "target_source", "reference")},
            "limits": {
                name: limit | setup["limits"][name] for name, limit in config["limits"].items()
            },
            "table": {"path": setup["table"], "error": table_summary(rows)},
            **{key: config[key] for key in ("workload", "space", "evolution", "proxy", "task")},
            **{key: setup[key] for key in ("device", "machine")},
            "device_key": setup["device"]["key"],
            "legend": {short: text for text, short in self.space.legend.items()},
            "data": {**config["data"], **{key: setup[key] for key in sizes}},
            "versions": {
                "python": platform.python_version(),
                **{package: metadata.version(package) for package in PACKAGES},
            },
        }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a table, whole or not at all; lists and objects as JSON text."""
    import pandas as pd

    flat = [
        {
            key: json.dumps(value) if isinstance(value, list | dict) else value
            for key, value in row.items()
        }
        for row in rows
    ]
    temporary = temporary_path(path)
    pd.DataFrame(flat).to_parquet(temporary, index=False)
    os.replace(temporary, path)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of the same fields, whole or not at all; a list's items with spaces between."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        texts = {key: " ".join(map(str, v)) for key, v in row.items() if isinstance(v, list)}
        writer.writerow(row | texts)
    write_atomically(path, out.getvalue())


def _with_limits_spread(row: Row) -> Row:
    """A row with a field for each figure measured under a limit, 'limits.long.latency_ms'."""
    limits = flatten({"limits": row["limits"]})
    return {key: value for key, value in row.items() if key != "limits"} | limits
