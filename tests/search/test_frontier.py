import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.frontier import hypervolume, hypervolume_history, non_dominated

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
