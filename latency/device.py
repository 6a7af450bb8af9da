"""What machine this is: everything that a latency depends on, as a key."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

import slm
from latency.lock import current_lock_name
from slm.kernels.backend import Backend, current_backend
from slm.sources import kernel_hash

# Raise when the protocol changes in a way that makes old figures incomparable.
PROTOCOL_VERSION = 8

SOURCES = Path(slm.__file__).parent

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Where the system does not say: what most servers' cores have.
USUAL_CACHE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Device:
    """A machine and the software on it.

    kind: 'cpu' or 'cuda'.
    model: of the GPU or the CPU; limit: the GPU's power limit or the CPU's thread count.
    driver: the GPU's driver, or the CPU's instruction set that torch uses.
    cache_bytes: of the second cache, which is a core's own on most CPUs and all of a GPU's.
    torch_version, triton_version, fla_version: None when not installed.
    kernel_hash: of the sources that decoding runs.
    backend: which kernels were asked for.
    threads: torch's CPU threads, pinned while timing.
    uuid, date, commit: recorded, and no part of the key: equal devices share their tables.
    """

    kind: Literal["cpu", "cuda"]
    model: str
    limit: str
    driver: str
    cache_bytes: int
    torch_version: str
    triton_version: str | None
    fla_version: str | None
    kernel_hash: str
    backend: Backend
    protocol: int
    threads: int
    uuid: str
    date: str
    commit: str | None

    @classmethod
    def current(
        cls, threads: int | None = None, kind: Literal["cpu", "cuda"] | None = None
    ) -> Device:
        """The device of this process.

        threads: CPU threads to time with; None: as torch is set.
        kind: None takes the GPU if there is one.

        Raises ValueError if there is no GPU and one is asked for, or if `threads` is below 1.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads: must be >= 1, got {threads}")
        has_cuda = torch.cuda.is_available()
        if kind == "cuda" and not has_cuda:
            raise ValueError("device: 'cuda' is asked for, but torch finds no GPU")
        kind = kind or ("cuda" if has_cuda else "cpu")
        threads = threads or torch.get_num_threads()
        hardware = _gpu() if kind == "cuda" else _cpu(threads)
        return cls(
            kind=kind,
            threads=threads,
            torch_version=torch.__version__,
            triton_version=_version("triton"),
            fla_version=_version("flash-linear-attention"),
            kernel_hash=kernel_hash(),
            backend=current_backend(),
            protocol=PROTOCOL_VERSION,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=_commit(),
            **hardware,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the key stands for."""
        recorded = {"threads", "uuid", "date", "commit"}
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in recorded
        }

    @property
    def key(self) -> str:
        """Names the device's files: model and limit, readable, and a digest of the identity."""
        digest = hashlib.sha256(repr(sorted(self.identity.items())).encode()).hexdigest()[:10]
        readable = re.sub(r"[^a-z0-9]+", "-", f"{self.model} {self.limit}".lower()).strip("-")
        return f"{readable}-{digest}"

    @property
    def torch_device(self) -> torch.device:
        """The device as torch knows it."""
        return torch.device(self.kind)

    @property
    def lock_name(self) -> str:
        """Names the lock that timing on this device takes."""
        return "cpu" if self.kind == "cpu" else self.uuid

    def describe(self) -> dict[str, Any]:
        """Everything that is known of the device, its key included; JSON-able."""
        return {"key": self.key, **asdict(self)}


def _cpu(threads: int) -> dict[str, Any]:
    return {
        "model": _cpu_model(),
        "limit": f"{threads} thread{'s' if threads > 1 else ''}",
        "driver": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": _cpu_cache_bytes(),
        "uuid": platform.node(),
    }


def _cpu_model() -> str:
    """The CPU's name; with family and model where the name alone does not tell generations."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", info.read_text(), re.M))
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} {found.get('cpu family', '')}.{found.get('model', '')}"


def _cpu_cache_bytes() -> int:
    for level in CPU_CACHES.glob("index*/level"):
        if level.read_text().strip() == "2":
            size = level.with_name("size").read_text().strip()
            return int(size.removesuffix("K")) * 2**10
    return USUAL_CACHE_BYTES


def _gpu() -> dict[str, Any]:
    """The current GPU, asked through NVML by its UUID, whatever CUDA_VISIBLE_DEVICES says."""
    import pynvml

    uuid = current_lock_name()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        try:
            limit = f"{pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) // 1000} W"
        except pynvml.NVMLError_NotSupported:
            limit = "no power limit"
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    return {
        "model": properties.name,
        "limit": limit,
        "driver": str(driver),
        "cache_bytes": properties.L2_cache_size,
        "uuid": uuid,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the sources; None when they are not in a git repository with one."""
    command = ["git", "-C", str(SOURCES), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
