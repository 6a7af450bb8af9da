"""Folders that take the place of earlier ones: nothing is lost but what an export has written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slm.config import ConfigError
from slm.hub.replacing import (
    read_report,
    replacement_problems,
    replacing,
    report_file,
    write_report,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export."""
    folder = tmp_path / "export"
    with replacing(folder) as new:
        (new / "README.md").write_text("a card")
        (new / "model.safetensors").write_text("first")
    write_report(folder, {})
    return folder


def fail(folder: Path) -> None:
    """An export that does not come to its end."""
    try:
        with replacing(folder) as new:
            assert (folder / "model.safetensors").read_text() == "first"
            (new / "model.safetensors").write_text("half")
            raise RuntimeError
    except RuntimeError:
        return


def leftovers(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")
    )


def test_an_export_is_replaced_and_nothing_left_over(folder: Path, source: Path) -> None:
    assert replacement_problems(folder, source) == []
    with replacing(folder) as new:
        (new / "model.safetensors").write_text("second")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "second"
    assert leftovers(folder) == [".export.lock"]


def test_what_nobody_exported_stays(folder: Path, source: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / ".git").mkdir()
    (problem,) = replacement_problems(folder, source)
    assert problem.endswith("holds what no export has written: .git, notes.txt")
    mine = tmp_path / "mine"
    mine.mkdir()
    (problem,) = replacement_problems(mine, source)
    assert problem.endswith("exists and is not an export")
    (mine / "file").touch()
    (problem,) = replacement_problems(mine / "file", source)
    assert problem.endswith("exists and is not an export")


def test_what_evaluation_adds_is_known_and_a_changed_card_is_not_lost(
    folder: Path, source: Path
) -> None:
    (folder / "evaluation.json").write_text("{}")
    assert replacement_problems(folder, source) == []
    (folder / "README.md").write_text("a card, and what I know besides")
    (problem,) = replacement_problems(folder, source)
    assert "was changed since" in problem


def test_what_is_read_is_not_replaced(folder: Path) -> None:
    for inside in (folder, folder / "source"):
        (problem,) = replacement_problems(folder, inside)
        assert "holds what is to be read" in problem


def test_a_report_takes_no_other_files_place(tmp_path: Path, source: Path) -> None:
    (tmp_path / "result.json").write_text('{"tokens": 5}')
    (problem,) = replacement_problems(tmp_path / "result", source)
    assert "is something else" in problem


def test_a_link_is_followed(folder: Path, source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert replacement_problems(link, source) == []
    with replacing(link) as new:
        (new / "model.safetensors").write_text("second")
    assert link.is_symlink()
    assert (folder / "model.safetensors").read_text() == "second"
    assert report_file(link) == report_file(folder)


def test_the_earlier_folder_stays_whatever_happens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(folder)
    rename, calls = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(folder) as new:
        (new / "model.safetensors").write_text("whole")
    assert (folder / "model.safetensors").read_text() == "first"
    assert leftovers(folder) == [".export.lock"]


KILLED = """
import os, sys, pathlib
from slm.hub import replacing
folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
rename = os.rename
def die(source, target):
    rename(source, target)
    os.kill(os.getpid(), 9)
with replacing.replacing(folder) as new:
    (new / "model.safetensors").write_text("half")
    if moment == "writing":
        os.kill(os.getpid(), 9)
    os.rename = die
"""


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_the_next_one_clears_up_after_a_kill(folder: Path, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(leftovers(folder)) > 1
    # Whatever comes next, what was there is there again.
    fail(folder)
    assert (folder / "model.safetensors").read_text() == "first"
    assert leftovers(folder) == [".export.lock"]


def test_two_do_not_write_at_once(folder: Path) -> None:
    again = replacing(folder)
    with replacing(folder), pytest.raises(ConfigError, match="by another process"):
        again.__enter__()
    assert read_report(folder)
