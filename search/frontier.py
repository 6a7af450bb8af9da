"""The frontier: what no other candidate beats on both loss and latency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]


def non_dominated(points: Sequence[Point]) -> list[bool]:
    """Whether each point (loss, latency) is on the frontier; of equal points all are."""
    import moocore

    if not points:
        return []
    return [bool(x) for x in moocore.is_nondominated(np.array(points), keep_weakly=True)]


def hypervolume(points: Sequence[Point], worst: Point) -> float:
    """Area between the frontier and the point `worst`; points beyond it count nothing."""
    import moocore

    inside = [point for point in points if point[0] < worst[0] and point[1] < worst[1]]
    return float(moocore.hypervolume(np.array(inside), ref=np.array(worst))) if inside else 0.0


def hypervolume_history(points: Sequence[Point], worst: Point) -> list[float]:
    """The hypervolume after each point."""
    return [hypervolume(points[: count + 1], worst) for count in range(len(points))]
