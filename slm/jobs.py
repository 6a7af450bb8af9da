"""The jobs of a multirun: why one failed stands in its folder, whoever ran it and wherever."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Job:
    """One job of a multirun.

    overrides: what all were told, and what tells it from the others.
    """

    number: int
    folder: Path
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, config: DictConfig) -> Job:
        """The job that a composed config, its `hydra` node included, is of."""
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            hydra = config.hydra
            folder = Path(hydra.sweep.dir) / str(hydra.sweep.subdir)
            return cls(hydra.job.num, folder, tuple(hydra.overrides.task))
        finally:
            HydraConfig.instance().cfg = before

    @property
    def error(self) -> str | None:
        """Why it failed."""
        path = self.folder / ERROR_FILE
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def forget_error(self) -> None:
        """Before it begins anew."""
        (self.folder / ERROR_FILE).unlink(missing_ok=True)


def leave_error(folder: Path, reason: str) -> None:
    """Say in a job's folder why it failed; of several reasons the first stands."""
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), (folder / ERROR_FILE).open("x", encoding="utf-8") as file:
        file.write(reason + "\n")


def failure_lines(jobs: Sequence[Job]) -> list[str]:
    """One line for each job that failed, after one that counts them; none if none did."""
    failed = [(job, error) for job in jobs if (error := job.error) is not None]
    if not failed:
        return []
    common = set.intersection(*(set(job.overrides) for job in jobs))
    lines = [
        f"job {job.number} ({' '.join(each for each in job.overrides if each not in common)}): "
        f"{error.splitlines()[0]}"
        for job, error in failed
    ]
    return [f"{len(failed)} of {len(jobs)} jobs failed; the same command does them again", *lines]
