"""The roofline: how fast a decoding step could be at most, by what the device can read and compute.

Both peaks are measured, not taken from a data sheet, so that a fraction says what is left to win
in this software on this machine (Williams, Waterman and Patterson 2009).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from latency.device import Device
from latency.lock import device_lock
from latency.records import check_device
from latency.table_file import read_table, write_table
from latency.timer import CpuMeter, quiet
from latency.workload import Workload
from slm.architecture import Architecture
from slm.huge_pages import huge_memory

DTYPES = ("float32", "bfloat16")
# Other work can only slow a measurement down: the best of so many medians is taken.
REPEATS = 5
# Time that each of these medians is taken from, on a CPU.
REPEAT_SECONDS = 0.2
# How often, at least, torch's Timer calls what it times.
LEAST_CALLS = 2

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the peaks are measured with.

    buffer_bytes: read from end to end; much larger than every cache.
    matrix_sizes: of the square matrix products, ascending.
    max_seconds: time for all of it; what is not begun by then is left out, but for the buffer and
        the smallest product of each dtype.
    """

    buffer_bytes: int
    matrix_sizes: tuple[int, ...]
    max_seconds: float = 10.0

    @classmethod
    def for_device(cls, device: Device) -> Probe:
        """What is large enough to keep the device busy."""
        if device.kind == "cuda":
            return cls(buffer_bytes=2048 * MIB, matrix_sizes=(4096, 8192))
        return cls(buffer_bytes=512 * MIB, matrix_sizes=(1024, 2048))


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The best that a device did.

    read_bytes_per_s: reading a buffer that no cache holds.
    flops_per_s: of a matrix product, by dtype, as precise as torch is set.
    other_cpus_busy: CPUs that other processes kept busy meanwhile, on average; well above 0, the
        peaks may be too low.
    """

    read_bytes_per_s: float
    flops_per_s: dict[str, float]
    other_cpus_busy: float

    @classmethod
    def load_or_measure(
        cls,
        device: Device,
        cache_dir: Path = Path("cache"),
        progress: Callable[[str], None] | None = None,
        probe: Probe | None = None,
    ) -> Peaks:
        """The peaks kept under `cache_dir`/latency/<device key>/; measured if there are none.

        `progress` is told before they are measured. `probe`: None takes the device's own.
        """
        path = cls.path(device, cache_dir)

        def parse(values: Any) -> Peaks:
            return cls.from_dict(values, device.key)

        known = read_table(path, parse)
        if known:
            return known
        with device_lock(name=device.lock_name):
            # Another process may have measured them while this one waited for the device.
            known = read_table(path, parse)
            if known:
                return known
            if progress:
                progress("peak bandwidth and peak FLOPs of the device")
            probe = probe or Probe.for_device(device)
            measured = measure_peaks(device, probe)
            write_table(
                path, {**asdict(measured), "probe": asdict(probe), "device": device.describe()}
            )
        return measured

    @staticmethod
    def path(device: Device, cache_dir: Path) -> Path:
        """Where the peaks are kept."""
        return cache_dir / "latency" / device.key / "peaks.json"

    @classmethod
    def from_dict(cls, values: Any, device_key: str) -> Peaks:
        """What was kept. Raises ValueError if it is not the peaks of that device."""
        if not isinstance(values, dict) or not isinstance(values.get("flops_per_s"), dict):
            raise ValueError("no peaks")
        check_device(values, device_key)
        flops = values["flops_per_s"]
        if set(flops) != set(DTYPES):
            raise ValueError(f"flops_per_s: expected {sorted(DTYPES)}, got {sorted(flops)}")
        named = {f"flops_per_s.{dtype}": rate for dtype, rate in flops.items()}
        named["read_bytes_per_s"] = values.get("read_bytes_per_s")
        for name, rate in named.items():
            if not isinstance(rate, float) or not 0 < rate < math.inf:
                raise ValueError(f"{name}: must be > 0, got {rate!r}")
        busy = values.get("other_cpus_busy")
        if not isinstance(busy, float) or not 0 <= busy < math.inf:
            raise ValueError(f"other_cpus_busy: must be >= 0, got {busy!r}")
        return cls(
            read_bytes_per_s=values["read_bytes_per_s"], flops_per_s=flops, other_cpus_busy=busy
        )


def measure_peaks(device: Device, probe: Probe) -> Peaks:
    """Read the probe's buffer and multiply its matrices, the device being ours alone."""
    share_seconds = probe.max_seconds / (1 + len(DTYPES))
    with quiet(device):
        meter = CpuMeter()
        read_bytes_per_s = _read_bytes_per_s(device, probe, share_seconds)
        flops_per_s = {
            dtype: _flops_per_s(device, probe, getattr(torch, dtype), share_seconds)
            for dtype in DTYPES
        }
        other_cpus_busy = meter.others_busy()
    return Peaks(
        read_bytes_per_s=read_bytes_per_s,
        flops_per_s=flops_per_s,
        other_cpus_busy=other_cpus_busy,
    )


def _read_bytes_per_s(device: Device, probe: Probe, max_seconds: float) -> float:
    buffer = probe_buffer(probe.buffer_bytes, device)
    seconds = _best_seconds(buffer.sum, device, time.monotonic() + max_seconds)
    return buffer.nbytes / seconds


