"""Functions of tensors compiled ahead of time (AOTInductor), kept on disk as libraries.

A library holds no weights: they are arguments, as everything else is, so all layers and models of
the same shapes share it, and a process that finds it on disk starts without tracing anything.
Libraries lie in `$SLM_CACHE_DIR/compiled` (default: ~/.cache/slm-frontier), which processes may
share; the name holds a digest of all that they depend on.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slm.config import ConfigError
from slm.kernels import decode_attention, matrix_vector
from slm.kernels.backend import current_backend
from slm.sources import kernel_hash

log = logging.getLogger(__name__)

# Raise when what is done with an exported function changes.
VERSION = 1

# What our kernels in C++ have in common.
VECTORS = Path(__file__).parent / "kernels" / "vectors.h"


class CompilationError(ConfigError):
    """A function cannot be compiled here: no compiler, no room on the disk."""


@dataclass(frozen=True)
class Argument:
    """An example of an argument: a tensor of its shape, strides, dtype and device.

    varying: axes whose size, at least two, may be another in each call.
    """

    example: Tensor
    varying: tuple[int, ...] = ()

    @property
    def layout(self) -> str:
        """What a library depends on: 'float32[1,*,4,64](…)' with the strides."""
        x = self.example
        sizes = ["*" if axis in self.varying else str(n) for axis, n in enumerate(x.shape)]
        strides = [str(s) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1]
        return f"{x.dtype}[{','.join(sizes)}]({','.join(strides)})".removeprefix("torch.")

    def without_values(self) -> Tensor:
        """The example in memory of its own, contiguous if it can be said to be.

        Strides of axes of size one are free. Where they are not those of a contiguous tensor, the
        compiler copies the whole of what is changed in place.
        """
        x = self.example
        strides = torch.empty(x.shape, device="meta").stride() if x.is_contiguous() else x.stride()
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


class Library:
    """A compiled function: a list of tensors in, a list of tensors out."""

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # On CUDA the others ask, between two calls, for events, which a capture forbids.
            package = torch._inductor.aoti_load_package(
                str(path), run_single_threaded=torch.cuda.is_available()
            )
        # The package's own __call__ flattens its arguments by a tree and takes 20 µs more.
        self._run = package.loader.run

    def __call__(self, arguments: list[Tensor]) -> list[Tensor]:
        """Arguments that the function changes in place are changed in place."""
        results: list[Tensor] = self._run(arguments)
        return results


def cache_folder() -> Path:
    """Where libraries lie."""
    return Path(os.environ.get("SLM_CACHE_DIR", "~/.cache/slm-frontier")).expanduser() / "compiled"


def library(
    name: str, function: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Argument]
) -> Library:
    """The library of `function`, which `name` and the arguments' layouts must tell from all others.

    Compiles it if there is none yet; another process that is about to do the same waits. A file
    that is no library is named in a warning and replaced. Raises CompilationError if the compiler
    is missing or fails.
    """
    from filelock import FileLock

    path = library_path(name, arguments)
    try:
        found = _load(path)
        if found is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = _load(path)
            if found is None:
                log.info("compiling %s", name if len(name) <= 80 else f"{name[:79]}…")
                _compile(function, arguments, path)
                found = _load(path)
    except OSError as error:
        raise CompilationError([f"{path}: {error}; SLM_CACHE_DIR names another place"]) from error
    if found is None:
        raise CompilationError([f"{path}: what was compiled cannot be loaded"])
    return found


def compiler_problems(field: str, value: str) -> list[str]:
    """Why the `value` of a config's field, which wants something compiled, cannot be had."""
    if has_compiler():
        return []
    return [
        f"{field}: {value!r} needs a C++ compiler, and there is no {compiler()!r}: install g++, "
        "name another in CXX, or choose 'eager'"
    ]


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    return shutil.which(compiler()) is not None


def compiler() -> str:
    """The command of the C++ compiler."""
    return os.environ.get("CXX", "g++")


