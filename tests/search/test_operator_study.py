"""The operator study: its design, its statistics, and a whole one, tiny, as people start it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from omegaconf import open_dict
from scipy import stats
from small_search import SETTINGS, small_text

from search.cells import CellStore
from search.noise import mean_interval
from search.operator_study_config import StudyConfig, read_config
from search.operator_study_evaluator import OperatorEvaluator
from search.operator_study_results import pooled_accuracy
from search.operator_study_run import OperatorStudy
from search.study_design import (
    PARAMETER_TOLERANCE,
    Arrangement,
    StudySpaceConfig,
    match_latency,
    match_parameters,
)
from slm.architecture import Architecture
from slm.config import ConfigError, compose
from slm.operators import parse_operator
from slm.training import files

VOCAB_SIZE = 4096


def compose_study(*overrides: str, config_dir: Path | None = None) -> StudyConfig:
    composed = compose("operator_study", overrides, config_dir=config_dir)[0]
    with open_dict(composed):
        del composed["hydra"]
    return read_config(composed)


# Design


def labels_of(space: StudySpaceConfig) -> list[str]:
    labels = space.labels()
    return [" + ".join(labels[mixer] for mixer in a.mixers) for a in space.arrangements()]


def test_every_operator_stands_alone_and_beside_attention_and_mamba2() -> None:
    names = labels_of(compose_study().space)
    alone = names[:11]
    assert alone == [
        *("attention", "attention(window=64)", "mamba", "mamba2", "linear_attention", "gla"),
        *("deltanet", "gated_deltanet", "rwkv7", "kda", "short_convolution"),
    ]
    expected = {f"{name} + {partner}" for name in alone for partner in ("attention", "mamba2")}
    expected -= {"attention + attention", "mamba2 + mamba2", "mamba2 + attention"}
    assert sorted(names[11:]) == sorted(expected)


def test_all_partners_are_every_pair_once() -> None:
    space = compose_study("space.partners=all").space
    pairs = [frozenset(a.mixers) for a in space.arrangements() if len(a.mixers) == 2]
    assert len(pairs) == len(set(pairs)) == 11 * 10 // 2


def test_a_partner_that_is_no_operator_of_the_study_is_taken_as_it_is_written() -> None:
    space = compose_study("space.operators=[gla,deltanet]").space
    assert labels_of(space) == [
        *("gla", "deltanet", "gla + attention", "gla + mamba2"),
        *("deltanet + attention", "deltanet + mamba2"),
    ]


def test_an_ffn_follows_each_mixer_but_mamba() -> None:
    space = compose_study().space
    blocks = {
        tuple(mixer.name for mixer in a.mixers): [operator.name for operator in a.block(space)]
        for a in space.arrangements()
    }
    assert blocks["mamba",] == ["mamba"]
    assert blocks["mamba2",] == ["mamba2"]
    assert blocks["deltanet",] == ["deltanet", "ffn"]
    assert blocks["mamba", "mamba2"] == ["mamba", "mamba2", "ffn"]


def test_what_no_ffn_follows_is_the_users_to_say() -> None:
    operators = "space.operators=[gla,deltanet,mamba,'mamba(state_size=4)']"
    space = compose_study(operators, "space.without_ffn=[gla,'mamba(state_size=4)']").space
    without = [a.block_text(space) for a in space.arrangements() if len(a.block(space)) == 1]
    assert without == ["gla", "mamba(state_size=4)"]
    space = compose_study(operators, "space.without_ffn=[]").space
    assert all(len(a.block(space)) >= 2 for a in space.arrangements())


@pytest.mark.parametrize("overrides", [(), ("experiment=operator_study_small",)])
def test_parameters_are_equal_for_every_operator(overrides) -> None:
    config = compose_study(*overrides)
    space = config.space
    for arrangement in space.arrangements():
        matched = match_parameters(arrangement, space, VOCAB_SIZE, config.parameters)
        assert matched.parameters() == pytest.approx(config.parameters, rel=PARAMETER_TOLERANCE)
        nominal = space.num_operators / len(arrangement.block(space))
        assert abs(arrangement.count_blocks(space, matched) - nominal) <= 2
        assert matched.width in space.available_widths(arrangement)


DELTANET = Arrangement((parse_operator("deltanet(head_dim=32)"),))


def milliseconds(architecture: Architecture) -> float:
    """A device on which an operator costs something however narrow it is."""
    return 1.0 + len(architecture.operators) * (0.5 + (architecture.width / 256) ** 2)


class Stopwatch:
    """Counts what is measured."""

    def __init__(self) -> None:
        self.measured: list[Architecture] = []

    def __call__(self, architecture: Architecture) -> float:
        self.measured.append(architecture)
        return milliseconds(architecture)


@pytest.mark.parametrize("target_ms", [8.0, 9.1, 10.0, 14.2, 20.0, 40.0, 55.0])
def test_latency_is_met_by_width(target_ms) -> None:
    space = compose_study().space
    start = match_parameters(DELTANET, space, VOCAB_SIZE, 4_000_000)
    clock = Stopwatch()
    matched = match_latency(DELTANET, space, start, clock, target_ms, 1e-9)
    same_depth = [
        DELTANET.realize(space, DELTANET.count_blocks(space, start), width, VOCAB_SIZE)
        for width in space.available_widths(DELTANET)
    ]
    nearest = min(abs(milliseconds(other) - target_ms) for other in same_depth)
    assert abs(milliseconds(matched) - target_ms) == nearest
    assert len(matched.operators) == len(start.operators)
    assert len(set(clock.measured)) <= 8


@pytest.mark.parametrize(("target_ms", "fewer"), [(3.5, True), (200.0, False)])
def test_blocks_change_only_where_no_width_meets_the_latency(target_ms, fewer) -> None:
    space = compose_study().space
    start = match_parameters(DELTANET, space, VOCAB_SIZE, 4_000_000)
    matched = match_latency(DELTANET, space, start, milliseconds, target_ms, 0.02)
    assert (len(matched.operators) < len(start.operators)) == fewer
    assert milliseconds(matched) == pytest.approx(target_ms, rel=0.1)


def test_a_model_that_meets_the_latency_serves_both_comparisons() -> None:
    space = compose_study().space
    start = match_parameters(DELTANET, space, VOCAB_SIZE, 4_000_000)
    clock = Stopwatch()
    assert match_latency(DELTANET, space, start, clock, 1.01 * clock(start), 0.02) is start
    assert set(clock.measured) == {start}


# Statistics


def test_the_interval_of_the_loss_is_students() -> None:
    losses = [4.71, 4.75, 4.68]
    expected = stats.t.interval(0.95, 2, loc=sum(losses) / 3, scale=stats.sem(losses))
    assert mean_interval(losses) == pytest.approx(expected)
    assert mean_interval(losses[:1]) == (None, None)


def test_answers_to_the_same_questions_are_not_counted_twice() -> None:
    rng = random.Random(0)
    answers = "".join(rng.choices("0001", k=200))
    right = answers.count("1")
    wilson = stats.binomtest(right, 200).proportion_ci(method="wilson")
    expected = (right / 200, wilson.low, wilson.high)
    assert pooled_accuracy([answers]) == pytest.approx(expected)
    assert pooled_accuracy([answers] * 3) == pytest.approx(expected)


def test_answers_that_are_independent_count_as_often_as_they_are_given() -> None:
    accuracy, low, high = pooled_accuracy(["0011" * 50, "0101" * 50])
    wilson = stats.binomtest(200, 400).proportion_ci(method="wilson")
    assert (accuracy, low, high) == pytest.approx((0.5, wilson.low, wilson.high))
    assert pooled_accuracy([]) == pooled_accuracy([""]) == (None, None, None)


# Config


def test_every_problem_of_a_config_is_said() -> None:
    with pytest.raises(ConfigError) as error:
        compose_study(
            "space.operators=[attention,atention]",
            "space.ffn=deltanet",
            "space.max_width=8",
            "proxy.rung_tokens=[1]",
            "seeds=[1,1]",
            "parameters=0",
        )
    problems = "\n".join(error.value.problems)
    assert "seeds: must differ, got [1, 1]" in problems
    assert "parameters: must be greater than 0, got 0" in problems
    assert "space.max_width: must be >= min_width 64, got 8" in problems
    assert "space.operators: operator 'atention' is unknown" in problems
    assert "space.ffn: must be an ffn, got 'deltanet'" in problems
    assert "proxy.rung_tokens: must be >= the 4096 tokens of one step, got 1" in problems


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seeds=[]", "seeds: must not be empty"),
        ("seeds=[1,1]", "seeds: must differ, got [1, 1]"),
        ("space.partners=some", "space.partners: must be 'all' or a list, got 'some'"),
        ("space.operators=[]", "space.operators: must not be empty"),
        ("space.without_ffn=[mamba3]", "space.without_ffn: operator 'mamba3' is unknown"),
        ("space.without_ffn=[ffn]", "space.without_ffn: must be mixers, got 'ffn'"),
        ("space.operators=[ffn]", "space.operators: must be mixers, got 'ffn'"),
        (
            'space.operators=["deltanet(head_dim=100)"]',
            "space.operators: no width of",
        ),
    ],
)
def test_a_problem_names_its_field(override, problem) -> None:
    with pytest.raises(ConfigError) as error:
        compose_study(override, "space.width_step=64")
    assert any(line.startswith(problem) for line in error.value.problems)


def test_another_study_in_the_same_folder_is_refused_with_what_differs(tmp_path) -> None:
    identity = compose_study().identity()
    CellStore(tmp_path, "first", identity)
    # More seeds and operators go on with it.
    more = compose_study("seeds=[0,1,2,3]", 'space.operators=["attention(head_dim=32)",gla]')
    CellStore(tmp_path, "first", more.identity())
    other = compose_study("parameters=1000", "space.operators=[gla]").identity()
    with pytest.raises(ConfigError) as error:
        CellStore(tmp_path, "first", other)
    assert sorted(line.partition(":")[0] for line in error.value.problems) == [
        *("parameters", "reference"),
    ]


# Whole studies

OPERATORS = ("attention(head_dim=16)", "deltanet(head_dim=16)")
NAMES = ["attention", "deltanet", "attention + deltanet"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """A folder with the experiment `tiny`: a small text, small operators, few tokens."""
    folder = tmp_path_factory.mktemp("experiment")
    values = {
        **SETTINGS,
        "data": small_text(folder),
        "space": {
            "operators": list(OPERATORS),
            "partners": ["deltanet"],
            "num_operators": 4,
            "min_width": 16,
            "max_width": 64,
        },
        "parameters": 40_000,
        "seeds": [0],
    }
    (folder / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /data: text\n" + yaml.safe_dump(values)
    (folder / "experiment" / "tiny.yaml").write_text(text)
    return folder


def start(experiment: Path, folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "search.operator_study", "--config-dir"]
    arguments = [str(experiment), "experiment=tiny", f"hydra.run.dir={folder}", *overrides]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def cells(folder: Path) -> dict[str, int]:
    """When each cell was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}