def probe_buffer(num_bytes: int, device: Device) -> torch.Tensor:
    """What is read to find out how fast that is: fp32, as weights lie, on a CPU in huge pages."""
    if device.kind == "cuda":
        return torch.ones(num_bytes // 4, device=device.torch_device)
    # Written, not only allocated: pages that nobody wrote to share one page of zeros.
    return torch.frombuffer(huge_memory(num_bytes), dtype=torch.float32).fill_(1.0)


def _flops_per_s(device: Device, probe: Probe, dtype: torch.dtype, max_seconds: float) -> float:
    deadline = time.monotonic() + max_seconds
    # Its own: a caller's random numbers stay as they are.
    generator = torch.Generator(device.torch_device).manual_seed(0)
    best = 0.0
    for size in probe.matrix_sizes:
        flops = 2 * size**3
        if best and time.monotonic() + LEAST_CALLS * flops / best > deadline:
            break
        # Not zeros: a GPU draws less power on them, and clocks higher.
        a, b = (
            torch.randn(size, size, generator=generator, device=device.torch_device).to(dtype)
            for _ in range(2)
        )
        product = torch.empty_like(a)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = product) -> None:
            torch.mm(a, b, out=out)

        best = max(best, flops / _best_seconds(multiply, device, deadline))
    return best


def _best_seconds(call: Callable[[], object], device: Device, deadline: float) -> float:
    """The least of up to REPEATS medians, of which the first is taken in any case."""
    best = math.inf
    for _ in range(REPEATS):
        best = min(best, _median_seconds(call, device))
        if time.monotonic() > deadline:
            break
    return best


def _median_seconds(call: Callable[[], object], device: Device) -> float:
    if device.kind == "cuda":
        from triton.testing import do_bench

        return statistics.median(do_bench(call, return_mode="all")) / 1000
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=device.threads)
    return timer.blocked_autorange(min_run_time=REPEAT_SECONDS).median


def step_bytes(architecture: Architecture, workload: Workload, context: int) -> int:
    """Bytes that a decoding step of the whole batch has to read and write, at the least.

    context: tokens that the step sees, its own and the meta tokens included.

    Every weight is read once: of an embedding that is not the head too, only the batch's rows;
    meta tokens not at all, since the state holds them already. Per row of the batch, what an
    operator holds before its first token (a recurrent state, a convolution's tail) is read and
    written; keys and values, of the tokens that a window shows, pass once: the new token's are
    written, the others read. Activations and logits may stay in caches and do not count.

    Exact for the operators of `slm`. One of your own whose state does not grow from nothing, and
    is not rewritten at every step either, would count too much.
    """
    _check_context(context)
    width, value_bytes = architecture.width, workload.torch_dtype.itemsize
    values = architecture.parameters() - architecture.meta_tokens * width
    if not architecture.tie_embeddings:
        values += (workload.batch_size - architecture.vocab_size) * width
    if architecture.normalize_logits:
        # The norms of the head's rows, which the decoder remembers.
        values += architecture.vocab_size
    state_bytes = architecture.state_bytes(context, value_bytes)
    rewritten_bytes = architecture.state_bytes(0, value_bytes)
    return values * value_bytes + workload.batch_size * (state_bytes + rewritten_bytes)


def middle_context(architecture: Architecture, workload: Workload) -> int:
    """Tokens that the step in the middle of the answer sees, meta tokens included."""
    return architecture.meta_tokens + workload.prompt_tokens + (workload.new_tokens + 1) // 2


def footprint_bytes(architecture: Architecture, workload: Workload) -> int:
    """`step_bytes` in the middle of the answer: what passes through the caches, step by step."""
    return step_bytes(architecture, workload, middle_context(architecture, workload))


def step_flops(architecture: Architecture, workload: Workload, context: int) -> float:
    """FLOPs of a decoding step of the whole batch; `context` as in `step_bytes`."""
    _check_context(context)
    return workload.batch_size * architecture.flops_per_token(context)


@dataclass(frozen=True)
class Roofline:
    """A measured decoding step beside what bounds it.

    bytes, flops: that the step of the whole batch needs at the least.
    bound_ms: the time below which it cannot be, by the device's peaks.
    bound: which peak that is.
    fraction: bound_ms / measured. Above 1 where the weights stay in a cache: it is faster than
        the memory that the bandwidth was measured on.
    """

    bytes: int
    flops: float
    bound_ms: float
    bound: Literal["memory", "compute"]
    fraction: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def roofline(
    architecture: Architecture, workload: Workload, context: int, tpot_ms: float, peaks: Peaks
) -> Roofline:
    """Where a step that took `tpot_ms` at `context` tokens lies; `context` as in `step_bytes`.

    Raises ValueError if `tpot_ms` is not above 0 or `context` is below 1.
    """
    if not tpot_ms > 0:
        raise ValueError(f"tpot_ms: must be > 0, got {tpot_ms}")
    needed_bytes = step_bytes(architecture, workload, context)
    needed_flops = step_flops(architecture, workload, context)
    memory_ms = 1000 * needed_bytes / peaks.read_bytes_per_s
    compute_ms = 1000 * needed_flops / peaks.flops_per_s[workload.dtype]
    bound_ms = max(memory_ms, compute_ms)
    return Roofline(
        bytes=needed_bytes,
        flops=needed_flops,
        bound_ms=bound_ms,
        bound="memory" if memory_ms >= compute_ms else "compute",
        fraction=bound_ms / tpot_ms,
    )


def _check_context(context: int) -> None:
    if context < 1:
        raise ValueError(f"context: must be >= 1, got {context}")
