"""The clock and the monitor of a real GPU."""

import json

import pytest
import torch

from latency.clock import CudaClock, clock_of
from latency.device import Device
from latency.gpu_monitor import SLOWDOWNS
from latency.timer import Protocol, measure_interleaved

pytestmark = pytest.mark.gpu

SIZE = 8192


@pytest.fixture
def device(tmp_path, monkeypatch) -> Device:
    """This GPU, under a lock that nobody else waits for."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Device.current(kind="cuda")


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)


def test_a_sample_is_the_time_on_the_gpu_not_of_the_launch(device, matrix):
    clock = clock_of(device)
    assert isinstance(clock, CudaClock)
    clock.time(lambda: matrix @ matrix)
    sample = clock.time(lambda: matrix @ matrix)
    assert sample.is_quiet
    # 1.1 TFLOP: more than 10 PFLOP/s and less than 0.1 TFLOP/s are both impossible.
    floor_ms = 1000 * 2 * SIZE**3 / 1e16
    assert floor_ms < sample.ms < 1e5 * floor_ms


def test_readings_are_plausible(device, matrix):
    clock_of(device).time(lambda: matrix @ matrix)
    reading = clock_of(device).read()
    assert reading.sm_clock_mhz is None or 100 < reading.sm_clock_mhz < 5000
    assert reading.temperature_c is None or 0 < reading.temperature_c < 120
    assert reading.power_w is None or 1 < reading.power_w < 3000
    assert reading.other_processes is None or reading.other_processes >= 0
    assert reading.slowdowns <= SLOWDOWNS
    told = (reading.sm_clock_mhz, reading.temperature_c, reading.power_w, reading.reasons)
    assert any(value is not None for value in told)


def test_a_measurement_records_the_gpu(device, matrix):
    protocol = Protocol(max_seconds=1, max_repeats=0, max_interval_percent=10)
    timing = measure_interleaved({"matmul": lambda: matrix @ matrix}, device, protocol)
    assert timing.gpu is not None
    record = json.loads(json.dumps(timing.gpu.to_dict()))
    assert record["median_sm_clock_mhz"] is None or record["median_sm_clock_mhz"] > 100
    assert timing.quiet or timing.disturbed_rounds
