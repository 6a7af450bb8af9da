import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from search.forecast import features, forecast
from search.space import SearchSpace, SpaceConfig
from slm.architecture import Architecture
from slm.config import read

RUNGS = (49152, 524288, 1048576)


@pytest.fixture(scope="module")
def hybrids(root: Path):
    """The tabular benchmark: genotypes, losses on three rungs [N, 3], latencies [N]."""
    table = pq.read_table(root / "benchmarks" / "hybrid_bench.parquet")
    assert set(RUNGS) <= set(json.loads(table.schema.metadata[b"hybrid_bench"])["budgets"])
    config = OmegaConf.load(root / "configs" / "space" / "hybrid_bench.yaml")
    space = SearchSpace(read(SpaceConfig, config))
    rows = [row for row in table.to_pylist() if row["seed"] == 0]
    genotypes = [
        space.decompose(tuple(map(str, Architecture.parse(row["architecture"]).operators)))
        for row in rows
    ]
    losses = np.array([[row[f"loss_{tokens}"] for tokens in RUNGS] for row in rows])
    return genotypes, losses, np.array([row["latency_ms"] for row in rows])


@pytest.mark.parametrize("seed", range(3))
def test_forecasts_rank_real_models_better_than_their_lowest_rung(hybrids, seed):
    genotypes, losses, latencies_ms = hybrids
    order = np.random.default_rng(seed).permutation(len(genotypes))[:100]
    # Twenty went on, twelve of them to the end.
    done = np.repeat([3, 2, 1], [12, 8, 80])
    scores = [tuple(losses[place, :num]) for place, num in zip(order, done, strict=True)]
    ahead = forecast(
        [genotypes[place] for place in order],
        scores,
        [(latencies_ms[place],) for place in order],
        len(RUNGS),
    )
    final = losses[order, -1]
    lowest = done == 1
    by_rung = spearmanr(losses[order, 0][lowest], final[lowest]).statistic
    by_forecast = spearmanr(ahead.means[lowest], final[lowest]).statistic
    assert by_forecast > by_rung + 0.05
    # Nearly as often within two deviations as if they held all that changes may bring.
    misses = np.abs(ahead.means - final)[lowest] > 2 * ahead.deviations[lowest]
    assert misses.mean() < 0.2
    # What is known is not forecast.
    np.testing.assert_array_equal(ahead.means[done == 3], final[done == 3])
    assert not ahead.deviations[done == 3].any()
    assert ahead.deviations[lowest].min() > 0
    np.testing.assert_array_equal(ahead.costs[:, 0], latencies_ms[order])


def test_the_more_have_gone_on_the_more_is_known_of_the_others(hybrids):
    genotypes, losses, latencies_ms = hybrids
    order = np.random.default_rng(0).permutation(len(genotypes))[:100]
    deviations = []
    for num_further in (4, 16, 64):
        done = np.where(np.arange(100) < num_further, 3, 1)
        ahead = forecast(
            [genotypes[place] for place in order],
            [tuple(losses[place, :num]) for place, num in zip(order, done, strict=True)],
            [(latencies_ms[place],) for place in order],
            len(RUNGS),
        )
        deviations.append(np.median(ahead.deviations[64:]))
    assert deviations[0] > 1.3 * deviations[1] > 1.69 * deviations[2]


def test_untried_models_are_forecast_from_what_they_are_made_of(hybrids):
    genotypes, losses, latencies_ms = hybrids
    order = np.random.default_rng(0).permutation(len(genotypes))
    tried, untried = order[:60], order[60:]
    ahead = forecast(
        [genotypes[place] for place in order],
        [tuple(losses[place]) for place in tried] + [()] * len(untried),
        [(latencies_ms[place],) for place in tried] + [None] * len(untried),
        len(RUNGS),
    )
    truth = losses[untried, -1]
    assert spearmanr(ahead.means[60:], truth).statistic > 0.85
    assert np.abs(ahead.means[60:] - truth).mean() < 0.5 * truth.std()
    relative = ahead.costs[60:, 0] / latencies_ms[untried]
    assert np.median(np.abs(relative - 1)) < 0.1


@pytest.mark.parametrize("done", [[1, 1, 1], [2, 1, 1], [1, 0, 0], [3, 1, 0]])
def test_with_next_to_nothing_known_the_rest_is_as_uncertain_as_scores_differ(hybrids, done):
    genotypes, losses, latencies_ms = hybrids
    ahead = forecast(
        genotypes[:3],
        [tuple(losses[place, :num]) for place, num in enumerate(done)],
        [(latencies_ms[place],) if num else None for place, num in enumerate(done)],
        len(RUNGS),
    )
    assert np.all(np.isfinite(ahead.means))
    assert np.all(ahead.costs > 0)
    assert (ahead.deviations == 0).tolist() == [num == 3 for num in done]


def test_what_a_genotype_is_made_of(hybrids):
    genotypes, _, _ = hybrids
    genotype = next(g for g in genotypes if len(g.operators) == 6)
    found = features(genotype)
    assert found["depth"] == 6
    assert found["ffn"] == 3
    assert sum(value for name, value in found.items() if name.startswith("first: ")) == 2
