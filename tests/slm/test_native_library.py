"""C++ of ours is built once, and anew where what lies on disk is no library."""

from pathlib import Path

import pytest

from slm import native


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    native.native_library.cache_clear()
    return path


def test_it_is_found_on_disk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.native_library(source)
    assert library is not None
    assert library.answer() == 42
    (path,) = source.parent.joinpath("cache", "compiled").glob("*.so")
    built_ns = path.stat().st_mtime_ns
    native.native_library.cache_clear()
    assert native.native_library(source) is not None
    assert path.stat().st_mtime_ns == built_ns


def test_another_source_is_another_library(source: Path) -> None:
    native.native_library(source)
    source.write_text('extern "C" int answer() { return 43; }\n')
    native.native_library.cache_clear()
    library = native.native_library(source)
    assert library is not None
    assert library.answer() == 43


def test_what_is_no_library_is_named_and_built_anew(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = native._library_path(source)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF of a disk that was full")
    library = native.native_library(source)
    assert library is not None
    assert library.answer() == 42
    assert f"{path}: not a library that can be used" in caplog.text


def test_a_source_that_cannot_be_built_is_named(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text("no C++\n")
    assert native.native_library(source) is None
    assert "answer.cpp is not used: " in caplog.text
    assert "error" in caplog.text
    assert not list(source.parent.joinpath("cache").rglob("*.so"))
