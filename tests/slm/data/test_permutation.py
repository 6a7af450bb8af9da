"""The shuffle: every place once, evenly, another order for another key."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from slm.data.permutation import Permutation


def order(length: int, *key: int) -> list[int]:
    return [Permutation(length, *key)[index] for index in range(length)]


@given(st.integers(0, 700), st.integers(0, 2**64), st.integers(0, 1000))
def test_every_number_comes_once(length: int, seed: int, epoch: int) -> None:
    assert sorted(order(length, seed, epoch)) == list(range(length))


@pytest.mark.parametrize("length", [2**20 - 1, 2**20, 2**20 + 1, 1000 * 1000, 999_983])
def test_no_two_places_of_a_long_one_are_the_same(length: int) -> None:
    """A stretch of it: all would take seconds."""
    shuffled = Permutation(length, 1, 2)
    found = {shuffled[index] for index in range(length - 5000, length)}
    assert len(found) == 5000
    assert all(0 <= number < length for number in found)


def test_all_orders_of_few_are_as_likely() -> None:
    counts = Counter(tuple(order(4, seed, epoch)) for seed in range(100) for epoch in range(120))
    assert set(counts) == set(permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("length", [10, 97, 1000])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_each_place_is_as_likely_to_hold_any_number(length: int, place: int) -> None:
    drawn = [Permutation(length, seed)[place % length] for seed in range(30 * length)]
    counts = np.bincount(drawn, minlength=length)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_neighbours_part() -> None:
    """Rows that lie side by side in the text come far apart, and in no order."""
    for epoch in range(3):
        places = np.array(order(5000, 7, epoch))
        steps = np.diff(places)
        assert (np.abs(steps) <= 5).mean() < 0.01
        assert abs(stats.spearmanr(np.arange(5000), places).statistic) < 0.05
        assert abs(stats.spearmanr(places[:-1], places[1:]).statistic) < 0.05


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [order(1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    # Two random orders of a thousand have one place in common, on average.
    common = [
        sum(a == b for a, b in zip(first, second, strict=True))
        for i, first in enumerate(orders)
        for second in orders[:i]
    ]
    assert np.mean(common) == pytest.approx(1, abs=0.5)
    assert order(1000, 1, 2) == orders[1 * 4 + 2]


def test_it_is_the_same_everywhere() -> None:
    """What a checkpoint's position stands for depends on it."""
    assert order(10, 0, 0) == [4, 1, 0, 3, 9, 2, 7, 5, 8, 6]
    assert Permutation(10**12, 3, 4)[5] == 877_965_940_049


def test_places_outside_are_refused() -> None:
    shuffled = Permutation(3, 0)
    assert len(shuffled) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"place {index} of 3"):
            shuffled[index]
