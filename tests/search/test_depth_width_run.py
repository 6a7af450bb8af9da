"""Whole studies of depth and width, as people start, kill and interrupt them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from depth_width_configs import compose_study
from programs import run_program
from small_search import SETTINGS, small_text

from search.cell_evaluator import CellEvaluator
from search.depth_width_results import Findings
from search.depth_width_run import DepthWidthStudy
from slm.architecture import Architecture
from slm.config import ConfigError


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """A folder with the experiment `tiny`: a small text, small models, few tokens."""
    folder = tmp_path_factory.mktemp("experiment")
    values = {
        **{key: value for key, value in SETTINGS.items() if key != "accuracy_items"},
        "data": small_text(folder),
        "grid": {
            "blocks": {"A": {"operators": ["attention(head_dim=16)", "ffn"]}},
            **{"depths": [1, 2], "widths": [32, 64], "further_depths": [3], "further_widths": []},
        },
        "seeds": [0],
    }
    (folder / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /data: text\n" + yaml.safe_dump(values)
    (folder / "experiment" / "tiny.yaml").write_text(text)
    return folder


def start(experiment: Path, folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "search.depth_width", "--config-dir", str(experiment)]
    return subprocess.Popen(
        [*command, "experiment=tiny", f"hydra.run.dir={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def cells(folder: Path) -> dict[str, int]:
    """When each cell was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}


def read_until(process: subprocess.Popen, is_it) -> str:
    """What the program says up to a line."""
    said = []
    for line in process.stdout:
        said.append(line)
        if is_it(line):
            break
    return "".join(said)


def test_a_killed_study_goes_on_and_loses_and_doubles_nothing(experiment, tmp_path) -> None:
    process = start(experiment, tmp_path)
    said = read_until(process, lambda line: line.startswith("1/") and "seed 0" in line)
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.read()
    process.wait(timeout=60)
    before = cells(tmp_path)
    num_trained = sum(name.startswith("training") for name in before)
    # Latencies came first, of all six sizes.
    assert sum(name.startswith("measurement") for name in before) == 6, said
    assert 1 <= num_trained < 4, said

    process = start(experiment, tmp_path)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    after = cells(tmp_path)
    assert {name: after[name] for name in before} == before
    found = json.loads((tmp_path / "depth_width.json").read_text())
    rows = found["rows"]
    sizes = [(row["depth"], row["width"], row["is_trained"]) for row in rows]
    assert sizes == [(depth, width, depth < 3) for depth in (1, 2, 3) for width in (32, 64)]
    trained = [row for row in rows if row["is_trained"]]
    names = {f"training-{row['digest']}-0.json" for row in trained}
    assert {name for name in after if name.startswith("training")} == names
    for each in rows:
        architecture = Architecture.parse(each["architecture"])
        assert each["error"] is None
        assert each["parameters"] == architecture.parameters()
        assert each["latency_low_ms"] <= each["latency_ms"] <= each["latency_high_ms"]
        assert each["predicted_perplexity"] is None
    for each in trained:
        assert each["perplexity"] == pytest.approx(math.exp(each["losses"][0]))
    assert not any(row["perplexity"] for row in rows if not row["is_trained"])

    assert "the law is not to be trusted" in output
    assert "too few points for 5 constants: 4" in output
    assert "α" not in output
    assert found["law"]["constants"] is None
    page = (tmp_path / "report.html").read_text()
    assert "too few points for 5 constants: 4" in page
    assert "<script src=" not in page
    table = pd.read_parquet(tmp_path / "depth_width.parquet")
    assert table["latency_ms"].tolist() == [row["latency_ms"] for row in rows]
    assert pd.read_csv(tmp_path / "depth_width.csv")["depth"].tolist() == table["depth"].tolist()
    # All that was said can be found again in what was written.
    again = Findings(rows, found["trainings"], found["budgets_ms"]).summary()
    assert json.loads(json.dumps(again)) == {key: found[key] for key in again}


