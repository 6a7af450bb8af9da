"""Benchmarks end with one line of JSON that holds what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_kernels(root: Path) -> None:
    """With the alternatives that depend most on what transformers and fla look like."""
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/kernels.py", "--operators", "gated_delta_rule"),
            *("--seconds", "0.1", "--threads", "1"),
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["benchmark"] == "kernels"
    (row,) = report["results"].values()
    assert row["ratio"] > 0
    assert row["ours_peak_mib"] > 0
    assert row["other"].startswith(("fla, chunks of", "transformers, chunks of"))
