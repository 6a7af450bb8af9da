"""Scores that are invented, for `benchmarks/cheap_search.py`.

A file of its own: the process that evaluates imports no more of a search than a real one does.
"""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.architecture import Architecture

if TYPE_CHECKING:
    from latency.workload import Workload
    from search.worker import Report

POINTS = 20


@dataclass(frozen=True)
class CheapEvaluator:
    """Scores that follow from the architecture alone, after `seconds`."""

    folder: Path
    seconds: float

    def measure(
        self, text: str, workload: Workload, reference_times: None, report: Report
    ) -> dict[str, float | bool]:
        """A latency in the neighbourhood of the prediction."""
        latency_ms = predicted_ms(Architecture.parse(text)) * (0.97 + 0.06 * draw(text))
        return {
            "latency_ms": latency_ms,
            "latency_low_ms": 0.99 * latency_ms,
            "latency_high_ms": 1.01 * latency_ms,
            "latency_raw_ms": latency_ms,
            "latency_is_quiet": True,
            "ttft_ms": latency_ms / 10,
            "tpot_ms": latency_ms / 70,
            "tokens_per_s": 64000 / latency_ms,
        }

    def train(
        self,
        text: str,
        tokens: int,
        start: str | None,
        parent: object,
        checkpoint: str,
        report: Report,
    ) -> dict[str, Any]:
        """A loss that falls with tokens and parameters."""
        if start is not None and not (self.folder / start).exists():
            raise FileNotFoundError(start)
        time.sleep(self.seconds)
        parameters = Architecture.parse(text).parameters()
        loss = 2.0 + 2.0 * (1e5 / tokens) ** 0.3 + (1e5 / parameters) ** 0.3 + 0.2 * draw(text)
        (self.folder / checkpoint).touch()
        return {
            "loss": loss,
            "train_loss": loss,
            "tokens": tokens,
            "seconds": 1.0,
            "tokens_per_second": float(tokens),
            "loss_curve": [(tokens * (point + 1) // POINTS, loss) for point in range(POINTS)],
            "bits_per_byte": loss / 2.7,
            "checkpoint": checkpoint,
        }


def draw(text: str) -> float:
    """A number between 0 and 1 that follows from a text."""
    return random.Random(hashlib.sha256(text.encode()).hexdigest()).random()


def predicted_ms(architecture: Architecture) -> float:
    """Invented: a part for every operator, and one for the weights."""
    return len(architecture.operators) + architecture.parameters() / 5e5
