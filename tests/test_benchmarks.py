"""Benchmarks end with one line of JSON that holds what they promise."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import run_program

from latency.device import Device
from latency.timer import Measurement


def run(root: Path, name: str, *arguments: str) -> dict[str, Any]:
    """What a benchmark's last line holds."""
    arguments = (f"benchmarks/{name}.py", "--threads", "1", *arguments)
    done = run_program(*arguments, folder=root, environment={"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["benchmark"] == name
    assert report["environment"]["key"]
    results: dict[str, Any] = report["results"]
    return results


def test_decode(root: Path) -> None:
    """With the model of all kinds of layers; that both compute the same is checked there."""
    arguments = ("--models", "bamba", "--sizes", "2M", "--seconds", "0.1", "--new", "4")
    row = run(root, "decode", *arguments)["bamba"]["2M"]
    assert row["ratio"] > 0
    assert row["bandwidth_fraction"] > 0


def test_kernels(root: Path) -> None:
    """With the alternatives that depend most on what transformers and fla look like."""
    results = run(root, "kernels", "--operators", "gated_delta_rule", "--seconds", "0.1")
    (row,) = results.values()
    assert row["ratio"] > 0
    assert row["ours_peak_mib"] > 0
    assert row["other"].startswith(("fla, chunks of", "transformers, chunks of"))


def test_search_overhead(root: Path) -> None:
    """Two searches that train nothing, at sizes that say nothing."""
    results = run(root, "search_overhead", "--sizes", "4", "8")
    for storage in ("sqlite", "journal"):
        assert set(results[storage]["ms_per_candidate"]) == {"4", "8"}
        assert results[storage]["resume_s"] > 0


def test_many_workers(root: Path) -> None:
    """Few, of which one is killed: nothing is lost, and the rate says nothing."""
    sizes = ("--workers", "3", "--seconds", "1", "--candidates", "12", "--kills", "1")
    results = run(root, "many_workers", *sizes)
    assert set(results) == {"claims_per_s", "storage_share", "duplicates", "lost"}
    assert (results["duplicates"], results["lost"]) == (0, 0)
    assert 0 < results["claims_per_s"] < 3
    assert 0 < results["storage_share"] < 1


def test_trainer_overhead(root: Path) -> None:
    """So few steps that their times say nothing."""
    results = run(root, "trainer_overhead", "--windows", "2", "--batch", "1")
    low, overhead_ms, high = results["overhead_ms"]
    assert low <= overhead_ms <= high
    assert results["overhead_share"] == results["trainer_ms"] / results["bare_ms"] - 1


def test_data(root: Path) -> None:
    """Of so little text that its figures say nothing."""
    results = run(root, "data", "--megabytes", "1", "--steps", "2")
    assert results["tokenize_mb_per_s"] > 0
    assert 0 < results["loader_share"] < 1


def test_warm_start(root: Path, tmp_path: Path) -> None:
    """So few steps that loss falls in all of them, whatever was learnt before."""
    arguments = ("--pairs", "4", "--steps", "16", "--processes", "1")
    folders = ("--folder", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"))
    results = run(root, "warm_start", *arguments, *folders)
    assert set(results["rank_correlation"]) == {"warm", "cold", "cold_twice", "mixed"}
    low, loss_less_cold, high = results["loss_less_cold"]
    assert low <= loss_less_cold <= high < 0
    assert results["cold_steps"][1] > 16
    trained = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("*.json")]
    assert len(trained) == 4
    assert all(each["loss"] < each["parent_loss"] for each in trained)


def test_warm_start_that_does_what_more_cold_steps_do(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm losses that are the cold ones after as many steps, or twice as many."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from warm_start import STEPS, compare

    rng = np.random.default_rng(0)
    curves = np.sort(rng.uniform(3, 7, size=(24, len(STEPS))), axis=1)[:, ::-1]
    same = compare(curves[:, STEPS.index(48)], curves, steps=48)
    assert same["rank_correlation"]["warm"] == same["rank_correlation"]["mixed"]
    assert same["rank_correlation_less_cold"] == {"warm": [0, 0, 0], "mixed": [0, 0, 0]}
    assert same["loss_less_cold"] == [0, 0, 0]
    assert same["cold_steps"] == pytest.approx([48, 48, 48])
    twice = compare(curves[:, STEPS.index(96)], curves, steps=48)
    assert twice["rank_correlation"]["warm"] == twice["rank_correlation"]["cold_twice"]
    assert twice["rank_correlation"]["cold"] == same["rank_correlation"]["warm"]
    assert twice["tokens_ratio"] == pytest.approx([0.5, 0.5, 0.5])
    between = curves[:, STEPS.index(64)] / 2 + curves[:, STEPS.index(96)] / 2
    found = compare(between, curves, steps=48)
    assert found["cold_steps"] == pytest.approx([np.sqrt(64 * 96)] * 3)


def test_a_warm_start_that_helps_spoils_only_the_ranking_beside_cold_ones(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are lower by more than they span: every warm child is before every cold one."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from warm_start import STEPS, compare

    curves = np.arange(100.0)[:, None] / 100 + np.linspace(7, 4, len(STEPS))
    found = compare(curves[:, STEPS.index(48)] - 2, curves, steps=48)
    assert found["rank_correlation"]["warm"] == pytest.approx([1, 1, 1])
    assert found["rank_correlation_less_cold"]["warm"] == pytest.approx([0, 0, 0])
    # In the mix a share u of all stands at u / 2 or at (1 + u) / 2, as chance has it: rho is 1/2.
    assert found["rank_correlation"]["mixed"][1] == pytest.approx(0.5, abs=0.1)
    assert found["loss_less_cold"] == pytest.approx([-2, -2, -2])


def test_a_warm_search_trains_from_the_parent_and_goes_on_where_it_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from hybrid_bench import PROXY, STEP_TOKENS, corpus_folder
    from warm_search import TABLE, Benchmark, WarmTraining

    from search.proxy import ProxyTraining
    from slm.architecture import Architecture
    from slm.data import PackedCorpus

    corpus = PackedCorpus.open(corpus_folder(tmp_path / "cache"))
    parent, child = sorted(Benchmark.load(TABLE).feasible, key=len)[:2]
    # Number, parent, what it is, tokens: the child begins with what the parent is by then.
    jobs = ((0, None, parent, 4), (1, 0, child, 2), (1, None, child, 4), (0, None, parent, 6))

    def train_all(count: int) -> list[float]:
        train = WarmTraining(tmp_path / "run", corpus)
        return [
            train(number, of, text, steps * STEP_TOKENS) for number, of, text, steps in jobs[:count]
        ]

    first = train_all(3)
    assert train_all(4)[:3] == first
    # In one go, without a checkpoint between.
    straight = ProxyTraining(
        Architecture.parse(child),
        corpus,
        PROXY,
        0,
        (Architecture.parse(parent), tmp_path / "run" / f"0-{4 * STEP_TOKENS}.safetensors"),
    )
    straight.train(4 * STEP_TOKENS)
    assert straight.validate() == first[2]
    cold = ProxyTraining(Architecture.parse(child), corpus, PROXY, 0)
    cold.train(2 * STEP_TOKENS)
    assert first[1] < cold.validate()
    with pytest.raises(SystemExit, match=r"of another search; choose another --folder"):
        WarmTraining(tmp_path / "run", corpus)(0, None, child, 4 * STEP_TOKENS)


def test_search_efficiency(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of the table, with the tokens that they took."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from search_efficiency import METHODS, TABLE, Benchmark, compare, run, tokens_to

    bench = Benchmark.load(TABLE)
    assert len(bench.losses) == 258
    curves = {name: run(TABLE, name, 0) for name in ("aging", "random", "ours")}
    for tokens, volume in curves.values():
        assert np.all(np.diff(tokens) > 0)
        assert np.all(np.diff(volume) >= 0)
        assert volume[-1] <= bench.highest + 1e-9
    # Full trainings, one after another.
    assert set(np.diff(curves["aging"][0])) == {bench.full_tokens}
    goal = 0.9 * bench.highest
    reached = {name: np.array([tokens_to(goal, curve)]) for name, curve in curves.items()}
    found = compare("random", reached)
    assert found["tokens_ratio"]["ratio"] == reached["random"][0] / reached["aging"][0]
    assert found["ours_ratio"]["high"] == reached["ours"][0] / reached["random"][0] < 1
    # Who never gets there is infinitely behind.
    never = compare("random", reached | {"random": np.array([math.inf])})
    assert never["tokens"] is never["tokens_ratio"]["ratio"] is None
    assert never["ours_ratio"]["high"] == 0

    tokens, _ = run(TABLE, "lowest_rung_first", 0)
    low = bench.budgets[3]
    assert tokens[-1] == len(bench.feasible) * low + 10 * (bench.full_tokens - low)
    assert set(METHODS) > set(curves)


def test_depth_width(root: Path, tmp_path: Path) -> None:
    """Two models by few tokens, of which it says that they are too few; then the fit once more."""
    files = ("--folder", str(tmp_path / "run"), "--results", str(tmp_path / "depth_width.json"))
    overrides = (
        *("grid.depths=[2]", "grid.widths=[32,64]", "grid.further_depths=[]"),
        *("grid.further_widths=[]", "grid.min_parameters=null", "proxy.rung_tokens=[512]"),
        *("proxy.validation_tokens=512", "protocol.max_seconds=0.05", "protocol.max_repeats=0"),
        *("protocol.compile_unit=eager", f"data.cache_dir={tmp_path / 'cache'}", "seeds=[0]"),
    )
    results = run(root, "depth_width", *files, *overrides)
    assert results["extrapolation_error"] is None
    assert results["trusted"] is False
    assert set(results["best_depth_by_budget"].values()) == {2}
    stored = json.loads((tmp_path / "depth_width.json").read_text())
    assert [each["width"] for each in stored["trainings"]] == [32, 64]
    assert run(root, "depth_width", *files, "--refit") == results


def test_claims(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All arms with models of one size, by few tokens; it goes on from what has been trained."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from claims import (
        CLAIMS,
        LEARNING_RATES,
        MIXERS,
        OPTIMIZERS,
        Store,
        model,
        proxy_config,
        recipe,
    )

    tokens = 1024
    path = tmp_path / "claims.json"
    models = {arm: model([MIXERS.get(arm, MIXERS["mamba2"])], 64) for arm in OPTIMIZERS}
    ratio = Measurement(
        median_ms=1.0, low_ms=0.9, high_ms=1.1, iqr_ms=0.1, n=9, converged=True, quiet=True
    )
    store = Store(path, recipe("shakespeare", proxy_config(tokens)))
    device = Device.current(threads=1, kind="cpu")
    store.keep_models(models)
    store.keep_latencies(dict.fromkeys(OPTIMIZERS, ratio), device)
    options = ["--tokens", str(tokens), "--source", "shakespeare", "--results", str(path)]
    options += ["--cache", str(tmp_path / "cache")]
    results = run(root, "claims", *options, "--seeds", "2")
    assert results["latency_ratio"] == {arm: [0.9, 1.0, 1.1] for arm in OPTIMIZERS}
    for claim, other in CLAIMS.items():
        found = results[claim]
        assert found["arms"] == ["hybrid", other]
        assert found["seeds"] == [0, 1]
        assert found["low"] <= found["difference"] <= found["high"]
        assert found["difference"] == pytest.approx(found["loss"][0] - found["loss"][1])
    trainings = json.loads(path.read_text())["trainings"]
    assert len(trainings) == len(OPTIMIZERS) * (len(LEARNING_RATES) + 1)

    # What was not done yet is done again, to the same loss, and nothing else.
    lost = trainings.pop()
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainings": trainings}))
    assert run(root, "claims", *options, "--seeds", "2") == results
    *others, again = json.loads(path.read_text())["trainings"]
    assert others == trainings
    assert again["loss"] == lost["loss"]


def test_claims_learning_rates_and_models(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is chosen by seed 0 alone; the model is the one nearest in latency."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from claims import LEARNING_RATES, MIXERS, Run, best_lr, of_equal_latency, paired_interval

    losses = {
        Run("hybrid", lr, 0): loss for lr, loss in zip(LEARNING_RATES, (4.0, 3.0), strict=False)
    }
    assert best_lr(losses, "hybrid") is None
    losses |= {
        Run("hybrid", LEARNING_RATES[2], 0): math.inf,
        Run("hybrid", LEARNING_RATES[0], 1): 2.0,
    }
    assert best_lr(losses, "hybrid") == LEARNING_RATES[1]

    target = 1_500_000
    for mixer in MIXERS.values():
        found = of_equal_latency(mixer, lambda each: float(each.parameters()), target)
        assert found.parameters() == pytest.approx(target, rel=0.02)

    mean, low, high = paired_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-4)
    assert paired_interval([1.0]) == (1.0, None, None)
    assert paired_interval([]) == paired_interval([1.0, math.inf]) == (None, None, None)
