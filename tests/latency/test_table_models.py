import numpy as np
import pytest

from latency.table_models import MAX_DEPTH, costs_in, mixtures


@pytest.mark.parametrize("count", [2, 3, 6, 12])
def test_all_costs_can_be_found_from_the_models(count):
    operators = [f"operator {number}" for number in range(count)]
    models = mixtures(operators)
    assert models == mixtures(operators)
    assert models[:count] == [(each,) for each in operators]
    assert all(1 <= len(each) <= MAX_DEPTH for each in models)
    costs = np.random.default_rng(0).uniform(1.0, 2.0, 2 + count)
    design = np.array([costs_in(each, operators) for each in models])
    # Errors of a percent, in all models alike, do not become much larger.
    times = design @ costs
    errors = np.linalg.pinv(design / times[:, None]) * 0.01
    assert np.linalg.matrix_rank(design) == 2 + count
    assert np.linalg.norm(errors, axis=1).max() < 0.15


def test_a_cost_is_in_a_model_as_often_as_it_is_paid():
    assert costs_in("abab", "abc") == [1, 2, 2, 2, 0]
    assert costs_in("c", "abc") == [1, 1, 0, 0, 1]


def test_one_kind_alone_is_measured_as_well_as_can_be():
    models = mixtures(["a"])
    assert len({len(each) for each in models}) > 1
