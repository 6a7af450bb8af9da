import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.frontier import (
    Frontier,
    best_first,
    crowding_distance,
    hypervolume,
    hypervolume_history,
    non_dominated,
)

coordinate = st.integers(0, 20).map(float)
point_lists = st.lists(st.tuples(coordinate, coordinate), max_size=12)


def dominates(a, b):
    return a != b and a[0] <= b[0] and a[1] <= b[1]


@given(point_lists)
def test_non_dominated_by_definition(points):
    assert non_dominated(points) == [not any(dominates(a, b) for a in points) for b in points]


@given(point_lists)
def test_hypervolume_counts_the_unit_squares(points):
    squares = {
        (x, y) for x in range(15) for y in range(15) if any(a <= x and b <= y for a, b in points)
    }
    assert hypervolume(points, (15.0, 15.0)) == pytest.approx(len(squares))


def test_hypervolume_grows():
    points = [(2.0, 8.0), (1.0, 9.0), (3.0, 9.5), (0.5, 1.0)]
    history = hypervolume_history(points, (4.0, 10.0))
    assert history == pytest.approx([4.0, 5.0, 5.0, 31.5])


@given(point_lists)
def test_what_is_first_is_dominated_by_nobody_after_it(points):
    order = best_first(points)
    assert sorted(order) == list(range(len(points)))
    for place, first in enumerate(order):
        assert not any(dominates(points[later], points[first]) for later in order[place:])


def test_the_least_crowded_of_a_front_is_first():
    front = [(0.0, 10.0), (1.0, 9.0), (2.0, 8.0), (6.0, 4.0), (10.0, 0.0)]
    expected = [np.inf, 0.4, 1.0, 1.6, np.inf]
    assert crowding_distance(np.array(front)) == pytest.approx(expected)
    # A dominated point comes last, however alone it is.
    assert best_first([*front, (20.0, 20.0)]) == [0, 4, 3, 2, 1, 5]


@given(point_lists)
def test_a_frontier_that_grows_is_the_frontier_of_all(points):
    frontier = Frontier((15.0, 15.0))
    for point in points:
        frontier.add(point)
    members = {p for p, is_member in zip(points, non_dominated(points), strict=True) if is_member}
    assert set(frontier.points) == members
    assert len(frontier.points) == len(members)
    assert frontier.hypervolume == pytest.approx(hypervolume(points, (15.0, 15.0)))
