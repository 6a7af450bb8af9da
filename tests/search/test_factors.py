"""Effects on the score, on invented candidates whose effects are known."""

import numpy as np
import pytest
from scipy import stats

from search.factors import (
    mutation_effects,
    operator_effects,
    regression_effects,
    shape_effects,
)

ATTENTION, MAMBA2, DELTANET, FFN = "attention(head_dim=32)", "mamba2", "deltanet", "ffn(ratio=3.0)"


def row(operators: list[str], score: float, latency_ms: float, **changes) -> dict:
    return {
        "operators": operators,
        "rungs": [{"tokens": 1000, "score": score}],
        "latency_ms": latency_ms,
        "width": 64,
        "parameters": 10**6,
        "state_bytes": 0,
        "genotype": {"meta_tokens": 8},
        "parent": None,
        "factor": None,
        **changes,
    }


def test_effects_that_are_exact_are_found_exactly() -> None:
    """Loss is a sum of known parts: there is no scatter, and the interval is a point."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        counts = rng.integers(0, 4, size=4)
        latency_ms = float(rng.uniform(5, 10))
        loss = 5 - 0.3 * np.log(latency_ms) - 0.02 * counts[1] + 0.05 * counts[2] + 0.01 * counts[3]
        operators = [ATTENTION, MAMBA2, DELTANET, FFN]
        rows.append(row(list(np.repeat(operators, counts)), float(loss), latency_ms))
    effects = {effect.name: effect for effect in operator_effects(rows)}
    assert list(effects) == [MAMBA2, ATTENTION, FFN, DELTANET]
    for name, each in ((ATTENTION, 0.0), (MAMBA2, -0.02), (DELTANET, 0.05), (FFN, 0.01)):
        effect = effects[name]
        assert effect.difference / effect.per == pytest.approx(each, abs=1e-9)
        assert effect.high - effect.low < 1e-9
        assert effect.n == 40


def test_latency_alone_is_no_effect_of_what_goes_with_it() -> None:
    """Slower candidates have more operators and a lower loss, because they are slower."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(300):
        num_operators = int(rng.integers(2, 9))
        latency_ms = num_operators * float(rng.lognormal(0, 0.2))
        loss = 5 - 0.5 * np.log(latency_ms) + 0.02 * rng.normal()
        rows.append(row([ATTENTION] * num_operators, loss, latency_ms))
    (effect,) = operator_effects(rows)
    losses = [each["rungs"][0]["score"] for each in rows]
    assert stats.spearmanr([len(each["operators"]) for each in rows], losses)[0] < -0.9
    assert not effect.is_told_from_zero
    assert abs(effect.difference) < 0.01


