"""A search whose candidates cost nothing: scores are invented, all else is a search's own.

What `benchmarks/search_overhead.py` times and `benchmarks/chaos.py` kills.

python benchmarks/cheap_search.py FOLDER --candidates 100 --storage journal
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cheap_evaluator import CheapEvaluator, predicted_ms
from omegaconf import open_dict

from latency.workload import Workload
from search import run
from search.config import SearchConfig, read_config
from search.run import Search
from search.searcher import Searcher
from search.worker import Worker, WorkerProcess
from slm.architecture import Architecture
from slm.config import EXIT_BAD_CONFIG, ConfigError, compose

STORAGES = ("sqlite", "journal", "postgresql")
VOCAB_SIZE = 4096
TARGET_MS = 12.0
RUNG_TOKENS = (125_000, 500_000, 2_000_000)


class CheapSearcher(Searcher):
    """A searcher that neither prepares a corpus nor measures a table."""

    seconds = 0.0

    @cached_property
    def corpus(self) -> Any:
        """Of which the vocabulary's size is all that there is."""
        return SimpleNamespace(vocab_size=VOCAB_SIZE, train=range(10**6))

    @cached_property
    def tables(self) -> Any:
        """What is asked for are the references' times, which nobody uses."""
        key = self.config.workload, self.config.space.meta_tokens[0]
        return {key: SimpleNamespace(reference_times=None)}

    def _predict_ms(self, architecture: Architecture, workload: Workload) -> float:
        return predicted_ms(architecture)

    @cached_property
    def worker(self) -> Worker:
        """The process that invents scores."""
        worker = Worker(CheapEvaluator(self.candidates_folder, self.seconds), early=self.early)
        self.resources.callback(worker.close)
        return worker

    def _setup(self) -> dict[str, Any]:
        reference = self.space.reference(VOCAB_SIZE)
        return {
            "target_ms": TARGET_MS,
            "target_source": "given",
            "reference": {
                "name": self.config.space.reference.seed,
                "architecture": str(reference),
                "digest": reference.digest,
                "parameters": reference.parameters(),
                **self.run_job("measure", str(reference), self.config.workload, 1.0),
            },
            "table": "",
            "device": self.device.describe(),
            "machine": {},
            "started_at": "",
            "vocab_size": VOCAB_SIZE,
            "train_tokens": 10**6,
            "validation_tokens": 10**5,
            "bytes_per_token": 3.0,
        }


def cheap_search(
    folder: Path,
    num_candidates: int,
    storage: str,
    *overrides: str,
    seconds: float = 0.0,
    early: WorkerProcess | None = None,
) -> Search:
    """A search of the demo's space on three rungs, to be run."""
    folder.mkdir(parents=True, exist_ok=True)
    CheapSearcher.seconds = seconds
    run.Searcher = CheapSearcher  # type: ignore[misc]
    return Search(config(num_candidates, storage, *overrides), folder, early=early)


def config(num_candidates: int, storage: str, *overrides: str) -> SearchConfig:
    """What `python -m search` would be configured by."""
    composed = compose(
        "search",
        [
            f"num_candidates={num_candidates}",
            f"storage={storage}",
            f"proxy.rung_tokens={list(RUNG_TOKENS)}",
            "accuracy_items=0",
            "audit.candidates=0",
            "protocol.compile_unit=eager",
            *overrides,
        ],
    )[0]
    with open_dict(composed):
        del composed["hydra"]
    return read_config(composed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--storage", default="journal", choices=STORAGES)
    parser.add_argument("--seconds", type=float, default=0.0, help="that each training takes")
    parser.add_argument("overrides", nargs="*", help="of configs/search.yaml")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cheap_search(
            arguments.folder,
            arguments.candidates,
            arguments.storage,
            *arguments.overrides,
            seconds=arguments.seconds,
        ).run()
    except ConfigError as error:
        # As the real command ends.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_CONFIG)


if __name__ == "__main__":
    main()
