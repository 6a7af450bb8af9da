"""Several processes that train one candidate together: torchrun inside the worker.

    the worker's process ── torchrun's agent, in a thread of it
                            ├── rank 0   python -m search.launch FOLDER
                            └── rank 1 …

The folder holds the job, and afterwards the result. The first rank sends its reports through a
socket in it; a rank that fails leaves its reason.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from search.worker import JobError, Report, describe, how_it_ended

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from search.evaluate import Evaluator

POLL_SECONDS = 0.2
# Of one report.
MAX_BYTES = 65536


def run_by_ranks(
    evaluator: Evaluator, method: str, arguments: dict[str, Any], num_ranks: int, report: Report
) -> dict[str, Any]:
    """What the first of so many ranks gets from a method of `evaluator` that all of them run.

    Raises JobError with the reason of the rank that failed first.
    """
    from pydantic import TypeAdapter
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        fields = TypeAdapter(type(evaluator)).dump_python(evaluator, mode="json")
        job = {"evaluator": fields, "method": method, "arguments": arguments}
        (folder / "job.json").write_text(json.dumps(job))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reports:
            reports.bind(str(folder / "reports"))
            reports.settimeout(POLL_SECONDS)
            ranks = _start(folder, num_ranks)
            while not ranks.done():
                with suppress(TimeoutError):
                    report(json.loads(reports.recv(MAX_BYTES)))
        try:
            ranks.result()
        except ChildFailedError as error:
            raise JobError(_reason(error, folder)) from None
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result


def _start(folder: Path, num_ranks: int) -> Future[None]:
    """Let torchrun's agent run the ranks, each `main` of this file; done when they have ended."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        # What fails once is the candidate's own affair.
        max_restarts=0,
    )
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            elastic_launch(config, sys.executable)("-m", "search.launch", str(folder))
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    # The reason of a failure is told by the candidate's record.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # A daemon, so that the process can end without it: the ranks then end by themselves. Outside
    # of the main thread the agent leaves the process's signal handlers alone.
    Thread(target=run, daemon=True).start()
    return outcome


def _reason(error: ChildFailedError, folder: Path) -> str:
    """Why the ranks failed: what went wrong in one, not that the others missed it."""
    told = {rank: _error_path(folder, rank) for rank in error.failures}
    told = {rank: path for rank, path in told.items() if path.exists()}
    silent = [rank for rank in error.failures if rank not in told]
    # The agent ends by SIGTERM who is left.
    died = [rank for rank in silent if error.failures[rank].exitcode != -signal.SIGTERM]
    if died or not told:
        rank = (died or silent)[0]
        return f"rank {rank} {how_it_ended(error.failures[rank].exitcode)}"
    return min(told.values(), key=lambda path: path.stat().st_mtime_ns).read_text()


def _error_path(folder: Path, rank: int) -> Path:
    return folder / f"error-{rank}"


def main() -> None:
    """One rank: do its part of the job in the folder named on the command line."""
    import torch
    import torch.distributed as dist
    from pydantic import TypeAdapter

    from search.evaluate import Evaluator

    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        job = json.loads((folder / "job.json").read_text())
        evaluator = TypeAdapter(Evaluator).validate_python(job["evaluator"])
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reports:
            reports.connect(str(folder / "reports"))

            def report(progress: dict[str, Any]) -> None:
                if rank == 0:
                    reports.send(json.dumps(progress).encode())

            result = getattr(evaluator, job["method"])(**job["arguments"], report=report)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
        dist.destroy_process_group()
    except Exception as error:  # whatever it is, it is the candidate's own affair
        _error_path(folder, rank).write_text(describe(error))
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process when the worker's is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
