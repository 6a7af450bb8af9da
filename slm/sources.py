"""Digest of the sources that decide what decoding computes."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from slm.plugins import plugin_digests

FOLDER = Path(__file__).parent
MODULES = ("model.py", "generation.py", "compilation.py", "decoding_step.py", "huge_pages.py")
PACKAGES = ("kernels", "kernels/triton", "operators")


def kernel_hash() -> str:
    """12 hexadecimal digits of the sources that decoding runs, those of plugins included."""
    digest = _own_sources().copy()
    for name, source in sorted(plugin_digests().items()):
        digest.update(f"{name}\0{source}".encode())
    return digest.hexdigest()[:12]


@functools.cache
def _own_sources() -> hashlib._Hash:
    # Read once: what this process runs is what it has imported.
    sources = [FOLDER / name for name in MODULES]
    for package in PACKAGES:
        folder = FOLDER / package
        sources += sorted([*folder.glob("*.py"), *folder.glob("*.cpp"), *folder.glob("*.h")])
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.relative_to(FOLDER).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest
