"""Many workers on one study in PostgreSQL: does the database keep up, and is anything lost?

Each worker is a process that claims candidates, records them and proposes new ones as a search's
own do; training is a wait of so many seconds, in which the lease is renewed. The server is one of
its own, on this machine, which the workers share with it. At random moments a worker is ended by
SIGKILL, and another takes its place. In the end the storage is read by plain Optuna.

claims_per_s: claims between the first one and that of the last new candidate, after which there is
not work for all; without the first ones of the workers; at most workers / seconds. storage_share:
of the workers' time, what passed in calls of the storage. duplicates: scores beyond the first for a
candidate and rung. lost: candidates without a score. Not lost but given up, which the environment
counts, is who was at work in three workers that were killed: the study takes it for the cause.

python benchmarks/many_workers.py                                four minutes
python benchmarks/many_workers.py --workers 8 --seconds 1 --candidates 100
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from chaos import infeasible, read_trials
from cheap_evaluator import CheapEvaluator
from cheap_search import CheapSearcher, config
from optuna.trial import FrozenTrial, TrialState
from postgresql_server import PostgreSQLServer
from rich.console import Console

from latency.device import Device
from latency.lock import device_lock
from search.searcher import Searcher
from search.storage import StorageConfig
from search.study import MAX_ATTEMPTS

URL = "postgresql+psycopg://"
POLL_SECONDS = 0.2
# Beyond what the trainings take, for the search to come to its end.
PATIENCE_SECONDS = 300.0

console = Console(stderr=True)


class WaitingWorker:
    """Invents scores in this process, and lets the time of a training pass."""

    def __init__(self, evaluator: CheapEvaluator, seconds: float) -> None:
        self._evaluator = evaluator
        self._seconds = seconds

    def run(
        self,
        method: str,
        *arguments: Any,
        time_limit_s: float,
        on_report: Callable[..., None] | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Any:
        """Do what `search.worker.Worker.run` does."""
        deadline = time.monotonic() + (self._seconds if method == "train" else 0.0)
        while time.monotonic() < deadline:
            on_wait()
            time.sleep(POLL_SECONDS)
        return getattr(self._evaluator, method)(*arguments, report=lambda _: None)


class WaitingSearcher(CheapSearcher):
    """A searcher without a process of its own, of which there would be twice as many."""

    @cached_property
    def worker(self) -> Any:
        """What invents scores."""
        return WaitingWorker(CheapEvaluator(self.candidates_folder, 0.0), self.seconds)


class Timed:
    """A storage, and the time that passes in its calls."""

    def __init__(self, storage: Any) -> None:
        self._inner = storage
        self.seconds = 0.0

    @contextmanager
    def turn(self, study_id: int) -> Iterator[bool]:
        """Of a turn, the time of waiting for it."""
        with ExitStack() as stack:
            begin_s = time.monotonic()
            waited = stack.enter_context(self._inner.turn(study_id))
            self.seconds += time.monotonic() - begin_s
            yield waited

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            begin_s = time.monotonic()
            try:
                return found(*arguments, **options)
            finally:
                self.seconds += time.monotonic() - begin_s

        return call


class Workers:
    """Processes that work on one study; as a context they are gone when the block ends."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self._folder = folder
        self._arguments = arguments
        # What is imported is shared, and paid for once.
        self._context = multiprocessing.get_context("fork")
        self.processes: list[BaseProcess] = []
        self._num_started = 0

    def start(self) -> None:
        """One more."""
        report = self._folder / f"worker-{self._num_started}.json"
        process = self._context.Process(
            target=work, args=(self._folder, report, self._arguments), daemon=True
        )
        process.start()
        self._num_started += 1
        self.processes.append(process)

    def kill(self, process: BaseProcess) -> None:
        """End one for good, and start another."""
        process.kill()
        process.join()
        self.processes.remove(process)
        self.start()

    def is_done(self) -> bool:
        """Whether all have come to the end of the search."""
        if any(process.exitcode for process in self.processes):
            raise SystemExit("a worker died by itself")
        return all(process.exitcode == 0 for process in self.processes)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rng = random.Random(arguments.seed)
    with ExitStack() as resources:
        resources.enter_context(device_lock(name="cpu"))
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        server = resources.enter_context(PostgreSQLServer())
        os.environ |= server.environment("postgres")
        workers = resources.enter_context(Workers(folder, arguments))
        for _ in range(arguments.workers):
            workers.start()
        run_to_end(workers, rng, arguments)
        trials = read_trials(folder, StorageConfig(kind="postgresql", url=URL))
        reports = [json.loads(path.read_text()) for path in folder.glob("worker-*.json")]
    results, numbers = summarize(trials, reports, arguments.workers)
    environment = {
        **Device.current(threads=1, kind="cpu").describe(),
        "workers": arguments.workers,
        "seconds_per_training": arguments.seconds,
        "possible_claims_per_s": arguments.workers / arguments.seconds,
        "kills": arguments.kills,
        **numbers,
        "seed": arguments.seed,
    }
    console.print_json(data=results)
    print(json.dumps({"benchmark": "many_workers", "results": results, "environment": environment}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="that each training takes")
    parser.add_argument("--candidates", type=int, default=400)
    parser.add_argument("--kills", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="only 1")
    return parser.parse_args()


def work(folder: Path, report: Path, arguments: argparse.Namespace) -> None:
    """One worker, until the search is over."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    CheapSearcher.seconds = arguments.seconds
    settings = config(arguments.candidates, "postgresql", f"storage.url={URL}")
    searcher = WaitingSearcher(settings, folder, say=lambda _: None)
    timed = time_storage(searcher)
    begin_s = time.monotonic()
    with searcher.resources:
        searcher.prepare()
        searcher.run(on_done=lambda _: None)
    seconds = time.monotonic() - begin_s
    report.write_text(json.dumps({"seconds": seconds, "storage_seconds": timed()}))


def end_with_parent() -> None:
    """End this process when the benchmark is gone, however it ended."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def time_storage(searcher: Searcher) -> Callable[[], float]:
    """Time the calls of a searcher's storage; tells the seconds so far."""
    study = searcher.study
    facts, trials = Timed(study._study._storage), Timed(study.storage)
    study._study._storage = facts  # type: ignore[assignment]
    study.storage = study.clock = trials  # type: ignore[assignment]
    return lambda: facts.seconds + trials.seconds


def run_to_end(workers: Workers, rng: random.Random, arguments: argparse.Namespace) -> None:
    """Until all workers are done; meanwhile some of them are killed."""
    # About what the first rungs take.
    seconds = arguments.seconds * (1 + arguments.candidates / arguments.workers)
    begin_s = time.monotonic()
    kills = sorted(rng.uniform(arguments.seconds / 2, seconds) for _ in range(arguments.kills))
    while not workers.is_done():
        elapsed_s = time.monotonic() - begin_s
        if kills and elapsed_s > kills[0]:
            kills.pop(0)
            at_work = [process for process in workers.processes if process.is_alive()]
            if len(at_work) < arguments.workers:
                raise SystemExit("the search came to its end too early: more --candidates")
            workers.kill(rng.choice(at_work))
            console.print(f"{elapsed_s:.0f} s: a worker is killed, {len(kills)} more will be")
        if elapsed_s > 4 * seconds + PATIENCE_SECONDS:
            raise SystemExit("the search has not come to its end")
        time.sleep(POLL_SECONDS)


def summarize(
    trials: list[FrozenTrial], reports: list[dict[str, float]], num_workers: int
) -> tuple[dict[str, float], dict[str, int]]:
    """The figures asked for, and counts that belong to them."""
    numbers = {number_of(trial) for trial in trials}
    scores = Counter(place_of(trial) for trial in trials if trial.state == TrialState.COMPLETE)
    deaths = Counter(
        place_of(trial)
        for trial in trials
        if trial.state == TrialState.FAIL and "released" not in trial.user_attrs
    )
    given_up = {
        place[0] for place, count in deaths.items() if count >= MAX_ATTEMPTS and place not in scores
    }
    scored = {number for number, _ in scores}
    # Of candidate and rung, each claim; after the last new candidate there is not work for all.
    starts = sorted(
        (trial.datetime_start.timestamp(), place_of(trial)[1])
        for trial in trials
        if trial.datetime_start is not None
    )
    first_s, last_s = starts[0][0], max(start_s for start_s, rung in starts if rung == 0)
    num_claims = sum(start_s <= last_s for start_s, _ in starts)
    results = {
        "claims_per_s": (num_claims - num_workers) / (last_s - first_s),
        "storage_share": sum(each["storage_seconds"] for each in reports)
        / sum(each["seconds"] for each in reports),
        "duplicates": sum(count - 1 for count in scores.values()),
        "lost": len(numbers - infeasible(trials) - scored - given_up),
    }
    counts = {"candidates": len(numbers), "trials": len(trials), "given_up": len(given_up)}
    return results, counts


def number_of(trial: FrozenTrial) -> int:
    number: int = trial.user_attrs["proposal"]["number"]
    return number


def place_of(trial: FrozenTrial) -> tuple[int, int]:
    """Candidate and rung."""
    return number_of(trial), trial.user_attrs["claim"]["rung"]


if __name__ == "__main__":
    main()
