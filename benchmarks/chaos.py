"""Kills and freezes the workers of a search at random moments, and counts what came to harm.

Several processes work on one study of cheap candidates (benchmarks/cheap_search.py), each as if
started by hand. At random moments one is ended by SIGKILL and started again; or it is stopped by
SIGSTOP until its lease is over and others have taken up its candidate, and woken by SIGCONT. A
PostgreSQL server, one of its own, can be stopped or crash as well, and be gone for a while. In the
end the storage is read by plain Optuna:

lost: candidates that have no score. doubled: scores beyond the first for a candidate and rung.
late_writes_accepted: trials that were taken from a stopped process and that it changed after all.

python benchmarks/chaos.py
python benchmarks/chaos.py --kills 10 --stops 2 --candidates 150
python benchmarks/chaos.py --storage postgresql --restarts 10
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import optuna
from cheap_search import STORAGES
from optuna.trial import FrozenTrial, TrialState
from postgresql_server import STOPS, PostgreSQLServer
from rich.console import Console

from latency.device import Device
from search.storage import StorageConfig
from slm.config import EXIT_BAD_CONFIG

LEASE_SECONDS = 2.0
TRAINING_SECONDS = 0.2
# Between two blows.
MEAN_PAUSE_SECONDS = 1.5
# For a process to take up a candidate.
SECONDS_BETWEEN_LOOKS = 0.2
# That a server is gone: leases run out meanwhile, or not.
MAX_SECONDS_DOWN = 2 * LEASE_SECONDS
# For a search to go on to its end, once it is left in peace.
MAX_SECONDS_TO_FINISH = 1800.0

console = Console(stderr=True)


class Workers:
    """Processes that work on one study; those that end are started again unless all is done."""

    def __init__(self, folder: Path, count: int, candidates: int, storage: StorageConfig) -> None:
        self.folder = folder
        self.command = [
            *(sys.executable, str(Path(__file__).parent / "cheap_search.py"), str(folder)),
            f"storage.lease_seconds={LEASE_SECONDS}",
            *([] if storage.url is None else [f"storage.url={storage.url}"]),
            *("--candidates", str(candidates), "--storage", storage.kind),
            *("--seconds", str(TRAINING_SECONDS)),
        ]
        self.processes: list[subprocess.Popen[bytes]] = []
        # Of those that ended because they found no server when they began.
        self.num_revived = 0
        for _ in range(count):
            self.start()

    def start(self) -> None:
        """One more."""
        with (self.folder / "log").open("ab") as log:
            self.processes.append(subprocess.Popen(self.command, stdout=log, stderr=log))

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End one for good, and start another."""
        process.kill()
        process.wait()
        self.processes.remove(process)
        self.start()

    def check(self) -> bool:
        """Whether all have come to the end; those that began without a server begin again."""
        for process in [process for process in self.processes if process.poll()]:
            if process.returncode != EXIT_BAD_CONFIG:
                log = (self.folder / "log").read_text()
                raise SystemExit(f"a worker died by itself: {log[-5000:]}")
            self.processes.remove(process)
            self.start()
            self.num_revived += 1
        return all(process.poll() == 0 for process in self.processes)

    def wait(self) -> None:
        """Until all have come to the end of the search."""
        deadline = time.monotonic() + MAX_SECONDS_TO_FINISH
        while not self.check():
            if time.monotonic() > deadline:
                raise SystemExit("the search has not come to its end")
            time.sleep(0.5)


