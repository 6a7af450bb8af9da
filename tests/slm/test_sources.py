"""What decoding computes has one digest; what it computed once is found by it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from slm import sources
from slm.sources import kernel_hash


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sources that the digest is taken of."""
    copy = tmp_path / "slm"
    shutil.copytree(sources.FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "FOLDER", copy)
    sources._own_sources.cache_clear()
    yield copy
    sources._own_sources.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "model.py",
        "generation.py",
        "compilation.py",
        "decoding_step.py",
        "kernels/ssd.py",
        "operators/ffn.py",
    ],
)
def test_the_digest_follows_every_source_that_decoding_runs(copied: Path, name: str) -> None:
    before = kernel_hash()
    assert len(before) == 12
    (copied / name).write_text((copied / name).read_text() + "\n")
    # A process runs what it has imported, whatever becomes of the files.
    assert kernel_hash() == before
    sources._own_sources.cache_clear()
    assert kernel_hash() != before


def test_the_digest_does_not_follow_the_rest(copied: Path) -> None:
    before = kernel_hash()
    (copied / "evaluation.py").write_text("")
    sources._own_sources.cache_clear()
    assert kernel_hash() == before
