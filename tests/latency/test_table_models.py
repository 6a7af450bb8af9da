import re

import numpy as np
import pytest

from latency.table_models import MAX_DEPTH, MIN_HYBRIDS, costs_in, table_models


@pytest.mark.parametrize(("num_mixers", "num_ffns"), [(1, 1), (2, 1), (4, 1), (3, 3), (10, 2)])
def test_all_costs_can_be_found_from_the_models(num_mixers, num_ffns):
    mixers = [f"mixer {number}" for number in range(num_mixers)]
    ffns = [f"ffn {number}" for number in range(num_ffns)]
    operators = [*mixers, *ffns]
    models = table_models(mixers, ffns)
    assert models == table_models(mixers, ffns)
    assert models[: len(operators)] == [(each,) for each in operators]
    costs = np.random.default_rng(0).uniform(1.0, 2.0, 2 + len(operators))
    design = np.array([costs_in(each, operators) for each in models])
    # Errors of a percent, in all models alike, do not become much larger.
    times = design @ costs
    errors = np.linalg.pinv(design / times[:, None]) * 0.01
    assert np.linalg.matrix_rank(design) == 2 + len(operators)
    assert np.linalg.norm(errors, axis=1).max() < 0.15


def test_hybrids_are_as_models_are():
    """A mixer first; after each, no, one or two FFNs."""
    hybrids = ["".join(each) for each in table_models(["M"], ["F"]) if len(each) > 1]
    assert {len(each) for each in hybrids} <= set(range(3, MAX_DEPTH + 1))
    assert len({len(each) for each in hybrids}) > 2
    assert all(re.fullmatch("(MF{0,2})+", each) for each in hybrids)
    assert all(any(part in each for each in hybrids) for part in ("MM", "MFM", "MFF"))


def test_there_are_fewer_hybrids_if_not_all_fit_into_memory():
    mixers, ffns = ["M", "A", "D"], ["F"]
    everything = table_models(mixers, ffns)

    def operators(models):
        return sum(map(len, models))

    smaller = table_models(mixers, ffns, lambda models: operators(models) <= 40)
    assert operators(smaller) <= 40 < operators(everything)
    assert 4 + MIN_HYBRIDS < len(smaller) < len(everything)
    least = table_models(mixers, ffns, lambda models: False)
    assert len(least) == 4 + MIN_HYBRIDS
    design = np.array([costs_in(each, [*mixers, *ffns]) for each in least])
    assert np.linalg.matrix_rank(design) == 2 + 4


def test_a_cost_is_in_a_model_as_often_as_it_is_paid():
    assert costs_in("abab", "abc") == [1, 2, 2, 2, 0]
    assert costs_in("c", "abc") == [1, 1, 0, 0, 1]


def test_one_kind_alone_is_measured_as_well_as_can_be():
    models = table_models(["a"], ["a"])
    assert models[0] == ("a",)
    assert len({len(each) for each in models}) > 1
