"""Memory that models take, and the largest batch that fits."""

import gc

import pytest
import torch

from latency.memory import PeakMemory, available_bytes
from latency.profile import profile
from latency.throughput import max_batch_size, throughput
from latency.workload import Workload
from slm.architecture import Architecture

MIB = 2**20
# A state of 2 · 4 bytes · 64 · 4096 tokens: two mebibytes per row and layer.
ARCHITECTURE = Architecture.parse("width=64 vocab_size=32 | attention(head_dim=32) attention")
WORKLOAD = Workload(prompt_tokens=8, new_tokens=4088)


def test_peak_is_of_what_was_in_use_at_one_time(device):
    gc.collect()
    memory = PeakMemory()
    with memory.measured(device):
        for _ in range(3):
            torch.ones(32 * MIB)  # 128 MiB, which goes back at once.
    assert memory.bytes is not None
    assert 120 * MIB < memory.bytes < 160 * MIB


def test_available_memory_is_less_when_some_is_in_use(device):
    before = available_bytes(device)
    # More than what runs beside the tests takes or gives back meanwhile.
    held = torch.ones(512 * MIB)  # 2 GiB
    assert available_bytes(device) < before - 800 * MIB
    del held


def test_the_largest_batch_fills_what_it_may(device):
    """Of rows of four mebibytes."""
    sizes = [
        max_batch_size(ARCHITECTURE, WORKLOAD, device, limit_bytes=limit * MIB)
        for limit in (200, 600)
    ]
    assert sizes[0] > 20
    # 400 MiB more are a hundred rows more, or less by what prefill takes.
    assert 60 <= sizes[1] - sizes[0] <= 110


def test_what_does_not_fit_is_said(device):
    with pytest.raises(MemoryError, match=r"a row takes .* there are 1,024"):
        max_batch_size(ARCHITECTURE, WORKLOAD, device, limit_bytes=1024)


def test_a_batch_that_does_not_fit_after_all_is_made_smaller(
    device, protocol, workload, architecture, monkeypatch
):
    """As of a CPU whose memory does not suffice: torch cannot allocate a tensor of 2⁵⁰ bytes."""
    tried = []

    def measure(architecture, workload, *arguments):
        tried.append(workload.batch_size)
        if len(tried) < 3:
            torch.empty(2**50)
        return profile(architecture, workload, *arguments)

    monkeypatch.setattr("latency.throughput.max_batch_size", lambda *_: 10)
    monkeypatch.setattr("latency.throughput.profile", measure)
    found = throughput(architecture, workload, device, protocol)
    assert tried == [10, 9, 8]
    assert found.workload.batch_size == 8


def test_throughput_is_of_the_largest_batch(device, protocol, workload, architecture, monkeypatch):
    monkeypatch.setattr("latency.throughput.max_batch_size", lambda *_: 3)
    said = []
    found = throughput(architecture, workload, device, protocol, progress=said.append)
    assert found.workload == Workload(batch_size=3, prompt_tokens=4, new_tokens=5)
    assert found.tokens_per_s[0] == pytest.approx(1000 * 3 * 5 / found.request_ms.median_ms)
    assert "batch of 3" in said[0]