def test_a_killed_study_goes_on_and_loses_and_doubles_nothing(experiment, tmp_path) -> None:
    process = start(experiment, tmp_path)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("1/") and "seed 0" in line:
            break
    process.kill()
    process.stdout.read()
    process.wait(timeout=60)
    before = cells(tmp_path)
    num_trained = sum(name.startswith("training") for name in before)
    assert num_trained >= 1, "".join(said)

    process = start(experiment, tmp_path)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    after = cells(tmp_path)
    assert {name: after[name] for name in before} == before
    rows = json.loads((tmp_path / "operators.json").read_text())["rows"]
    assert [(row["matching"], row["name"]) for row in rows] == [
        (matching, name) for matching in ("parameters", "latency") for name in NAMES
    ]
    trained = {f"training-{row['digest']}-0.json" for row in rows}
    assert {name for name in after if name.startswith("training")} == trained
    assert num_trained < len(trained)
    check_rows(rows)
    check_files(tmp_path, rows)
    assert f"look at it: {tmp_path / 'operators.html'}" in output


def check_rows(rows) -> None:
    for row in rows:
        architecture = Architecture.parse(row["architecture"])
        assert row["error"] is None
        assert row["parameters"] == architecture.parameters()
        assert row["state_bytes"] == architecture.state_bytes(8)
        assert row["loss"] > 0
        assert row["losses"] == [row["loss"]]
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["accuracy_items"] == 20
        for time in ("latency", "tpot", "ttft"):
            assert row[f"{time}_low_ms"] <= row[f"{time}_ms"] <= row[f"{time}_high_ms"]
        # The time per token is a difference, whose interval may reach below zero on a busy machine.
        assert 0 < row["ttft_low_ms"] < row["latency_high_ms"]
        if row["matching"] == "parameters":
            assert abs(row["parameters_deviation"]) < 0.1
    assert rows[0]["latency_deviation"] == 0


