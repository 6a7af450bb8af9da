"""The study of depth and width: its grid, and what it chooses."""

import math
from typing import Any

import pandas as pd
import pytest
from depth_width_configs import compose_study

from search.cells import CellStore
from search.depth_width_analysis import analyse, choose, default_budgets_ms, depth_findings
from search.depth_width_config import Size
from search.depth_width_law import Law
from slm.config import ConfigError

VOCAB_SIZE = 4096


# Grid


def test_every_combination_is_there_and_those_in_between_are_only_measured() -> None:
    grid = compose_study(
        "grid.depths=[4,2]",
        "grid.widths=[64,96]",
        "grid.further_depths=[3]",
        "grid.further_widths=[128]",
    ).grid
    sizes = grid.sizes(VOCAB_SIZE)
    assert list(sizes) == [
        Size(depth, width, depth != 3 and width != 128)
        for depth in (2, 3, 4)
        for width in (64, 96, 128)
    ]
    for size, architecture in sizes.items():
        assert architecture.width == size.width
        assert [operator.name for operator in architecture.operators] == (
            ["attention", "ffn"] * size.depth
        )


def test_depth_counts_blocks_of_the_pattern() -> None:
    grid = compose_study("grid=hybrid", "grid.depths=[3]", "grid.further_depths=[]").grid
    architecture = grid.sizes(VOCAB_SIZE)[Size(3, 64, True)]
    names = [operator.name for operator in architecture.operators]
    first, second = (["deltanet", "ffn", "mamba2", "ffn"], ["attention", "ffn", "mamba2", "ffn"])
    assert names == first + second + first


def test_limits_of_parameters_cut_the_grid() -> None:
    grid = compose_study("experiment=depth_width_small").grid
    sizes = grid.sizes(VOCAB_SIZE)
    counts = [each.parameters() for each in sizes.values()]
    assert min(counts) >= 900_000
    assert max(counts) <= 8_000_000
    trained = {size for size in sizes if size.is_trained}
    assert len(trained) >= 12
    # Corners only: every depth and width is still there, as often as a law needs.
    assert {size.depth for size in trained} == set(grid.depths)
    assert {size.width for size in trained} == set(grid.widths)


# Config


def test_every_problem_of_a_config_is_said() -> None:
    with pytest.raises(ConfigError) as error:
        compose_study(
            "grid.depths=[]",
            "grid.widths=[64,64]",
            "grid.further_widths=[64]",
            "grid.max_parameters=10",
            "grid.min_parameters=20",
            "budgets_ms=[]",
            "seeds=[1,1]",
            "+proxy.warm_start=true",
        )
    assert set(error.value.problems) == {
        "grid.depths: must not be empty",
        "grid.widths: each must be given once, got [64, 64]",
        "grid.further_widths: 64 is among widths",
        "grid.max_parameters: must be >= min_parameters 20, got 10",
        "budgets_ms: must not be empty",
        "seeds: must differ, got [1, 1]",
        "proxy: warm_start must be false: nothing has a parent here, got true",
    }


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("grid.widths=[64,100]", "grid.widths: 100: "),
        ("grid.further_widths=[100]", "grid.further_widths: 100: "),
        ("grid.pattern=AC", "grid.pattern: block 'C' is not among blocks (A)"),
        ("grid.depths=[0]", "grid.depths[0]: must be greater than 0, got 0"),
        ("grid.blocks.A.operators=[atention]", "grid.blocks.A.operators.0: operator 'atention'"),
        ("grid.depth=[1]", "grid.depth: unknown field; did you mean 'depths'?"),
        ("grid=lama", "grid: no option 'lama'; did you mean 'llama'?"),
        ("budgets_ms=[0]", "budgets_ms[0]: must be greater than 0, got 0"),
    ],
)
def test_a_problem_names_its_field(override, problem) -> None:
    with pytest.raises(ConfigError) as error:
        compose_study(override)
    (line,) = error.value.problems
    assert line.startswith(problem)


def test_a_grid_that_the_limits_leave_empty_is_refused() -> None:
    grid = compose_study("grid.max_parameters=10").grid
    with pytest.raises(ConfigError, match=r"no model .* max_parameters 10: they have \d"):
        grid.sizes(VOCAB_SIZE)


def test_only_a_constant_rate_gives_several_budgets_from_one_training() -> None:
    several = "proxy.rung_tokens=[8192,16384]"
    assert compose_study(several).budgets_of_trainings == [(8192,), (16384,)]
    constant = compose_study(several, "proxy.optimizer.schedule=constant")
    assert constant.budgets_of_trainings == [(8192, 16384)]


