"""What people are told to install is what `make` installs, in every fresh clone that is tested."""

import re
import shlex
from pathlib import Path

from tests.pages import page_blocks


def pip_arguments(lines: list[str]) -> list[list[str]]:
    """Those of every `pip install` among some lines of shell, without options about its output."""
    commands = [line.partition("pip install ")[2] for line in lines if "pip install " in line]
    words = [shlex.split(command, comments=True) for command in commands]
    return [[word for word in each if word != "--quiet"] for each in words]


def extras(requirement: str) -> set[str]:
    """'.[a,b]' names a and b."""
    found = re.fullmatch(r"\.\[(.*)\]", requirement)
    assert found is not None
    return set(found[1].split(","))


def test_a_gpu_node_is_installed_as_every_tested_clone_is(root: Path) -> None:
    (block,) = page_blocks(root / "docs" / "gpu_node.md", "bash")
    (project, *others) = pip_arguments(block.splitlines())
    (made, *others_made) = pip_arguments((root / "Makefile").read_text().splitlines())
    assert others == others_made
    assert project[:-1] == made[:-1]
    # That of the tests has those besides that only developers need.
    assert extras(project[-1]) <= extras(made[-1])