def library_path(name: str, arguments: Sequence[Argument]) -> Path:
    """Where the library of a function lies, or will."""
    layouts = "; ".join(argument.layout for argument in arguments)
    digest = hashlib.sha256(f"{name}\n{layouts}\n{_toolchain(arguments)}".encode()).hexdigest()
    readable = "".join(c if c.isalnum() else "-" for c in name)[:60].strip("-")
    return cache_folder() / f"{readable}-{digest[:16]}.pt2"


def _toolchain(arguments: Sequence[Argument]) -> str:
    """Everything but the function that decides what is compiled."""
    device = arguments[0].example.device
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        target = f"{gpu.name} {gpu.major}.{gpu.minor} {gpu.multi_processor_count} {_triton()}"
    else:
        target = f"{cpu_flags()} {torch.get_num_threads()} threads"
    parts = (VERSION, torch.__version__, kernel_hash(), current_backend(), device.type, target)
    return " ".join(map(str, parts))


@functools.cache
def _triton() -> str:
    from importlib.metadata import version

    return f"triton {version('triton')}"


@functools.cache
def cpu_flags() -> str:
    """The instructions that the compiler may use (-march=native)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:12] + torch.backends.cpu.get_cpu_capability()


@functools.lru_cache(maxsize=1024)
def _loaded(path: Path, modified_ns: int) -> Library:
    return Library(path)


def _load(path: Path) -> Library | None:
    """The library, loaded once per process; None if there is none, or no good one."""
    try:
        return _loaded(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return None
    except RuntimeError as error:
        log.warning("%s: not a compiled library (%s); compiled anew", path, str(error)[:200])
        return None


class _Function(nn.Module):
    """What `torch.export` takes."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, arguments: list[Tensor]) -> tuple[Tensor, ...]:
        return self.function(*arguments)


def _compile(
    function: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Argument], path: Path
) -> None:
    """Write the library of a function to `path`, whole or not at all."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    varying = torch.export.Dim.DYNAMIC(min=2)
    shapes: list[Any] = [dict.fromkeys(argument.varying, varying) for argument in arguments]
    # The compiler insists on the ending.
    temporary = path.with_name(f"{path.stem}.{platform.node()}.{os.getpid()}.pt2")
    try:
        # Tensors made in inference mode cannot be traced, and examples need no memory.
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            with FakeTensorMode():
                examples = [argument.without_values() for argument in arguments]
            exported = torch.export.export(
                _Function(function), (examples,), dynamic_shapes=(shapes,), strict=False
            )
            table, options = torch.export.default_decompositions(), {}
            if arguments[0].example.device.type == "cpu":
                options["aot_inductor.custom_ops_to_c_shims"] = _c_shims()
                for operation, decomposition in matrix_vector.DECOMPOSITIONS.items():
                    table[operation] = decomposition
            exported = exported.run_decompositions(table)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(temporary), inductor_configs=options
            )
        os.replace(temporary, path)
    except CompilationError:
        raise
    except Exception as error:  # of the compiler's many kinds, or of a user's operator
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        # A compiler's own words come last.
        reason = ": ".join(dict.fromkeys([type(error).__name__, lines[0], lines[-1]]))
        raise CompilationError([f"{path}: cannot be compiled: {reason}"]) from error
    finally:
        temporary.unlink(missing_ok=True)


def _c_shims() -> dict[torch._ops.OpOverload, list[str]]:
    """Of our operations, the C++ that every library begins with: `extern` and each of the texts."""
    vectors, product, attention = (
        path.read_text(encoding="utf-8")
        for path in (VECTORS, matrix_vector.KERNEL, decode_attention.KERNEL)
    )
    return {
        torch.ops.slm.matrix_vector.default: [f'"C++" {{\n{vectors}}}', product],
        torch.ops.slm.decode_attention_cpu.default: [attention],
    }
