"""What rows of results say of a model that a study has measured."""

from __future__ import annotations

from typing import Any

from search.cells import Cell
from slm.architecture import Architecture

Row = dict[str, Any]
TIMES = ("latency", "tpot", "ttft")


def architecture_fields(architecture: Architecture | None) -> Row:
    """Which model it is; None where there is none."""
    if architecture is None:
        names = ("width", "architecture", "digest", "parameters", "parameters_without_embedding")
        return dict.fromkeys(names)
    embedding = architecture.vocab_size * architecture.width
    embedding *= 1 if architecture.tie_embeddings else 2
    return {
        "width": architecture.width,
        "architecture": str(architecture),
        "digest": architecture.digest,
        "parameters": architecture.parameters(),
        "parameters_without_embedding": architecture.parameters() - embedding,
    }


def measurement_fields(measurement: Cell | None) -> Row:
    """What was measured of it; None where nothing was, or it failed."""
    names = [
        "state_bytes",
        *(f"{name}{part}_ms" for name in TIMES for part in ("", "_low", "_high")),
        "is_quiet",
        "has_converged",
    ]
    if measurement is None or "error" in measurement:
        return dict.fromkeys(names)
    return {name: measurement[name] for name in names}
