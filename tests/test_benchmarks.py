"""Benchmarks end with one line of JSON that holds what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(root: Path, name: str, *arguments: str) -> dict[str, Any]:
    """What a benchmark's last line holds."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--threads", "1", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
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
