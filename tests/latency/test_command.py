import json

import pytest
from programs import run_program

from latency.reference import ReferenceTimes

TINY = ["model.width=32", "vocab_size=64", "workload.prompt_tokens=4", "workload.new_tokens=4"]
QUICK = [
    *("protocol.max_seconds=0.001", "protocol.warmup_rounds=1", "protocol.max_rounds=6"),
    *("protocol.max_repeats=0", "protocol.compile_unit=eager"),
]


def run(folder, *overrides):
    # A lock of its own: the command does not wait for what else runs on this machine.
    environment = {"TMPDIR": str(folder), "COLUMNS": "120"}
    arguments = ["-m", "latency", "device=cpu", *TINY, *QUICK, *overrides]
    return run_program(*arguments, folder=folder, environment=environment)


def test_it_prints_and_writes_what_it_measured(tmp_path):
    done = run(tmp_path, "breakdown=true", "name=tried")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs/tried/latency.json").read_text())
    assert record["architecture"].startswith("width=32 vocab_size=64 ")
    assert record["workload"]["new_tokens"] == 4
    request, predicted = record["request_ms"], record["predicted"]
    assert request["low_ms"] <= request["median_ms"] <= request["high_ms"]
    parts = sum(part["count"] * part["median_ms"] for part in record["breakdown"])
    assert abs(parts - predicted["request_ms"]) < 1e-9
    # The table's rows at the speed that the machine had for the whole model.
    (path,) = (tmp_path / "cache/latency").glob("*/b1-*.json")
    table = json.loads(path.read_text())
    times = ReferenceTimes.from_dict(table["reference_times"])
    speed = record["request_per_reference"] * times.at(record["footprint_bytes"])
    rows = {name: row["median_ms"] for name, row in table["rows"]["32"].items()}
    base_ms = rows["base, prompt 4"] + 2 * rows["base, context 64"]
    assert record["breakdown"][0]["name"] == "base"
    expected_ms = base_ms * request["median_ms"] / speed
    assert record["breakdown"][0]["median_ms"] == pytest.approx(expected_ms)
    assert f"{request['median_ms']:.3f}" in done.stdout
    assert "time per output token" in done.stdout
    assert list((tmp_path / "cache/latency").rglob("*.json"))


def test_all_mistakes_are_named_and_nothing_is_written(tmp_path):
    done = run(tmp_path, "workload.batch_size=0", "model.width=33", "protocol.num_contexts=0")
    assert done.returncode == 2
    assert "error: workload.batch_size: must be >= 1, got 0" in done.stderr
    assert "error: protocol.num_contexts: must be >= 1, got 0" in done.stderr
    assert "head_dim: must divide the width 33" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run(tmp_path, "protocol.compile_unit=step")
    assert done.returncode == 2
    assert "error: protocol.compile_unit: 'step' needs a C++ compiler" in done.stderr
    assert "no 'no-such-compiler'" in done.stderr
    assert list(tmp_path.iterdir()) == []