def main() -> None:
    arguments = parse_arguments()
    rng = random.Random(arguments.seed)
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        if arguments.storage == "postgresql":
            server = resources.enter_context(PostgreSQLServer())
            os.environ |= server.environment("postgres")
            storage = StorageConfig(kind="postgresql", url="postgresql+psycopg://")
        else:
            storage = StorageConfig(kind=arguments.storage)
        workers = Workers(folder, arguments.workers, arguments.candidates, storage)
        wait_for_study(workers, folder, storage)
        blows = ["kill"] * arguments.kills + ["stop"] * arguments.stops
        blows += ["restart"] * arguments.restarts
        rng.shuffle(blows)
        taken: set[int] = set()
        for number, blow in enumerate(blows, start=1):
            time.sleep(rng.expovariate(1 / MEAN_PAUSE_SECONDS))
            workers.check()
            process = rng.choice(workers.processes)
            if process.poll() == 0:
                raise SystemExit("the search came to its end too early: more --candidates")
            if blow == "kill":
                workers.kill(process)
            elif blow == "stop":
                taken |= stop(process, folder, storage)
            else:
                server.stop(rng.choice(STOPS))
                time.sleep(rng.uniform(0.0, MAX_SECONDS_DOWN))
                server.start()
            console.print(f"{number}/{len(blows)} {blow}")
        workers.wait()
        trials = read_trials(folder, storage)
    numbers = {trial.user_attrs["proposal"]["number"] for trial in trials}
    scores = Counter(
        (trial.user_attrs["proposal"]["number"], trial.user_attrs["claim"]["rung"])
        for trial in trials
        if trial.state == TrialState.COMPLETE
    )
    lost = numbers - infeasible(trials) - {number for number, _ in scores}
    for trial in trials:
        if trial.user_attrs["proposal"]["number"] in lost:
            console.print(trial.number, trial.state.name, trial.user_attrs)
    results = {
        "kills": arguments.kills,
        "stops": arguments.stops,
        "lost": len(lost),
        "doubled": sum(count - 1 for count in scores.values()),
        "late_writes_accepted": sum(
            trial.state != TrialState.FAIL for trial in trials if trial.number in taken
        ),
    }
    environment = {
        **Device.current(threads=1, kind="cpu").describe(),
        "storage": arguments.storage,
        "restarts": arguments.restarts,
        "workers_that_began_without_server": workers.num_revived,
        "workers": arguments.workers,
        "candidates": len(numbers),
        "trials": len(trials),
        "trials_taken_from_stopped_processes": len(taken),
        "seed": arguments.seed,
    }
    print(json.dumps({"benchmark": "chaos", "results": results, "environment": environment}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=1500)
    parser.add_argument("--storage", default="journal", choices=STORAGES)
    parser.add_argument("--restarts", type=int, default=0, help="of a PostgreSQL server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="only 1")
    arguments = parser.parse_args()
    if arguments.restarts and arguments.storage != "postgresql":
        parser.error("--restarts needs --storage postgresql")
    return arguments


def wait_for_study(workers: Workers, folder: Path, storage: StorageConfig) -> None:
    """Until the first candidate is scored."""
    while True:
        if all(process.poll() is not None for process in workers.processes):
            raise SystemExit(f"no worker lives: {(folder / 'log').read_text()}")
        try:
            if any(t.state == TrialState.COMPLETE for t in read_trials(folder, storage)):
                return
        except KeyError:
            # There is no study yet.
            pass
        time.sleep(0.5)


@functools.cache
def connect(folder: Path, storage: StorageConfig) -> optuna.storages.BaseStorage:
    """The storage, opened once: every time would be a connection more."""
    return storage.open(folder)


def read_trials(folder: Path, storage: StorageConfig) -> list[FrozenTrial]:
    """All trials but those that were dropped before they ran."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name="search", storage=connect(folder, storage))
    return [trial for trial in study.trials if "dropped" not in trial.user_attrs]


def stop(process: subprocess.Popen[bytes], folder: Path, storage: StorageConfig) -> set[int]:
    """Stop a process past its lease; the trials that were taken from it meanwhile.

    It is stopped when it has a candidate: one that just begins, or is between two, loses nothing.
    """
    owned: set[int] = set()
    while not owned and process.poll() is None:
        process.send_signal(signal.SIGCONT)
        time.sleep(SECONDS_BETWEEN_LOOKS)
        process.send_signal(signal.SIGSTOP)
        owned = {
            trial.number
            for trial in read_trials(folder, storage)
            if trial.state == TrialState.RUNNING
            and trial.user_attrs["claim"]["owner"]["pid"] == process.pid
        }
    time.sleep(2 * LEASE_SECONDS)
    lost = {
        trial.number
        for trial in read_trials(folder, storage)
        if trial.number in owned and trial.state == TrialState.FAIL
    }
    process.send_signal(signal.SIGCONT)
    return lost


def infeasible(trials: list[FrozenTrial]) -> set[int]:
    """Candidates that are too slow at any width."""
    return {t.user_attrs["proposal"]["number"] for t in trials if t.state == TrialState.PRUNED}


if __name__ == "__main__":
    main()
