"""The frontier: what no other candidate beats on every objective. All objectives are minimised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Point = tuple[float, ...]


def non_dominated(points: Sequence[Point]) -> list[bool]:
    """Whether each point is on the frontier; of equal points all are."""
    import moocore

    if not points:
        return []
    return [bool(x) for x in moocore.is_nondominated(np.array(points), keep_weakly=True)]


def best_first(points: Sequence[Point]) -> list[int]:
    """Places of the points, ordered as by NSGA-II (Deb 2002): by front, the least crowded first.

    Points of equal standing keep their order.
    """
    import moocore

    if not points:
        return []
    values = np.array(points)
    fronts = moocore.pareto_rank(values)
    crowding = np.zeros(len(values))
    for front in np.unique(fronts):
        members = np.flatnonzero(fronts == front)
        crowding[members] = crowding_distance(values[members])
    return [int(place) for place in np.lexsort((-crowding, fronts))]


def crowding_distance(points: np.ndarray) -> np.ndarray:
    """How far the neighbours of each point of one front are apart; infinite at its ends.

    points: [N, objectives]. Sum over the objectives of the distance between the next smaller and
    the next larger value, as a share of the front's whole extent (Deb 2002, section III B).
    """
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        extent = ordered[-1] - ordered[0]
        distance[order[[0, -1]]] = np.inf
        if extent > 0:
            distance[order[1:-1]] += (ordered[2:] - ordered[:-2]) / extent
    return distance


def hypervolume(points: Sequence[Point], worst: Point) -> float:
    """Volume between the frontier and the point `worst`; points beyond it count nothing."""
    import moocore

    inside = [p for p in points if all(x < limit for x, limit in zip(p, worst, strict=True))]
    return float(moocore.hypervolume(np.array(inside), ref=np.array(worst))) if inside else 0.0


class Frontier:
    """A frontier that grows point by point, and its hypervolume.

    worst: the point up to which volume counts.
    """

    def __init__(self, worst: Point) -> None:
        self.worst = worst
        self.points: list[Point] = []
        self.hypervolume = 0.0

    def add(self, point: Point) -> bool:
        """Add a point; whether it is on the frontier, at least for now."""
        if any(_dominates(other, point) for other in self.points):
            return False
        self.points = [other for other in self.points if not _dominates(point, other)]
        if point not in self.points:
            self.points.append(point)
            self.hypervolume = hypervolume(self.points, self.worst)
        return True


def hypervolume_history(points: Sequence[Point], worst: Point) -> list[float]:
    """The hypervolume after each point."""
    frontier = Frontier(worst)
    history = []
    for point in points:
        frontier.add(point)
        history.append(frontier.hypervolume)
    return history


def _dominates(a: Point, b: Point) -> bool:
    """Whether `a` is nowhere worse than `b`, and better somewhere."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