def test_another_study_in_the_same_folder_is_refused_with_what_differs(tmp_path) -> None:
    CellStore(tmp_path, "first", compose_study().identity())
    # More seeds, sizes and budgets go on with it.
    more = compose_study("seeds=[0,5]", "grid.depths=[1]", "budgets_ms=[3]", "grid.widths=[32]")
    CellStore(tmp_path, "first", more.identity())
    with pytest.raises(ConfigError) as error:
        CellStore(tmp_path, "first", compose_study("grid=hybrid").identity())
    lines = {line.partition(":")[0]: line for line in error.value.problems}
    assert "the study 'first' was made with 'A', now it is 'AB'" in lines["grid.pattern"]
    assert set(lines) == {"grid.pattern", "grid.meta_tokens", *(k for k in lines if "blocks" in k)}


# Choices

LAW = Law(offset=60.0, coefficients=(40.0, 4000.0), exponents=(0.9, 1.0))


def row(depth: int, width: int, **changes: Any) -> dict[str, Any]:
    """A size on a device on which depth costs and width hardly does."""
    perplexity = float(LAW.perplexity(pd.Series([depth, width]).to_numpy(float)))
    return {
        "depth": depth,
        "width": width,
        "parameters": depth * width**2,
        "digest": f"{depth}-{width}",
        "latency_ms": depth * (2 + width / 128),
        "has_converged": True,
        "perplexity": perplexity,
        "perplexity_low": None,
        "perplexity_high": None,
        **changes,
    }


def trainings_of(rows: list[dict[str, Any]], error: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            **{"size": place, "depth": row["depth"], "width": row["width"], "seed": seed},
            **{"tokens": 1000, "loss": math.log(row["perplexity"]) + error * sign * (-1) ** place},
        }
        for place, row in enumerate(rows)
        if row["perplexity"] is not None
        for seed, sign in enumerate((1, -1))
    ]


ROWS = [row(depth, width) for depth in (2, 4, 8, 12) for width in (96, 128, 192, 256)]
# Among them the best for 30 ms.
UNTRAINED = [row(6, 384, perplexity=None), row(16, 512, perplexity=None)]


def test_the_law_chooses_also_what_was_not_trained() -> None:
    rows = [*ROWS, *UNTRAINED]
    analysis = analyse(rows, trainings_of(rows, error=0.002))
    assert analysis is not None
    assert analysis.doubts == ()
    budgets = [5.0, 12.0, 30.0, 96.0]
    choices = choose(rows, budgets, analysis)
    # The fastest, two blocks of width 96, takes 5.5 ms: nothing meets the first.
    assert [choice["budget_ms"] for choice in choices] == budgets[1:]
    for choice in choices:
        fitting = [each for each in rows if each["latency_ms"] <= choice["budget_ms"]]
        true = [
            float(LAW.perplexity(pd.Series([r["depth"], r["width"]]).to_numpy(float)))
            for r in fitting
        ]
        best = fitting[true.index(min(true))]
        assert (choice["depth"], choice["width"]) == (best["depth"], best["width"])
        assert choice["perplexity"] == pytest.approx(min(true), rel=0.01)
        assert choice["perplexity_low"] <= choice["perplexity"] <= choice["perplexity_high"]
        assert choice["by"] == "law"
        assert choice["agreement"] > 0.5
        assert choice["depth_low"] <= choice["depth"] <= choice["depth_high"]
    assert [choice["digest"] for choice in choices[1:]] == ["6-384", "16-512"]
    assert [choice["is_trained"] for choice in choices] == [True, False, False]
    assert [choice["is_extrapolated"] for choice in choices] == [False, True, True]
    assert depth_findings(choices).startswith(f"The best depth grows: {choices[0]['depth']} blocks")


def test_where_the_law_is_not_trusted_the_best_that_was_trained_is_chosen() -> None:
    rows = [row(2, 128), row(4, 128), row(8, 128, perplexity=200.0), *UNTRAINED]
    analysis = analyse(rows, trainings_of(rows))
    assert analysis is not None
    assert analysis.law is None
    assert not analysis.is_trusted
    choices = choose(rows, [5.9, 6.0, 12.0, 500.0], analysis)
    assert [(choice["budget_ms"], choice["depth"]) for choice in choices] == [
        *((6.0, 2), (12.0, 4), (500.0, 4))
    ]
    assert all(choice["by"] == "trainings" for choice in choices)
    assert analyse(rows, []) is None
    assert choose([], [10.0], None) == []


def test_budgets_lie_between_the_fastest_and_the_slowest_that_was_trained() -> None:
    budgets = default_budgets_ms([*ROWS, *UNTRAINED])
    latencies = [each["latency_ms"] for each in ROWS]
    assert len(budgets) == 6
    assert budgets == sorted(budgets)
    assert min(latencies) <= budgets[0] < 1.1 * min(latencies)
    assert max(latencies) <= budgets[-1] < 1.1 * max(latencies)
    assert all(float(f"{budget:.2g}") == budget for budget in budgets)
    assert default_budgets_ms([ROWS[0]]) == [5.5]
    assert default_budgets_ms(UNTRAINED) == []
