import time
from dataclasses import replace
from types import SimpleNamespace

import pynvml
import pytest

from latency.clock import CpuClock, CudaClock, clock_of
from latency.gpu_monitor import (
    REASONS,
    SLOWDOWNS,
    GpuConditions,
    GpuMonitor,
    GpuReading,
    reason_names,
)
from latency.timer import time_call

UNTOLD = {
    "sm_clock_mhz": None,
    "temperature_c": None,
    "power_w": None,
    "reasons": None,
    "other_processes": None,
}


@pytest.fixture
def nvml(monkeypatch) -> dict:
    """NVML with one GPU, 'GPU-abc', that answers what this holds; an exception is raised."""
    answers = {
        "nvmlDeviceGetClockInfo": 1755,
        "nvmlDeviceGetTemperature": 64,
        "nvmlDeviceGetPowerUsage": 412_500,
        "nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x40,
        "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=p) for p in (7, 8, 9)],
    }

    def answer(name, handle, *arguments):
        assert handle == "handle of GPU-abc"
        if isinstance(answers[name], Exception):
            raise answers[name]
        return answers[name]

    for name in answers:
        monkeypatch.setattr(pynvml, name, lambda *args, name=name: answer(name, *args))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: f"handle of {uuid}")
    return answers


def test_a_call_during_which_our_thread_did_not_run_is_disturbed(device):
    sample = time_call(lambda: time.sleep(0.02), device)
    assert (sample.is_quiet, sample.disturbance) == (False, "cpu_taken")
    assert sample.ms >= 20


def test_time_passes_on_the_cpu_and_there_is_no_gpu_to_read():
    clock = CpuClock()
    before = clock.now_s()
    time.sleep(0.01)
    assert clock.now_s() - before >= 0.01
    assert clock.read() is None


def test_every_device_has_its_clock(device, nvml):
    assert isinstance(clock_of(device), CpuClock)
    clock = clock_of(replace(device, kind="cuda", uuid="abc"))
    assert isinstance(clock, CudaClock)
    assert clock.read().temperature_c == 64


def test_reasons_are_those_of_nvml():
    expected = {
        "gpu_idle": pynvml.nvmlClocksEventReasonGpuIdle,
        "application_clocks": pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
        "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
        "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
        "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
        "sw_thermal_slowdown": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hw_thermal_slowdown": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        "hw_power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
        "display_clocks": pynvml.nvmlClocksEventReasonDisplayClockSetting,
    }
    assert {name: bit for bit, name in REASONS.items()} == expected
    assert reason_names(pynvml.nvmlClocksEventReasonAll) == set(expected)
    assert reason_names(0) == frozenset()
    assert reason_names(0x200 | 0x20) == {"0x200", "sw_thermal_slowdown"}


@pytest.mark.parametrize(
    ("reason", "is_refused"),
    [
        ("gpu_idle", False),
        ("application_clocks", False),
        ("display_clocks", False),
        ("0x200", False),
        ("sw_power_cap", True),
        ("hw_slowdown", True),
        ("sync_boost", True),
        ("sw_thermal_slowdown", True),
        ("hw_thermal_slowdown", True),
        ("hw_power_brake", True),
    ],
)
def test_slowdowns_are_refused_and_settings_are_not(reason, is_refused):
    reading = GpuReading(**UNTOLD | {"reasons": frozenset({reason, "gpu_idle"})})
    assert reading.slowdowns == ({reason} if is_refused else set())
    assert (reason in SLOWDOWNS) == is_refused


def test_a_reading_has_units_and_leaves_this_process_out(nvml):
    assert GpuMonitor("abc").read() == GpuReading(
        sm_clock_mhz=1755,
        temperature_c=64,
        power_w=412.5,
        reasons=frozenset({"sw_power_cap", "hw_thermal_slowdown"}),
        other_processes=2,
    )
    nvml["nvmlDeviceGetComputeRunningProcesses"] = []
    assert GpuMonitor("abc").read().other_processes == 0


@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    ],
)
def test_what_a_gpu_does_not_tell_is_none_and_disturbs_nothing(nvml, code):
    nvml.update(dict.fromkeys(nvml, pynvml.NVMLError(code)))
    reading = GpuMonitor("abc").read()
    assert reading == GpuReading(**UNTOLD)
    assert reading.slowdowns == frozenset()
    assert set(GpuConditions.from_readings([reading]).to_dict().values()) == {None}


def test_a_lost_gpu_is_an_error(nvml):
    nvml["nvmlDeviceGetTemperature"] = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        GpuMonitor("abc").read()


def test_conditions_summarise_readings():
    readings = [
        GpuReading(
            sm_clock_mhz=clock,
            temperature_c=temperature,
            power_w=power,
            reasons=frozenset(reasons),
            other_processes=others,
        )
        for clock, temperature, power, reasons, others in [
            (1980, 50, 300.0, {"gpu_idle"}, 0),
            (1200, 80, 700.0, {"sw_power_cap", "gpu_idle"}, 1),
            (1900, 70, 650.0, set(), 0),
        ]
    ]
    found = GpuConditions.from_readings([*readings, GpuReading(**UNTOLD)])
    assert found == GpuConditions(
        median_sm_clock_mhz=1900,
        max_temperature_c=80,
        median_power_w=650.0,
        reasons=("gpu_idle", "sw_power_cap"),
        max_other_processes=1,
    )
