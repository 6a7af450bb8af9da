"""What a search costs besides training and timing: per candidate, and as it grows.

A search whose candidates' scores are invented (benchmarks/cheap_search.py) runs as any search does,
on three rungs, worker process, storage on disk and files included. At each size the time of the
last hundred candidates is taken, promotions included; the starts of the two processes are shared
out over as many candidates as an hour's work at half a minute each. Then the study is opened anew.

python benchmarks/search_overhead.py
python benchmarks/search_overhead.py --sizes 100 1000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from cheap_search import cheap_search
from rich.console import Console
from rich.table import Table

from latency.device import Device

STORAGES = ("sqlite", "journal")
# Candidates whose time is taken at each size.
WINDOW = 100
# What the start of a process is shared out over.
CANDIDATES_PER_PROCESS = 120


def main() -> None:
    arguments = parse_arguments()
    results = {}
    for storage in STORAGES:
        with tempfile.TemporaryDirectory() as folder:
            results[storage] = measure(Path(folder), storage, sorted(arguments.sizes))
    print_results(results)
    environment = {
        **Device.current(threads=1, kind="cpu").describe(),
        "window": WINDOW,
        "candidates_per_process": CANDIDATES_PER_PROCESS,
    }
    line = {"benchmark": "search_overhead", "results": results, "environment": environment}
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--threads", type=int, default=1, help="only 1")
    return parser.parse_args()


def measure(folder: Path, storage: str, sizes: list[int]) -> dict[str, Any]:
    """Milliseconds per candidate around each size, and seconds to open the study at the last."""
    begin_s = time.monotonic()
    search = cheap_search(folder, sizes[-1], storage)
    search.searcher.run_job("measure", "width=32 vocab_size=16 | ffn", 1.0)
    process_ms = 1000 * (time.monotonic() - begin_s) / CANDIDATES_PER_PROCESS
    done_s: dict[int, float] = {}
    tell = search._on_done

    def on_done(number: int) -> None:
        tell(number)
        done_s.setdefault(len(search.study.records), time.monotonic())

    search._on_done = on_done  # type: ignore[method-assign]
    search.progress.say = lambda text: None  # type: ignore[method-assign]
    search.run()
    found: dict[str, Any] = {"ms_per_candidate": {}, "process_ms": process_ms}
    for size in sizes:
        first, last = max(1, size - WINDOW), size
        ms = 1000 * (done_s[last] - done_s[first]) / (last - first)
        found["ms_per_candidate"][str(size)] = ms + process_ms
    begin_s = time.monotonic()
    cheap_search(folder, sizes[-1], storage)
    found["resume_s"] = time.monotonic() - begin_s
    return found


def print_results(results: dict[str, Any]) -> None:
    table = Table(title="a search's own cost")
    for column in ("storage", "candidates", "ms per candidate", "study opened in, s"):
        table.add_column(column, justify="right")
    for storage, found in results.items():
        for size, ms in found["ms_per_candidate"].items():
            table.add_row(storage, size, f"{ms:.1f}", f"{found['resume_s']:.2f}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
