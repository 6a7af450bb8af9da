"""Sweeps as Slurm jobs: what is cancelled or killed is named, what is preempted goes on."""

import csv
import json
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.conftest import LAUNCHER, Start, page_command
from tests.cluster.slurm_cluster import SlurmCluster
from tests.pages import page_blocks
from tests.search.small_search import small_text

MAX_STEPS = 250
TIMEOUT_SECONDS = 120.0


def sweep(root: Path, folder: Path, name: str) -> list[str]:
    """The command of docs/slurm.md for a sweep of that name, with jobs that take some seconds."""
    command = page_command(root, f"name={name}")
    files = small_text(folder)["files"]
    return [
        *(str(root / "train.py"), *command[2:], "experiment=smoke"),
        *("data=text", f"data.files={files}", "tokenizer.vocab_size=300"),
        *(f"trainer.max_steps={MAX_STEPS}", "trainer.validate_every_steps=250"),
        *("trainer.checkpoint_every_steps=25", "trainer.samples=1", *LAUNCHER),
    ]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not in {TIMEOUT_SECONDS} s"
        time.sleep(0.2)


def steps(job: Path) -> list[int]:
    """Those that a job has logged."""
    path = job / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]


def has_saved(job: Path) -> bool:
    return (job / "checkpoints" / "last.ckpt").exists()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def slurm_ids(output: str) -> dict[int, str]:
    """Slurm's number of each job of a sweep."""
    found = re.findall(r"job (\d+) is Slurm's (\S+):", output)
    return {int(number): job_id for number, job_id in found}


def test_what_is_cancelled_or_killed_is_named_and_done_again(
    cluster: SlurmCluster, root: Path, start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "sizes"
    # Small ones.
    command = [word.replace("64,96,128", "32,64,96") for word in sweep(root, tmp_path, "sizes")]
    process = start(*command)
    assert process.stdout is not None
    said = ""
    while len(slurm_ids(said)) < 3:
        line = process.stdout.readline()
        assert line, said
        said += line
    ids = slurm_ids(said)
    for number in (0, 1, 2):
        wait_until(lambda number=number: has_saved(folder / str(number)), f"job {number} saves")
        if number == 1:
            cluster.run("scancel", ids[1])
        if number == 2:
            (task,) = cluster.processes(ids[2])
            task.send_signal(signal.SIGKILL)
    rest = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert process.returncode == 1, said + rest
    errors = [line for line in rest.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: 2 of 3 jobs failed; the same command does them again"
    ended = "Slurm has ended it"
    assert errors[1].startswith(f"error: job 1 (model.width=64): {ended}: CANCELLED; its output: ")
    assert errors[2].startswith(f"error: job 2 (model.width=96): {ended}: FAILED; its output: ")
    assert [row["status"] for row in table(folder)] == ["finished", "failed", "failed"]
    assert table(folder)[1]["error"] in errors[1]

    again = start(*command)
    output = again.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert again.returncode == 0, output
    assert [row["status"] for row in table(folder)] == ["finished"] * 3
    for number in range(3):
        job = folder / str(number)
        assert json.loads((job / "result.json").read_text())["steps"] == MAX_STEPS
        # Each once: nothing was lost, nothing done twice.
        assert steps(job) == list(range(1, MAX_STEPS + 1))


def test_what_is_preempted_or_out_of_time_goes_on_in_its_place(
    cluster: SlurmCluster, root: Path, start: Start, tmp_path: Path
) -> None:
    """One job of two processes, which Slurm starts both."""
    job = tmp_path / "runs" / "rates" / "0"
    command = [word.replace("1e-3,2e-3", "1e-3") for word in sweep(root, tmp_path, "rates")]
    assert "trainer.devices=2" in command
    process = start(*command, "model.width=32")
    wait_until(lambda: has_saved(job), "the job saves")
    (job_id,) = [each for each, state in cluster.jobs().items() if state == "RUNNING"]
    # As Slurm does by itself, `signal_delay_s` before the time is over.
    cluster.run("scancel", "--signal=USR2", job_id)
    wait_until(lambda: cluster.jobs()[job_id] == "PENDING", "the job is queued again")
    before = max(steps(job))
    wait_until(lambda: max(steps(job)) > before, "the job goes on")
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null"),
        "--wrap=sleep 1",
    ).strip()
    wait_until(lambda: cluster.jobs()[urgent] == "COMPLETED", "the urgent job runs")
    output = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert process.returncode == 0, output
    assert steps(job) == list(range(1, MAX_STEPS + 1))
    assert json.loads((job / "result.json").read_text())["steps"] == MAX_STEPS


def test_what_slurm_does_not_take_is_said_in_one_line(
    cluster: SlurmCluster, root: Path, start: Start, tmp_path: Path
) -> None:
    process = start(*sweep(root, tmp_path, "sizes"), "hydra.launcher.partition=nowhere")
    output = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    assert process.returncode == 2
    assert output.splitlines()[-1].startswith("error: hydra.launcher: sbatch: error: ")
    assert "invalid partition" in output.splitlines()[-1]


def test_the_job_with_all_gpus_of_a_node_asks_for_what_slurm_knows(
    cluster: SlurmCluster, root: Path
) -> None:
    (block,) = page_blocks(root / "docs" / "slurm.md", "bash")
    program, *options = shlex.split(block.replace("--partition=gpu", "--partition=main"))
    # Of what the node does not have.
    options = [each for each in options if not each.startswith(("--gres", "--cpus"))]
    cluster.run(program, "--test-only", *options)
