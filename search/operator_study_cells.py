"""The cells of an operator study: one measurement, or one training with one seed.

A cell is stored as a file of its own the moment it is known, so that a study which was stopped,
however, goes on with the next one. A cell that failed holds `error`, its reason; delete its file to
try it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.evaluate import ACCURACY_BATCH_SIZE, BaseEvaluator
from search.run_folder import write_json
from search.study import flatten
from search.worker import Report
from slm.config import ConfigError

if TYPE_CHECKING:
    from latency.workload import Workload
    from slm.data import PackedCorpus
    from slm.data.cloze import ClozeItem
    from slm.model import LanguageModel

Cell = dict[str, Any]

# Every model answers the same questions.
CLOZE_SEED = 0


class CellStore:
    """The cells and facts of the study in a folder."""

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any]) -> None:
        """Open a study's folder, or make it.

        identity: what must be the same for cells to be comparable. Raises ConfigError, saying what
        differs, if the study was made with another one.
        """
        self._cells = folder / "cells"
        self._cells.mkdir(parents=True, exist_ok=True)
        wanted = flatten(identity)
        stored = flatten(self.settle("identity", wanted))
        problems = [
            f"{key}: the study '{name}' was made with {stored.get(key)!r}, now it is "
            f"{wanted.get(key)!r}; choose another name, or the old value"
            for key in stored | wanted
            if stored.get(key) != wanted.get(key)
        ]
        if problems:
            raise ConfigError(problems)

    def settle(self, key: str, value: Cell) -> Cell:
        """Store a cell unless it is known; the cell as stored."""
        path = self._path(key)
        if not path.exists():
            write_json(path, value)
        cell: Cell = json.loads(path.read_text(encoding="utf-8"))
        return cell

    def get(self, key: str) -> Cell | None:
        """A cell, or None if it is not known yet."""
        path = self._path(key)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _path(self, key: str) -> Path:
        return self._cells / f"{key}.json"


@dataclass(frozen=True)
class CellEvaluator(BaseEvaluator):
    """Makes the cells of an operator study.

    workload: what is timed. accuracy_items: questions of the word cloze put to each model.
    """

    workload: Workload
    accuracy_items: int

    def yardstick(self, report: Report) -> Cell:
        """How long the request that runs beside every measurement takes now."""
        from latency.profile import profile
        from latency.request import REFERENCE, REFERENCE_WORKLOAD

        device = self._set_up_measuring()
        result = profile(REFERENCE, REFERENCE_WORKLOAD, device, self.protocol)
        return {"reference_ms": result.reference_ms.median_ms}

    def measure(self, text: str, reference_ms: float, report: Report) -> Cell:
        """Latencies of a model, brought to the machine speed at which the yardstick was taken."""
        result = self._measure(text, self.workload)
        scale = result.request_per_reference * reference_ms / result.request_ms.median_ms
        cell: Cell = {
            "architecture": text,
            "is_quiet": result.request_ms.quiet,
            "has_converged": result.request_ms.converged,
            "raw_ms": result.request_ms.median_ms,
            "state_bytes": result.state_bytes,
        }
        for name, time in (
            ("latency", result.request_ms),
            ("ttft", result.ttft_ms),
            ("tpot", result.tpot_ms),
        ):
            cell[f"{name}_ms"] = scale * time.median_ms
            cell[f"{name}_low_ms"] = scale * time.low_ms
            cell[f"{name}_high_ms"] = scale * time.high_ms
        return cell

    def train(self, text: str, seed: int, report: Report) -> Cell:
        """Proxy training with a seed, and the word cloze; `right` has a 1 per right answer."""
        corpus = self._set_up_training()
        training = self._train(text, corpus, self.proxy.rung_tokens[0], seed, report)
        result = self._result(training, corpus)
        right = self._answer(training.model, corpus)
        return {"architecture": text, "seed": seed, **result, "right": right}

    def _answer(self, model: LanguageModel, corpus: PackedCorpus) -> str:
        """Which questions of the cloze are answered right, '0110…'."""
        from slm.data.tokenizer import load_tokenizer
        from slm.evaluation import cloze_answers

        items = _questions(self.corpus_folder, self.accuracy_items)
        if not items:
            return ""
        tokenizer = load_tokenizer(corpus.tokenizer_path)
        right = cloze_answers(model, tokenizer, items, ACCURACY_BATCH_SIZE)
        return "".join(str(int(each)) for each in right)


@cache
def _questions(corpus_folder: Path, num_items: int) -> list[ClozeItem]:
    """The questions, made once per process."""
    from slm.data import PackedCorpus
    from slm.data.cloze import build_cloze

    if num_items == 0:
        return []
    return build_cloze(PackedCorpus.open(corpus_folder), num_items, CLOZE_SEED)
