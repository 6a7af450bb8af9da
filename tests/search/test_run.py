"""Whole searches, tiny, as people start them."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import psutil
import pytest
from scipy import stats
from small_search import NUM_CANDIDATES, compose_tiny

from search import config as search_config
from search.evaluate import Evaluator
from search.proxy import load_weights
from search.results import WORST_LATENCY_TARGETS, candidate_row
from search.run import Search
from search.searcher import MEASURED, Searcher
from search.storage import StorageConfig
from search.worker import Worker
from slm.architecture import Architecture
from slm.config import ConfigError, compose, read
from slm.model_config import ModelConfig


def start(experiment: list[str], folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "search", *experiment, f"hydra.run.dir={folder}"]
    return subprocess.Popen(
        [*command, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def stop_after(process: subprocess.Popen, number: int, signal_number: int) -> str:
    """Send a signal once the candidate's line has appeared; what the process said after it."""
    for line in process.stdout:
        if line.startswith(f"#{number} "):
            break
    else:
        pytest.fail(f"the search ended with code {process.wait()} before candidate {number}")
    process.send_signal(signal_number)
    rest = process.stdout.read()
    process.wait(timeout=60)
    return rest


def read_json(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def finished(experiment, tmp_path_factory) -> Path:
    """The folder of an uninterrupted search."""
    folder = tmp_path_factory.mktemp("finished")
    finish(start(experiment, folder))
    return folder


def test_a_killed_and_an_interrupted_search_go_on_as_if_nothing_had_been(
    experiment, finished, tmp_path
):
    stop_after(start(experiment, tmp_path), 1, signal.SIGKILL)
    for number, signal_number in ((2, signal.SIGTERM), (3, signal.SIGINT)):
        process = start(experiment, tmp_path)
        assert "the same command goes on from here" in stop_after(process, number, signal_number)
        assert process.returncode == 130
    assert read_json(tmp_path / "search.json")["status"] == "interrupted"
    assert (tmp_path / "report.html").exists()
    finish(start(experiment, tmp_path))

    compared = ("number", "state", "origin", "parent", "factor", "architecture", "loss")
    rows = read_json(tmp_path / "candidates.json")
    expected = read_json(finished / "candidates.json")
    assert [[row[key] for key in compared] for row in rows] == [
        [row[key] for key in compared] for row in expected
    ]
    assert [row["state"] for row in rows] == ["scored"] * NUM_CANDIDATES
    assert {row["origin"] for row in rows} == {"seed", "random", "mutation"}
    # Nothing that had been scored was trained again.
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    scored = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert [t.user_attrs["proposal"]["number"] for t in scored] == list(range(NUM_CANDIDATES))
    assert sum(t.state.name == "FAIL" for t in study.trials) <= 3


def test_a_finished_search_started_again_does_nothing(experiment, finished):
    before = (finished / "candidates.json").read_bytes()
    modified = (finished / "candidates.json").stat().st_mtime_ns
    output = finish(start(experiment, finished))
    assert f"{NUM_CANDIDATES} candidates scored" in output
    assert "latency of" not in output
    assert (finished / "candidates.json").read_bytes() == before
    assert (finished / "candidates.json").stat().st_mtime_ns == modified


def test_another_search_in_the_same_folder_is_refused_with_what_differs(experiment, finished):
    output = finish(start(experiment, finished, "seed=1", "workload.new_tokens=8"), code=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "error: seed: the search 'search' was made with 0, now it is 1" in output
    assert "error: workload.new_tokens: the search 'search' was made with 4, now it is 8" in output


def test_a_bad_config_writes_nothing(experiment, tmp_path):
    folder = tmp_path / "run"
    output = finish(start(experiment, folder, "evolution.sample_size=0", "seed=-1"), code=2)
    assert "error: evolution.sample_size: must be >= 1, got 0" in output
    assert "error: seed: " in output
    assert not folder.exists()


def test_what_workers_as_slurm_jobs_cannot_do_is_refused(experiment, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path / "run"
    overrides = ("hydra/launcher=slurm", "workers=2", "hydra.launcher.gpus_per_node=4")
    output = finish(start(experiment, folder, *overrides, "storage=journal"), code=2)
    assert "error: storage.kind: Slurm's jobs may run on several machines" in output
    assert "take storage=postgresql" in output
    assert "error: hydra.launcher.gpus_per_node: must be devices_per_candidate=1, or null" in output
    output = finish(start(experiment, folder, "hydra/launcher=local"), code=2)
    assert output == "error: hydra/launcher: workers are launched by 'slurm', got 'local'\n"
    assert not folder.exists()


def test_the_frontier_is_what_the_candidates_say(finished):
    rows = read_json(finished / "candidates.json")
    frontier = read_json(finished / "frontier.json")
    points = {row["digest"]: (row["loss"], row["latency_ms"]) for row in rows}
    expected = {
        digest
        for digest, (loss, latency_ms) in points.items()
        if not any(
            (a, b) != (loss, latency_ms) and a <= loss and b <= latency_ms
            for a, b in points.values()
        )
    }
    assert {member["digest"] for member in frontier["members"]} == expected
    assert frontier["chosen"] == min(points, key=points.get)
    assert (finished / "frontier" / "chosen").read_text() == frontier["chosen"] + "\n"
    assert frontier["hypervolume_point"][1] == pytest.approx(1e6 * WORST_LATENCY_TARGETS)
    areas = [area for _, _, area in frontier["hypervolume_history"]]
    assert areas == sorted(areas)
    assert areas[-1] == frontier["hypervolume"] > 0
    for member in frontier["members"]:
        assert member["cloze_error_low"] <= member["cloze_error"] <= member["cloze_error_high"]
        assert member["cloze_error_items"] == 20
    table = pd.read_parquet(finished / "history.parquet")
    assert table["loss"].tolist() == [row["loss"] for row in rows]


def test_a_member_is_a_model_config_of_the_architecture_that_was_measured(finished):
    for member in read_json(finished / "frontier.json")["members"]:
        config = compose("train", [f"model={member['digest']}"], config_dir=finished / "frontier")[
            0
        ]
        architecture = read(ModelConfig, config.model, "model").architecture(300)
        assert architecture.digest == member["digest"]
        assert str(architecture) == member["architecture"]


def test_records_hold_what_was_measured_and_trained(finished):
    search = read_json(finished / "search.json")
    assert search["status"] == "finished"
    assert search["table"]["error"]["num_models"] == NUM_CANDIDATES
    for row in read_json(finished / "candidates.json"):
        architecture = Architecture.parse(row["architecture"])
        # Nothing is too slow for the target, so the widest is taken.
        assert row["width"] == 48
        assert row["latency_low_ms"] <= row["latency_ms"] <= row["latency_high_ms"]
        assert row["predicted_ms"] > 0
        assert row["tokens"] == 320
        assert row["parameters"] == architecture.parameters()
        assert [tokens for tokens, _ in row["loss_curve"]] == [320]
        model = load_weights(architecture, finished / "candidates" / row["checkpoint"])
        assert sum(p.numel() for p in model.parameters()) == row["parameters"]


class CrashingEvaluator(Evaluator):
    """Loses its process while training candidate after candidate, all but the transformer."""

    def train(self, text, *arguments, report):
        if "deltanet" in text:
            os._exit(9)
        return super().train(text, *arguments, report=report)


def test_a_logger_that_a_search_does_not_have_is_refused(experiment):
    with pytest.raises(ConfigError, match=r"logger\.name: must be 'csv' or 'wandb' in a search"):
        compose_tiny(experiment, "logger=tensorboard")


def test_a_crash_costs_one_candidate(experiment, tmp_path):
    search = Search(compose_tiny(experiment, "num_candidates=3"), tmp_path)
    searcher = search.searcher
    evaluator = searcher.worker._target
    searcher.__dict__["worker"] = worker = Worker(CrashingEvaluator(**vars(evaluator)))
    searcher.resources.callback(worker.close)
    summary = search.run()
    rows = read_json(tmp_path / "candidates.json")
    crashed = [row for row in rows if "deltanet" in row["architecture"]]
    assert crashed
    for row in rows:
        assert row["state"] == ("failed" if row in crashed else "scored")
    assert {row["error"] for row in crashed} == {"the worker process exited with code 9"}
    assert summary["num_failed"] == len(crashed)


def test_a_target_out_of_reach_is_said(experiment, tmp_path):
    overrides = ("target_ms=1e-6", "max_infeasible=3")
    output = finish(start(experiment, tmp_path, *overrides), code=2)
    assert "error: target_ms: 1e-06 is out of reach" in output
    assert "predicted" in output
    # Nothing was trained for it.
    assert list((tmp_path / "candidates").iterdir()) == []
    assert [row["misses"] for row in read_json(tmp_path / "candidates.json")] == ["latency"] * 3


def test_wandb_gets_every_evaluation_and_how_the_search_stands(root, tmp_path, monkeypatch):
    """In a search whose scores cost nothing; all else is a search's own."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    # Put back afterwards.
    monkeypatch.setattr("search.run.Searcher", Searcher)
    from cheap_search import cheap_search

    size = "space.constraints.max_parameters=420000"
    overrides = ("logger=wandb", "logger.offline=true", size)
    logged: list[dict] = []
    # The second search goes on with the first.
    for num_candidates in (6, 12):
        cheap_search(tmp_path, num_candidates, "sqlite", *overrides).run()
        (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
        logged += wandb_history(record)
        record.rename(tmp_path / f"{num_candidates}-{record.name}")
    names = {path.name.partition("-")[2] for path in tmp_path.glob("*.wandb")}
    assert len(names) == 1, "the second is another run"
    # W&B drops a row whose step is not above the last one's.
    assert [values["_step"] for values in logged] == list(range(1, len(logged) + 1))
    rows = read_json(tmp_path / "candidates.json")
    assert any(row["rung"] > 0 for row in rows)
    for row in rows:
        is_too_large = "max_parameters" in (row["error"] or "")
        assert row["misses"] == ("size" if is_too_large else None)
    for row in rows:
        of_row = [values for values in logged if values["number"] == row["number"]]
        assert {values["state"] for values in of_row} == {row["state"]}
        losses = [values["loss"] for values in of_row if "loss" in values]
        assert losses == [each["loss"] for each in row["rungs"]]
    frontier = read_json(tmp_path / "frontier.json")
    assert frontier["num_too_slow"] == 0
    assert frontier["num_too_large"] == sum(row["state"] == "infeasible" for row in rows) > 0
    last = logged[-1]
    assert last["best_loss"] == min(row["loss"] for row in rows if row["loss"] is not None)
    assert last["num_on_frontier"] == len(frontier["members"])
    assert last["hypervolume"] == frontier["hypervolume"]
    assert last["proxy_tokens"] == frontier["tokens"]
    assert (last["candidates_done"], last["busy_share"]) == (12, 1.0)
    assert last["candidates_per_hour"] > 0


def wandb_history(path: Path) -> list[dict]:
    """The rows that W&B has written to a file.

    It is a log as LevelDB has it: blocks of 32 KiB, in them pieces of records, each after its
    checksum (4 bytes), length (2) and kind (1: whole record, 2: first piece, 3: next, 4: last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, pieces, history = path.read_bytes(), 7, b"", []
    while place < len(content):
        if (left := -place % 2**15) and left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record, pieces = Record.FromString(pieces), b""
            if record.HasField("history"):
                items = record.history.item
                names = [item.key or "/".join(item.nested_key) for item in items]
                values = [json.loads(item.value_json) for item in items]
                history.append(dict(zip(names, values, strict=True)))
    return history


LIMIT = ("+limits.long.workload.prompt_tokens=12", "+limits.long.workload.new_tokens=4")


def test_a_limit_is_measured_recorded_and_shown(experiment, tmp_path):
    overrides = ("num_candidates=2", "accuracy_items=0", "+limits.long.target_ms=1e5")
    Search(compose_tiny(experiment, *LIMIT, *overrides), tmp_path).run()
    rows = read_json(tmp_path / "candidates.json")
    assert [row["state"] for row in rows] == ["scored"] * 2
    for row in rows:
        limit = row["limits"]["long"]
        assert 0 < limit["latency_low_ms"] <= limit["latency_ms"] <= limit["latency_high_ms"]
        assert limit["predicted_ms"] > 0
        assert limit["latency_ms"] != row["latency_ms"]
    described = read_json(tmp_path / "search.json")["limits"]["long"]
    assert described["workload"]["prompt_tokens"] == 12
    assert (described["target_ms"], described["target_source"]) == (1e5, "given")
    table = pd.read_parquet(tmp_path / "history.parquet")
    measured = [row["limits"]["long"]["latency_ms"] for row in rows]
    assert table["limits.long.latency_ms"].tolist() == measured
    assert "long, ms [95 %]" in (tmp_path / "report.html").read_text()
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    for trial, row, ms in zip(study.trials, rows, measured, strict=True):
        assert list(trial.constraints.values()) == pytest.approx(
            [row["latency_ms"] - 1e6, ms - 1e5]
        )


def test_other_limits_are_another_search(experiment, tmp_path):
    Search(compose_tiny(experiment, *LIMIT), tmp_path)
    with pytest.raises(ConfigError) as caught:
        Search(compose_tiny(experiment, *LIMIT, "+limits.long.target_ms=3"), tmp_path)
    (problem,) = caught.value.problems
    assert problem.startswith("limits.long.target_ms: the search 'search' was made with None, now")
    with pytest.raises(ConfigError, match=r"limits\.long\.workload\.prompt_tokens: .*None"):
        Search(compose_tiny(experiment), tmp_path)


def invented_ms(architecture: Architecture, prompt_tokens: int) -> float:
    """Attention makes long prompts slow."""
    num_attention = sum(operator.name == "attention" for operator in architecture.operators)
    return architecture.width * (1 + num_attention * (prompt_tokens > 4))


class InventingEvaluator(Evaluator):
    """Invents latencies, and losses too."""

    def measure(self, text, workload, reference_times, report):
        ms = invented_ms(Architecture.parse(text), workload.prompt_tokens)
        return {**dict.fromkeys(MEASURED, 0.0), "latency_ms": ms}

    def train(self, text, tokens, start, parent, checkpoint, report):
        (self.candidates_folder / checkpoint).touch()
        return {"loss": 1.0, "train_loss": 1.0, "tokens": tokens, "loss_curve": []}


class InventingSearcher(Searcher):
    """A searcher whose tables are off by a hundredth."""

    @cached_property
    def tables(self):
        # Of each only the references' times and the path are asked for.
        return defaultdict(lambda: SimpleNamespace(reference_times=None, path=str))

    def _predict_ms(self, architecture, workload):
        return 0.99 * invented_ms(architecture, workload.prompt_tokens)


def test_the_width_is_the_largest_that_meets_every_target(experiment, tmp_path):
    targets = {4: 40.0, 12: 70.0}
    overrides = ("target_ms=40", "+limits.long.target_ms=70", "num_candidates=12")
    searcher = InventingSearcher(compose_tiny(experiment, *LIMIT, *overrides), tmp_path)
    evaluator = InventingEvaluator(**vars(searcher.worker._target))
    searcher.__dict__["worker"] = worker = Worker(evaluator)
    searcher.resources.callback(worker.close)
    done = []
    with searcher.resources:
        searcher.prepare()
        searcher.run(done.append)

    rows = [candidate_row(r, searcher.space, 40.0, 8) for r in searcher.study.records]
    widths = searcher.config.space.widths
    for row in rows:
        genotype = searcher.study.records[row["number"]].proposal.genotype
        architectures = [searcher.space.realize(genotype, w, 300) for w in widths]
        fitting = [
            each.width
            for each in architectures
            if all(invented_ms(each, tokens) <= most for tokens, most in targets.items())
        ]
        if fitting:
            assert (row["state"], row["width"]) == ("scored", max(fitting))
            assert row["limits"]["long"]["latency_ms"] <= 70
        else:
            assert (row["state"], row["checkpoint"]) == ("infeasible", None)
            assert (row["meets_target"], row["misses"]) == (False, "latency")
            assert re.fullmatch(
                r"limits\.long\.target_ms: must be <= 70 under b1-p12-n4-float32, "
                r"(measured|predicted) [\d.]+ at width 16",
                row["error"],
            )
    states = [row["state"] for row in rows]
    assert done == list(range(len(rows)))
    assert states.count("scored") == 12
    assert states.count("infeasible") > 0
    # The first target alone would have taken other widths.
    assert {row["width"] for row in rows if row["state"] == "scored"} == {16, 32}


def test_workers_share_a_search_and_one_that_is_killed_or_frozen_loses_nothing(
    experiment, tmp_path
):
    overrides = ("workers=2", "storage=journal", "storage.lease_seconds=5", "accuracy_items=0")
    rungs = "proxy.rung_tokens=[160,320]"
    process = start(experiment, tmp_path, *overrides, rungs, "num_candidates=8")
    for line in process.stdout:
        if line.startswith("#1 "):
            break
    children = psutil.Process(process.pid).children()
    searchers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    killed, frozen = (each for each in searchers if each.children())
    killed.kill()
    frozen.suspend()
    rest = []
    for line in process.stdout:
        rest.append(line)
        # The one that took the place of the killed has finished some, and the lease is over.
        if "died and is started again" in "".join(rest) and sum(x[0] == "#" for x in rest) == 4:
            frozen.resume()
    assert process.wait(timeout=60) == 0, "".join(rest)

    rows = read_json(tmp_path / "candidates.json")
    assert [row["number"] for row in rows] == list(range(8))
    assert {row["state"] for row in rows} == {"scored"}
    assert len({row["architecture"] for row in rows}) == 8
    climbed = [row for row in rows if row["rung"] == 1]
    assert climbed
    for row in rows:
        assert [each["tokens"] for each in row["rungs"]] == [160, 320][: row["rung"] + 1]
        assert row["loss"] == row["rungs"][-1]["loss"]
        load_weights(
            Architecture.parse(row["architecture"]), tmp_path / "candidates" / row["checkpoint"]
        )
    # One checkpoint for each, whatever was lost in between.
    assert {path.name for path in (tmp_path / "candidates").iterdir()} == {
        row["checkpoint"] for row in rows
    }
    storage = StorageConfig(kind="journal").open(tmp_path)
    study = optuna.load_study(study_name="search", storage=storage)
    complete = [
        (t.user_attrs["proposal"]["number"], t.user_attrs["claim"]["rung"])
        for t in study.trials
        if t.state.name == "COMPLETE"
    ]
    assert len(complete) == len(set(complete)) == 8 + len(climbed)
    assert not any(t.state.name == "RUNNING" for t in study.trials)


def test_an_audit_goes_on_after_a_kill_and_says_what_its_numbers_say(experiment, tmp_path, capsys):
    overrides = (
        *("proxy.rung_tokens=[160,320]", "evolution.promoted_share=0.4"),
        *("num_candidates=6", "evolution.initial_candidates=6"),
        *("audit.candidates=4", "audit.repeated=2", "audit.seeds=2"),
    )
    process = start(experiment, tmp_path, *overrides)
    for line in process.stdout:
        if line.startswith("audit 2/8"):
            break
    process.kill()
    process.communicate()
    candidates = read_json(tmp_path / "candidates.json")

    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    before = {key: fact for key, fact in study.user_attrs.items() if key.startswith("audit-")}
    summary = Search(compose_tiny(experiment, *overrides), tmp_path).run()
    output = capsys.readouterr().out
    assert f"audit: {8 - len(before)} trainings to 320 tokens" in output
    facts = {key: fact for key, fact in study.user_attrs.items() if key.startswith("audit-")}
    assert len(before) in (2, 3)
    assert len(facts) == 8
    assert {key: facts[key] for key in before} == before

    rows = read_json(tmp_path / "candidates.json")
    kept = ("number", "state", "rung", "score", "rungs", "checkpoint")
    assert [[r[k] for k in kept] for r in rows] == [[r[k] for k in kept] for r in candidates]
    assert {path.name for path in (tmp_path / "candidates").iterdir()} == {
        row["checkpoint"] for row in rows
    }
    drawn = [row for row in rows if row["origin"] == "random"]
    assert len(drawn) == 4
    long = [facts[f"audit-{row['number']}-0"]["loss"] for row in drawn]
    # Whoever climbed has been trained so far by the search, and by nothing else.
    climbed = [place for place, row in enumerate(drawn) if row["rung"] == 1]
    assert 0 < len([row for row in rows if row["rung"] == 1]) < 6
    for place in climbed:
        assert drawn[place]["score"] == long[place]

    assert read_json(tmp_path / "frontier.json")["audit"] == summary["audit"]
    (correlation,) = summary["audit"]["rank_correlations"]
    short = [row["rungs"][0]["loss"] for row in drawn]
    assert (correlation["short"], correlation["long"]) == (short, long)
    assert correlation["rho"] == pytest.approx(stats.spearmanr(short, long).statistic)
    for quality in ("loss", "cloze_error", "continuation_error"):
        scores = np.array(
            [
                [facts[f"audit-{row['number']}-{seed}"][quality] for seed in range(3)]
                for row in drawn[:2]
            ]
        )
        noise = summary["audit"]["noise"][quality]
        deviation = math.sqrt(scores.var(axis=1, ddof=1).mean())
        assert noise["deviation"] == pytest.approx(deviation)
        assert noise["least_difference"] == pytest.approx(
            math.sqrt(2) * stats.t.ppf(0.975, df=4) * deviation
        )
    chosen = next(row for row in rows if row["digest"] == summary["chosen"])
    least = summary["audit"]["noise"]["loss"]["least_difference"]
    for member in summary["members"]:
        expected = abs(member["loss"] - chosen["loss"]) > least
        assert member["is_different"] == (
            None if member["number"] == chosen["number"] else expected
        )
    assert "seed noise of the loss" in output
    assert f"rank correlation of 160 against 320 tokens {correlation['rho']:.2f}" in output


def test_devices_that_a_candidate_cannot_have_are_refused(experiment, monkeypatch):
    with pytest.raises(ConfigError, match=r"must divide proxy\.batch_size 4, got 3"):
        compose_tiny(experiment, "devices_per_candidate=3")
    monkeypatch.setattr(search_config, "device_names", lambda: ["0", "1", "2"])
    overrides = ("storage=journal", "workers=2")
    with pytest.raises(ConfigError, match="2 workers with 2 GPUs each need 4, 3 are visible"):
        compose_tiny(experiment, *overrides, "devices_per_candidate=2")
    compose_tiny(experiment, *overrides)


def test_sqlite_is_for_one_worker(experiment, tmp_path):
    output = finish(start(experiment, tmp_path / "run", "workers=2"), code=2)
    assert "error: workers: sqlite storage is for one, got 2; take storage=journal" in output
    assert not (tmp_path / "run").exists()
