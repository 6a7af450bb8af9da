"""The table of a multirun: one row per job, gathered from the jobs' folders."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from slm.training.files import write_atomically

TABLE_FILE = "results.csv"


class GatherResults(Callback):
    """Hydra callback that writes `results.csv` in a sweep's folder.

    After each job, so that the table is there even if a later job fails; and once at the end, when
    no two jobs can write at the same time.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A job of a sweep has ended, well or not."""
        if config.hydra.mode == RunMode.MULTIRUN or HydraConfig.get().mode == RunMode.MULTIRUN:
            gather(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """All jobs have ended."""
        gather(Path(config.hydra.sweep.dir))


def gather(sweep_dir: Path) -> Path:
    """Write `results.csv` of the jobs found in `sweep_dir`: overrides, status, numbers."""
    jobs = sorted((path for path in sweep_dir.iterdir() if path.name.isdigit()), key=_number)
    rows = [_row(job) for job in jobs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(sweep_dir / TABLE_FILE, text.getvalue())
    return sweep_dir / TABLE_FILE


def _number(job: Path) -> int:
    return int(job.name)


def _row(job: Path) -> dict[str, Any]:
    """What a job was told, and what it found."""
    row: dict[str, Any] = {"job": job.name, "status": "unfinished"}
    overrides_file = job / ".hydra" / "overrides.yaml"
    if overrides_file.exists():
        overrides: Any = OmegaConf.load(overrides_file)
        row |= {key: value for key, _, value in (text.partition("=") for text in overrides)}
    result_file = job / "result.json"
    if result_file.exists():
        row["status"] = "finished"
        result = json.loads(result_file.read_text(encoding="utf-8"))
        row |= {key: value for key, value in result.items() if not isinstance(value, dict)}
    return row