def test_a_choice_can_be_trained(root, experiment, tmp_path) -> None:
    config = compose_study("experiment=tiny", "budgets_ms=[1e6]", config_dir=experiment)
    rows = DepthWidthStudy(config, tmp_path).run()
    best = min((row for row in rows if row["is_trained"]), key=lambda row: row["perplexity"])
    (path,) = (tmp_path / "frontier" / "model").glob("*.yaml")
    assert path.stem == best["digest"]
    first, second = path.read_text().splitlines()[:2]
    assert first == f"# python train.py --config-dir {tmp_path}/frontier model={path.stem}"
    assert second.startswith("# The best depth and width within 1e+06 ms, of those trained: ")
    _, _, program, *arguments = first.split()
    text = small_text(tmp_path)
    done = run_program(
        *(root / program, *arguments, "data=text", "trainer=cpu_small"),
        *(f"data.files={text['files']}", f"data.cache_dir={text['cache_dir']}"),
        *("tokenizer.vocab_size=300", "trainer.max_steps=1", "trainer.batch_tokens=32"),
        *("trainer.sequence_tokens=16", "trainer.validation_tokens=128"),
        folder=tmp_path,
        environment={"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "train" / "result.json").read_text())
    assert result["architecture"] == best["architecture"]


def test_one_point_alone_is_a_study(experiment, tmp_path) -> None:
    only = ("grid.depths=[1]", "grid.widths=[32]", "grid.further_depths=[]")
    config = compose_study("experiment=tiny", *only, config_dir=experiment)
    (row,) = DepthWidthStudy(config, tmp_path).run()
    found = json.loads((tmp_path / "depth_width.json").read_text())
    (choice,) = found["choices"]
    assert choice["digest"] == row["digest"]
    assert found["law"]["doubts"][0] == "too few points for 5 constants: 1, where 10 would do"
    assert "too few budgets" in found["finding"]


def test_several_budgets_of_tokens_are_the_n_of_the_law(experiment, tmp_path) -> None:
    """Of a constant rate in one training; it was the same at its first budget as if it ended."""
    few = (
        *("grid.depths=[1]", "grid.widths=[32]", "grid.further_depths=[]"),
        "proxy.optimizer.warmup_steps=1",
    )
    budgets = "proxy.rung_tokens=[160,320]"
    constant = "proxy.optimizer.schedule=constant"
    found = {}
    for name, overrides in (
        ("both", (budgets, constant)),
        ("short", ("proxy.rung_tokens=[160]", constant)),
        ("falling", (budgets,)),
    ):
        config = compose_study("experiment=tiny", *few, *overrides, config_dir=experiment)
        DepthWidthStudy(config, tmp_path / name).run()
        stored = json.loads((tmp_path / name / "depth_width.json").read_text())
        found[name] = {each["tokens"]: each["loss"] for each in stored["trainings"]}
        num_cells = sum(cell.startswith("training") for cell in cells(tmp_path / name))
        assert num_cells == (2 if name == "falling" else 1)
        (row,) = stored["rows"]
        assert row["perplexity"] == pytest.approx(math.exp(found[name][max(found[name])]))
    assert found["short"] == {160: found["both"][160]}
    assert list(found["falling"]) == [160, 320]
    assert found["falling"][320] != found["both"][320]


class CrashingEvaluator(CellEvaluator):
    """Loses its process whenever it trains two blocks, and cannot measure three."""

    def measure(self, text, reference_times, report):
        if text.count("ffn") == 3:
            raise ValueError("no such luck")
        return super().measure(text, reference_times, report)

    def train(self, text, seed, budgets, report):
        if text.count("ffn") == 2:
            os._exit(9)
        return super().train(text, seed, budgets, report)


class CrashingStudy(DepthWidthStudy):
    """Evaluates with the above."""

    def _evaluator(self) -> CrashingEvaluator:
        return CrashingEvaluator(**vars(super()._evaluator()))


def test_a_crash_costs_one_cell(experiment, tmp_path) -> None:
    config = compose_study("experiment=tiny", config_dir=experiment)
    rows = CrashingStudy(config, tmp_path).run()
    errors = {
        1: None,
        2: "seed 0: the worker process exited with code 9",
        3: "not measured: ValueError: no such luck",
    }
    assert all(row["error"] == errors[row["depth"]] for row in rows)
    assert all((row["perplexity"] is not None) == (row["depth"] == 1) for row in rows)
    # Where nothing failed the next time, what had failed stands until its file is deleted.
    assert DepthWidthStudy(config, tmp_path).run() == rows
    for path in (tmp_path / "cells").glob("*.json"):
        if "error" in json.loads(path.read_text()):
            path.unlink()
    rows = DepthWidthStudy(config, tmp_path).run()
    assert all(row["error"] is None for row in rows)


class BlindStudy(DepthWidthStudy):
    """Has nothing to measure with."""

    def _evaluator(self) -> CellEvaluator:
        return BlindEvaluator(**vars(super()._evaluator()))


class BlindEvaluator(CellEvaluator):
    """Measures nothing."""

    def yardstick(self, report):
        raise ValueError("no such luck")


def test_without_the_reference_model_nothing_is_measured(experiment, tmp_path) -> None:
    config = compose_study("experiment=tiny", config_dir=experiment)
    problem = "the reference model cannot be measured: ValueError: no such luck"
    with pytest.raises(ConfigError, match=problem):
        BlindStudy(config, tmp_path).run()


def test_an_interrupt_ends_all_workers_without_a_traceback(experiment, tmp_path) -> None:
    """As Ctrl-C on a terminal, which reaches every process; what is known is published."""
    long = ("proxy.rung_tokens=[10000000]", "processes=2", "seeds=[0,1]")
    process = start(experiment, tmp_path, *long)
    said = read_until(process, lambda line: "trainings, 0 of them done" in line)
    time.sleep(1)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said + rest
    assert "interrupted; the same command goes on from here" in rest
    assert "8 of 8 trainings are missing; the same command makes them" in rest
    assert "nothing is trained yet" in rest
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert (tmp_path / "report.html").exists()
    assert not any(name.startswith("training") for name in cells(tmp_path))


def test_a_damaged_cell_is_named(experiment, tmp_path) -> None:
    few = ("grid.depths=[1]", "grid.widths=[32]", "grid.further_depths=[]")
    config = compose_study("experiment=tiny", *few, config_dir=experiment)
    (row,) = DepthWidthStudy(config, tmp_path).run()
    path = tmp_path / "cells" / f"measurement-{row['digest']}.json"
    path.write_text(path.read_text()[:20])
    process = start(experiment, tmp_path, *few)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert f"error: {path}: not valid JSON" in output


def test_a_bad_command_line_writes_nothing(experiment, tmp_path) -> None:
    folder = tmp_path / "run"
    process = start(experiment, folder, "seeds=[-1]", "grid.widths=[40]")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "error: seeds[0]: " in output
    assert "error: grid.widths: 40: " in output
    assert not folder.exists()