def check_files(folder: Path, rows) -> None:
    table = pd.read_parquet(folder / "operators.parquet")
    assert table["loss"].tolist() == [row["loss"] for row in rows]
    assert pd.read_csv(folder / "operators.csv")["name"].tolist() == table["name"].tolist()
    page = (folder / "operators.html").read_text()
    for name in NAMES:
        # As the page's script writes '<b>name</b>'.
        assert page.count(f"\\u003cb\\u003e{name}\\u003c\\u002fb\\u003e") == 2
    assert "<script src=" not in page


class CrashingEvaluator(OperatorEvaluator):
    """Loses its process whenever it trains DeltaNet, and cannot measure a hybrid."""

    def measure(self, text, reference_times, report):
        if "attention" in text and "deltanet" in text:
            raise ValueError("no such luck")
        return super().measure(text, reference_times, report)

    def train(self, text, seed, budgets, report):
        if "deltanet" in text:
            os._exit(9)
        return super().train(text, seed, budgets, report)


class CrashingStudy(OperatorStudy):
    """Evaluates with the above."""

    def _evaluator(self) -> CrashingEvaluator:
        return CrashingEvaluator(**vars(super()._evaluator()))


def test_a_crash_costs_one_cell(experiment, tmp_path) -> None:
    # From 0.2 to 39.8 ms, any latency meets this target, so that few models are compiled.
    target = ("target_ms=20", "latency_tolerance=0.99")
    overrides = ("protocol.compile_unit=operator", *target)
    config = compose_study("experiment=tiny", *overrides, config_dir=experiment)
    rows = CrashingStudy(config, tmp_path).run()
    errors = {row["name"]: row["error"] for row in rows}
    assert errors == {
        "attention": None,
        "deltanet": "seed 0: the worker process exited with code 9",
        "attention + deltanet": "not measured: ValueError: no such luck",
    }
    assert all((row["loss"] is not None) == (row["name"] == "attention") for row in rows)
    assert (tmp_path / "operators.html").exists()


def test_a_study_that_runs_is_left_alone(experiment, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    config = compose_study("experiment=tiny", config_dir=experiment)
    with files.alone(tmp_path), pytest.raises(ConfigError, match="name: another command is at"):
        OperatorStudy(config, tmp_path).run()
    assert not (tmp_path / "operators.json").exists()


def test_a_bad_command_line_writes_nothing(experiment, tmp_path) -> None:
    folder = tmp_path / "run"
    process = start(experiment, folder, "seeds=[-1]", "space.width_step=0")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "error: seeds[0]: " in output
    assert "error: space.width_step: " in output
    assert not folder.exists()
