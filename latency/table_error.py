"""How far a latency table is from whole models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TableError:
    """How far predictions are from whole models measured.

    measured_ms: of the whole models, at the machine speed at which the table holds; raw_ms: by
        the clock.
    errors_percent: of each architecture, signed, (predicted − measured) / measured.
    mape_percent: mean absolute error; max_error_percent: the largest; spearman: rank correlation,
    None where it is not defined (fewer than two architectures, or all alike).
    """

    architectures: list[str]
    predicted_ms: list[float]
    measured_ms: list[float]
    raw_ms: list[float]
    errors_percent: list[float]
    mape_percent: float
    max_error_percent: float
    spearman: float | None


def table_error(
    architectures: list[str],
    predicted_ms: list[float],
    measured_ms: list[float],
    raw_ms: list[float],
) -> TableError:
    """Compare predictions with measurements. Raises ValueError if there are none."""
    if not architectures:
        raise ValueError("architectures: must not be empty")
    predicted, measured = np.array(predicted_ms), np.array(measured_ms)
    errors = (predicted - measured) / measured * 100
    return TableError(
        architectures=architectures,
        predicted_ms=predicted_ms,
        measured_ms=measured_ms,
        raw_ms=raw_ms,
        errors_percent=errors.tolist(),
        mape_percent=float(np.abs(errors).mean()),
        max_error_percent=float(np.abs(errors).max()),
        spearman=spearman(predicted, measured),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where it is not defined."""
    from scipy import stats

    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(stats.spearmanr(x, y).statistic)
