"""A multirun of trainings: what cannot be one, and its table, a row per job."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from slm import slurm
from slm.jobs import ERROR_FILE
from slm.training.files import write_atomically

TABLE_FILE = "results.csv"


def sweep_problems(devices: int) -> list[str]:
    """What is wrong with the command that is being run, for jobs of so many devices each.

    Lightning starts a process for each further device with the command of the first, so that each
    would run the whole sweep again; it starts none where torchrun or Slurm has started them.
    """
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    name = hydra.runtime.choices.get("hydra/launcher")
    if hydra.mode != RunMode.MULTIRUN:
        if name in (None, "basic"):
            return []
        return [f"hydra/launcher: '{name}' launches the jobs of a sweep; add -m"]
    if slurm.is_chosen(hydra):
        found, tasks = slurm.problems(), hydra.launcher.tasks_per_node
        if tasks != devices:
            found.append(
                f"hydra.launcher.tasks_per_node: must be trainer.devices={devices}, a process for "
                f"each, got {tasks}"
            )
        return found
    if devices == 1 or "LOCAL_RANK" in os.environ:
        return []
    return [
        f"trainer.devices: a sweep of jobs with {devices} devices each needs processes that are "
        f"started from outside: python -m torch.distributed.run --nproc-per-node={devices} "
        f"train.py -m …, or hydra/launcher=slurm hydra.launcher.tasks_per_node={devices}"
    ]


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
    result_file, error_file = job / "result.json", job / ERROR_FILE
    if error_file.exists():
        row |= {"status": "failed", "error": error_file.read_text(encoding="utf-8").strip()}
    elif result_file.exists():
        row["status"] = "finished"
        result = json.loads(result_file.read_text(encoding="utf-8"))
        row |= {key: value for key, value in result.items() if not isinstance(value, dict)}
    return row