def test_one_factor_is_the_slope_of_scipy_with_white_errors() -> None:
    """Against the closed form of simple regression; HC3 written out with its hat matrix."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 5, size=30).astype(float)
    y = 0.1 * x + rng.normal(size=30) * (0.1 + 0.1 * x)
    (effect,) = regression_effects(y, [7.0] * 30, {"x": x})
    fit = stats.linregress(x, y)
    assert effect.difference / effect.per == pytest.approx(fit.slope)
    centred = x - x.mean()
    squares = (centred**2).sum()
    residuals = y - fit.intercept - fit.slope * x
    leverages = 1 / 30 + centred**2 / squares
    error = np.sqrt((centred**2 * (residuals / (1 - leverages)) ** 2).sum()) / squares
    half = stats.t.ppf(0.975, 28) * error
    assert effect.low / effect.per == pytest.approx(fit.slope - half)
    assert effect.high / effect.per == pytest.approx(fit.slope + half)


def test_where_nothing_matters_a_factor_is_rarely_named() -> None:
    """In 5 % of searches at most, however many factors and however unequal the scatter."""
    rng = np.random.default_rng(3)
    num_searches, named = 400, 0
    for _ in range(num_searches):
        counts = rng.integers(0, 4, size=(60, 8))
        losses = rng.normal(size=60) * (0.5 + counts[:, 0])
        factors = {str(place): column for place, column in enumerate(counts.T)}
        effects = regression_effects(losses, rng.uniform(5, 10, size=60), factors)
        named += any(effect.is_told_from_zero for effect in effects)
    # What 5 % may come to with this many searches, at 99 %.
    assert named <= stats.binom.ppf(0.99, num_searches, 0.05)


def test_what_follows_from_the_others_is_left_out() -> None:
    """In models of six operators an attention more is an FFN less."""
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(40):
        attention, mamba2 = (int(each) for each in rng.integers(0, 4, size=2))
        operators = [ATTENTION] * attention + [MAMBA2] * mamba2 + [FFN] * (6 - attention - mamba2)
        rows.append(row(operators, 5 + 0.1 * attention, float(rng.uniform(5, 10))))
    effects = {effect.name: effect for effect in operator_effects(rows)}
    assert set(effects) == {ATTENTION, MAMBA2}
    assert effects[ATTENTION].difference / effects[ATTENTION].per == pytest.approx(0.1)
    assert effects[MAMBA2].difference == pytest.approx(0.0, abs=1e-9)


def test_nothing_is_said_of_few_candidates_or_of_what_hardly_varies() -> None:
    rows = [row([ATTENTION] * (1 + place % 3), 5.0 - place, 6.0 + place) for place in range(8)]
    assert operator_effects(rows) == []
    assert shape_effects(rows) == []
    rows = [row([ATTENTION] * (1 + (place > 27)), 5.0, 6.0 + place) for place in range(32)]
    assert operator_effects(rows) == []
    assert operator_effects([]) == shape_effects([]) == mutation_effects([]) == []


def test_shapes_are_judged_one_by_one() -> None:
    """Twice the parameters, half a nat less; width goes with them, so it is found, too."""
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(60):
        width = int(rng.choice([64, 128, 256]))
        loss = 5 - 0.5 * np.log2(width) + 0.01 * rng.normal()
        changes = {"width": width, "parameters": 10 * width**2}
        rows.append(row([ATTENTION, FFN], loss, float(rng.uniform(5, 10)), **changes))
    effects = {effect.name: effect for effect in shape_effects(rows)}
    assert list(effects) == ["width", "parameters"]
    width, parameters = effects["width"], effects["parameters"]
    assert width.difference / width.per == pytest.approx(-0.5, abs=0.02)
    assert parameters.difference / parameters.per == pytest.approx(-0.25, abs=0.01)
    assert width.is_told_from_zero


def test_a_mutation_is_judged_by_its_children_less_their_parents() -> None:
    """Six parents, of which one has many children: they count once."""
    rng = np.random.default_rng(6)
    losses = rng.normal(5, 1, size=6)
    rows = [row([FFN], loss, 6.0) for loss in losses]
    gains = {
        parent: list(rng.normal(-0.1, 0.02, size=1 + 9 * (parent == 0))) for parent in range(6)
    }
    for parent, changes in gains.items():
        for gain in changes:
            child = {"parent": parent, "factor": "ratio"}
            rows.append(row([FFN], losses[parent] + gain, 6.0, **child))
        # Too few parents to tell, and a child that was never trained.
        rows.append(row([FFN], 9.0, 6.0, parent=parent, factor="order" if parent else "ratio"))
        rows[-1] |= {"rungs": []} if parent == 0 else {}
    rows.append(row([FFN], 0.0, 6.0, parent=1, factor="ratio+order"))
    by_factor = {effect.name: effect for effect in mutation_effects(rows)}
    assert set(by_factor) == {"ratio", "order"}
    means = [np.mean(changes) for changes in gains.values()]
    # Both factors have enough parents: the intervals hold for the two.
    expected = stats.t.interval(1 - 0.05 / 2, 5, np.mean(means), stats.sem(means))
    effect = by_factor["ratio"]
    assert (effect.low, effect.high) == pytest.approx(expected)
    assert effect.n == 6
    assert effect.is_told_from_zero
    assert by_factor["order"].n == 5
