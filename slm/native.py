"""C++ sources of ours, built on the machine that runs them, for its own instructions.

For what no composition of torch's operations does at the memory's speed, and no compiler of theirs.
Libraries lie beside those of `slm.compilation`, under a name that holds a digest of the source and
of all that the build depends on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
from pathlib import Path

from slm.compilation import cache_folder, compiler, cpu_flags, has_compiler

log = logging.getLogger(__name__)

# No function of ours asks errno what went wrong with a square root.
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def native_library(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file, which are `extern "C"`.

    Builds them if that has not been done yet; another process that is about to do the same waits.
    None if there is no compiler, or it fails, of which a warning tells: callers have torch's
    operations left.
    """
    from filelock import FileLock

    if not has_compiler():
        return None
    path = _library_path(source)
    try:
        if (found := _load(path)) is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            # Another process may have been faster.
            if (found := _load(path)) is None:
                _build(source, path)
                found = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("%s is not used: %s", source.name, error)
        return None
    except subprocess.CalledProcessError as error:
        log.warning("%s is not used: %s: %s", source.name, error, error.stderr.strip()[-500:])
        return None
    return found


def _library_path(source: Path) -> Path:
    parts = (source.read_text(encoding="utf-8"), *OPTIONS, compiler(), cpu_flags())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return cache_folder() / f"{source.stem}-{digest[:16]}.so"


def _load(path: Path) -> ctypes.CDLL | None:
    """The library; None if there is none, or no good one."""
    if not path.exists():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("%s: not a library that can be used (%s); built anew", path, error)
        return None


def _build(source: Path, path: Path) -> None:
    """Write the library of `source` to `path`, whole or not at all."""
    temporary = path.with_suffix(f".{platform.node()}.{os.getpid()}.so")
    command = [compiler(), *OPTIONS, str(source), "-o", str(temporary)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
