import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from search.worker import JobError, Worker, WorkerProcess

LIMIT_S = 30.0


@dataclass(frozen=True)
class Target:
    """Jobs that go well and jobs that go wrong."""

    factor: int

    def multiply(self, number, report):
        report({"number": number})
        return os.getpid(), self.factor * number

    def variable(self, name, report):
        return os.environ.get(name)

    def has_imported(self, module, report):
        return module in sys.modules

    def crash(self, report):
        os._exit(3)

    def run_out_of_memory(self, report):
        # What the kernel does to a process that takes too much.
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, report):
        while True:
            report({})
            time.sleep(0.01)

    def fail(self, report):
        raise ValueError("the loss is\nnot finite")


@pytest.fixture
def worker():
    worker = Worker(Target(factor=3))
    yield worker
    worker.close()


def test_the_process_is_reused_and_reports(worker):
    reports = []
    first = worker.run("multiply", 5, time_limit_s=LIMIT_S, on_report=reports.append)
    second = worker.run("multiply", 6, time_limit_s=LIMIT_S)
    assert (first[1], second[1]) == (15, 18)
    assert first[0] == second[0] != os.getpid()
    assert reports == [{"number": 5}]


def test_a_process_that_was_started_early_is_the_first(monkeypatch):
    early = WorkerProcess.start("colorsys")
    # After it was started.
    monkeypatch.setenv("SLM_OF_THE_SEARCH", "yes")
    worker = Worker(Target(factor=3), visible_devices="5", early=early)
    try:
        assert worker.run("multiply", 1, time_limit_s=LIMIT_S) == (early.process.pid, 3)
        assert worker.run("has_imported", "colorsys", time_limit_s=LIMIT_S)
        assert worker.run("variable", "SLM_OF_THE_SEARCH", time_limit_s=LIMIT_S) == "yes"
        assert worker.run("variable", "CUDA_VISIBLE_DEVICES", time_limit_s=LIMIT_S) == "5"
        with pytest.raises(JobError):
            worker.run("crash", time_limit_s=LIMIT_S)
        assert worker.run("multiply", 1, time_limit_s=LIMIT_S)[0] != early.process.pid
        assert worker.run("variable", "CUDA_VISIBLE_DEVICES", time_limit_s=LIMIT_S) == "5"
    finally:
        worker.close()


def test_a_process_that_was_started_early_and_not_needed_ends():
    early = WorkerProcess.start()
    Worker(Target(factor=3), early=early).close()
    assert early.process.exitcode == 0


def test_an_early_process_that_died_costs_one_job():
    early = WorkerProcess.start()
    early.process.kill()
    worker = Worker(Target(factor=3), early=early)
    with pytest.raises(JobError, match="ended by SIGKILL"):
        worker.run("multiply", 1, time_limit_s=LIMIT_S)
    assert worker.run("multiply", 1, time_limit_s=LIMIT_S)[1] == 3
    worker.close()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("crash", "exited with code 3"),
        ("run_out_of_memory", "ended by SIGKILL, perhaps for want of memory"),
        ("fail", "ValueError: the loss is"),
    ],
)
def test_a_fault_costs_one_job(worker, method, reason):
    with pytest.raises(JobError, match=reason):
        worker.run(method, time_limit_s=LIMIT_S)
    assert worker.pid is None
    assert worker.run("multiply", 1, time_limit_s=LIMIT_S)[1] == 3


def test_a_job_that_hangs_is_ended_though_it_reports(worker):
    pid = worker.run("multiply", 1, time_limit_s=LIMIT_S)[0]
    with pytest.raises(JobError, match="longer than its time limit"):
        worker.run("hang", time_limit_s=0.3)
    assert not psutil.pid_exists(pid)


def test_the_process_ends_when_its_parent_is_killed(tmp_path):
    code = (
        "from test_worker import Target; from search.worker import Worker\n"
        "def main():\n"
        "    worker = Worker(Target(1))\n"
        "    print(worker.run('multiply', 1, time_limit_s=30)[0], flush=True)\n"
        "    worker.run('hang', time_limit_s=30)\n"
        "if __name__ == '__main__': main()\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=10)


def test_an_interrupt_while_the_process_starts_leaves_no_traceback(tmp_path):
    """What a process imports before it can ignore Ctrl-C takes seconds."""
    started = tmp_path / "started"
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(2)\n"
        "class Target:\n"
        "    def job(self, report): pass\n"
    )
    (tmp_path / "parent.py").write_text(
        "from search.worker import Worker\n"
        "def main():\n"
        "    from slow import Target\n"
        "    worker = Worker(Target())\n"
        f"    import os; os.remove({str(started)!r})\n"
        "    try:\n"
        "        worker.run('job', time_limit_s=30)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
        "if __name__ == '__main__': main()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # Once for the parent, which removes it, and once for the process.
    for is_there in (True, False, True):
        while started.exists() != is_there:
            assert parent.poll() is None
            time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=30)
    assert (parent.returncode, out, err) == (0, "interrupted\n", "")
