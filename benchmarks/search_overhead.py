"""What a search costs besides training and timing: per candidate, and as it grows.

A search whose candidates' scores are invented (benchmarks/cheap_search.py) runs as any search does,
on three rungs, worker process, storage on disk and files included. At each size, in trials, the
time of the last tenth of them is taken, or of the last hundred, if that is more, per candidate that
was added in it: promotions are part of what a candidate costs, and so is its share of the files,
which for a large search are written every few minutes. The starts of the two processes, from the
first line of Python to the first job done, are shared out over as many candidates as an hour's work
at half a minute each. At the last size the search is interrupted, and its study opened anew.

python benchmarks/search_overhead.py
python benchmarks/search_overhead.py --sizes 100 1000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from search.run import Search
    from search.worker import WorkerProcess

STORAGES = ("sqlite", "journal")
# Trials whose time is taken at each size: this share of them, or so many, if that is more.
WINDOW_SHARE, WINDOW = 0.1, 100
# What the start of the processes is shared out over.
CANDIDATES_PER_PROCESS = 120


def main() -> None:
    from search.worker import WorkerProcess

    # As `python -m search` does.
    early = WorkerProcess.start("search.evaluate")

    from latency.device import Device

    arguments = parse_arguments()
    process_ms = measure_start(early) / CANDIDATES_PER_PROCESS
    results = {}
    for storage in STORAGES:
        with tempfile.TemporaryDirectory() as folder:
            results[storage] = measure(Path(folder), storage, sorted(arguments.sizes), process_ms)
    print_results(results)
    environment = {
        **Device.current(threads=1, kind="cpu").describe(),
        "window": WINDOW,
        "window_share": WINDOW_SHARE,
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


def measure_start(early: WorkerProcess) -> float:
    """Milliseconds from the start of this process until its worker has done a first job."""
    from cheap_search import cheap_search

    with tempfile.TemporaryDirectory() as folder:
        search = cheap_search(Path(folder), CANDIDATES_PER_PROCESS, STORAGES[0], early=early)
        with search.searcher.resources:
            do_first_job(search)
            return 1000 * seconds_since_start()


def seconds_since_start() -> float:
    """Of this process, to the hundredth; as time of day it is known to the second only."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def do_first_job(search: Search) -> None:
    """Start the search's worker."""
    workload = search.searcher.config.workload
    search.searcher.run_job("measure", "width=32 vocab_size=16 | ffn", workload, 1.0)


def measure(folder: Path, storage: str, sizes: list[int], process_ms: float) -> dict[str, Any]:
    """Milliseconds per candidate around each size, and seconds to open the study at the last."""
    from cheap_search import cheap_search

    # Every candidate has a trial at least.
    search = cheap_search(folder, sizes[-1], storage)
    do_first_job(search)
    # After each trial: when, and how many candidates there were.
    done: list[tuple[float, int]] = []
    tell = search._on_done

    def on_done(number: int) -> None:
        tell(number)
        done.append((time.monotonic(), len(search.study.records)))
        if len(done) == sizes[-1]:
            raise KeyboardInterrupt

    search._on_done = on_done  # type: ignore[method-assign]
    search.progress.say = lambda text: None  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        search.run()
    found: dict[str, Any] = {"ms_per_candidate": {}, "process_ms": process_ms}
    for size in sizes:
        window = max(WINDOW, int(WINDOW_SHARE * size))
        (first_s, first), (last_s, last) = done[max(0, size - 1 - window)], done[size - 1]
        ms = 1000 * (last_s - first_s) / (last - first)
        found["ms_per_candidate"][str(size)] = ms + process_ms
    begin_s = time.monotonic()
    cheap_search(folder, sizes[-1], storage)
    found["resume_s"] = time.monotonic() - begin_s
    return found


def print_results(results: dict[str, Any]) -> None:
    table = Table(title="a search's own cost")
    for column in ("storage", "trials", "ms per candidate", "study opened in, s"):
        table.add_column(column, justify="right")
    for storage, found in results.items():
        for size, ms in found["ms_per_candidate"].items():
            table.add_row(storage, size, f"{ms:.1f}", f"{found['resume_s']:.2f}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
