"""Fetching a Debian package's files, without installing the package."""

import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock


def fetch(package: str, cache_dir: Path) -> Path:
    """Return the folder that holds the files of a package, downloaded once into `cache_dir`.

    The folder's name is the package's name, version and architecture. Raises FileNotFoundError
    where there is no apt, or where apt does not find the package.
    """
    if present := _unpacked(package, cache_dir):
        return present
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{package}.lock"):
        return _unpacked(package, cache_dir) or _download(package, cache_dir)


def _unpacked(package: str, cache_dir: Path) -> Path | None:
    return max(cache_dir.glob(f"{package}_*"), default=None)


def _download(package: str, cache_dir: Path) -> Path:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(
                f"Debian package '{package}': {tool} is not on this machine; "
                "copy the cache folder from one that has it, or use another source of text"
            )
    # What a killed process left behind.
    partial = cache_dir / f".{package}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _run("apt-get", "download", package, package=package, folder=partial)
    (archive,) = partial.glob("*.deb")
    files = partial / archive.stem
    _run("dpkg-deb", "-x", archive.name, files.name, package=package, folder=partial)
    os.rename(files, cache_dir / archive.stem)
    shutil.rmtree(partial)
    return cache_dir / archive.stem


def _run(*command: str, package: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise FileNotFoundError(
            f"Debian package '{package}': `{' '.join(command)}` failed: {reason} "
            "(`apt-get update` refreshes the list of packages)"
        )
