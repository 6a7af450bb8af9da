"""Candidates that several processes train together; here on a CPU, through gloo."""

import os
import signal
from dataclasses import replace

import psutil
import pytest
import torch
from small_search import small_text

from latency.timer import Protocol
from search.devices import visible_devices
from search.evaluate import Evaluator
from search.proxy import ProxyConfig, read_weights
from search.task import TaskConfig
from search.worker import JobError, Worker
from slm.config import read
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.runtime import Runtime
from slm.training.config import OptimizerConfig

ARCHITECTURE = (
    "width=16 vocab_size=300 | attention(head_dim=8) ffn(ratio=2.0) mamba2(head_dim=8,state_size=8)"
)
PROXY = ProxyConfig(
    rung_tokens=(128, 320),
    batch_size=4,
    sequence_tokens=8,
    validation_tokens=128,
    time_limit_s=60.0,
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
    precision="float32",
)
LONG = replace(PROXY, rung_tokens=(10**9,))


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory) -> Evaluator:
    folder = tmp_path_factory.mktemp("corpus")
    data = read(DataConfig, {"source": "text", **small_text(folder)}, "data")
    corpus: PackedCorpus = prepare(data, TokenizerConfig(name="bpe", vocab_size=300))
    return Evaluator(
        runtime=Runtime.current(),
        corpus_folder=corpus.folder,
        protocol=Protocol(),
        proxy=PROXY,
        latency_threads=1,
        training_threads=1,
        candidates_folder=folder,
        cache_dir=folder,
        seed=0,
        quality="cloze_error",
        accuracy_items=20,
        task=TaskConfig(),
        devices_per_candidate=2,
    )


def test_two_ranks_train_as_one_process_does(evaluator):
    """From where one process has left it."""
    alone = replace(evaluator, devices_per_candidate=1)
    reports = []
    alone.train(ARCHITECTURE, 128, None, None, "0.safetensors", report=print)
    one = alone.train(ARCHITECTURE, 320, "0.safetensors", None, "1.safetensors", report=print)
    two = evaluator.train(
        ARCHITECTURE, 320, "0.safetensors", None, "2.safetensors", report=reports.append
    )
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["cloze_error"] == one["cloze_error"]
    assert two["cloze_error_items"] == 20
    assert two["tokens"] == one["tokens"] == 320
    assert two["loss_curve"] == [
        [tokens, pytest.approx(loss, rel=1e-5)] for tokens, loss in one["loss_curve"]
    ]
    first, second = (read_weights(evaluator.candidates_folder / f"{n}.safetensors") for n in (1, 2))
    for name, x in first.items():
        torch.testing.assert_close(second[name], x, rtol=1e-3, atol=1e-5)
    assert [each["share"] for each in reports] == [1.0]


def test_an_audit_by_two_ranks_finds_what_one_process_does(evaluator):
    """In a worker, which has made the questions already."""
    evaluator = replace(evaluator, quality="loss")
    alone = replace(evaluator, devices_per_candidate=1)
    arguments = (ARCHITECTURE, (128, 320), None, 1, ("loss", "cloze_error"))
    one = alone.audit(*arguments, report=print)
    first = alone.audit(ARCHITECTURE, (128,), None, 1, (), report=print)
    worker = Worker(evaluator)
    try:
        checkpoint = "questioned.safetensors"
        worker.run("train", ARCHITECTURE, 128, None, None, checkpoint, time_limit_s=100)
        worker.run("question", {ARCHITECTURE: checkpoint}, time_limit_s=100)
        two = worker.run("audit", *arguments, time_limit_s=100)
    finally:
        worker.close()
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-5)
    assert one["scores"] == [first["loss"], one["loss"]]
    assert two["cloze_error"] == one["cloze_error"]


def test_a_candidate_fails_with_the_reason_of_the_rank_that_failed(evaluator):
    with pytest.raises(JobError, match=r"^ValueError: .*nonsense"):
        evaluator.train("width=16 vocab_size=300 | nonsense", 320, None, None, "x", report=print)


def ranks_of(pid: int) -> list[psutil.Process]:
    """The two ranks that a worker's process has started."""
    found = [p for p in psutil.Process(pid).children() if "search.launch" in p.cmdline()]
    assert len(found) == 2
    return found


def test_a_rank_that_is_killed_costs_one_candidate(evaluator):
    worker = Worker(replace(evaluator, proxy=LONG))
    killed = []

    def kill(progress):
        if not killed:
            killed.append(ranks_of(worker.pid)[1])
            killed[0].kill()

    arguments = (ARCHITECTURE, 10**9, None, None, "killed.safetensors")
    with pytest.raises(JobError, match=r"^rank \d was ended by SIGKILL, perhaps for want of mem"):
        worker.run("train", *arguments, time_limit_s=100, on_report=kill)
    assert not (evaluator.candidates_folder / "killed.safetensors").exists()


def test_ranks_end_when_their_worker_is_killed(evaluator):
    worker = Worker(replace(evaluator, proxy=LONG))
    ranks = []

    def remember(progress):
        ranks.extend(ranks_of(worker.pid))
        os.kill(worker.pid, signal.SIGKILL)

    arguments = (ARCHITECTURE, 10**9, None, None, "x.safetensors")
    with pytest.raises(JobError, match="SIGKILL"):
        worker.run("train", *arguments, time_limit_s=100, on_report=remember)
    assert len(ranks) == 2
    assert psutil.wait_procs(ranks, timeout=20)[1] == []


def test_workers_take_as_many_visible_devices_as_a_candidate_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,6,GPU-7")
    assert [visible_devices(index, 2) for index in (0, 1)] == ["3,5", "6,GPU-7"]
    assert [visible_devices(index) for index in range(5)] == ["3", "5", "6", "GPU-7", "3"]
