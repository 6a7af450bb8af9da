"""Operators from a user's file or module: imported once, under their own name, or refused whole."""

import sys
from pathlib import Path

import pytest

from slm.config import ConfigError
from slm.operators import OPERATORS, parse_operator
from slm.plugins import load_plugins, plugin_digests
from slm.sources import kernel_hash

pytestmark = pytest.mark.usefixtures("_no_plugins")

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
from slm.operators.base import Operator, OperatorConfig, register

@dataclass(frozen=True)
class {name}Config(OperatorConfig):
    name: ClassVar[str] = "{operator}"
    size: int = 3
    problems = parameters = flops_per_token = state_bytes = lambda *_: None

@register({name}Config)
class {name}(Operator):
    scan = step = init_state = lambda *_: None
"""

INCOMPLETE = """
from dataclasses import dataclass
from slm.operators.base import Operator, OperatorConfig, register

@dataclass(frozen=True)
class HalfConfig(OperatorConfig):
    problems = lambda *_: []

@register(HalfConfig)
class Half(Operator):
    step = lambda *_: None
"""


def write(file: Path, operator: str = "mine", name: str = "Mine", more: str = "") -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(SOURCE.format(operator=operator, name=name) + more)
    return file


def problems(*plugins: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_plugins([str(plugin) for plugin in plugins])
    return caught.value.problems


def test_a_file_becomes_a_module_of_its_name_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "my_operator.py")
    load_plugins([str(file)])
    operator = OPERATORS["mine"]
    assert str(parse_operator("mine(size=4)")) == "mine(size=4)"
    assert sys.modules[operator.__module__].__file__ == str(file)
    assert operator.__module__ == "my_operator"
    monkeypatch.chdir(tmp_path)
    load_plugins(["my_operator.py", "./my_operator.py"])
    assert OPERATORS["mine"] is operator
    # Nothing was written beside the file.
    assert list(tmp_path.iterdir()) == [file]


def test_a_module_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my_package" / "first.py", more="from my_package.second import SIZE\n")
    (tmp_path / "my_package" / "second.py").write_text("SIZE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins(["my_package.first"])
    assert OPERATORS["mine"].__module__ == "my_package.first"
    assert set(plugin_digests()) == {"my_package.first"}


def test_the_digest_follows_the_source_that_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernel_hash()
    file = write(tmp_path / "my_operator.py")
    load_plugins([str(file)])
    digests, with_plugin = plugin_digests(), kernel_hash()
    assert before != with_plugin
    # What runs is still what was imported.
    write(file, more="# changed\n")
    load_plugins([str(file)])
    assert (plugin_digests(), kernel_hash()) == (digests, with_plugin)

    monkeypatch.setattr("slm.plugins._digests", {})
    del sys.modules["my_operator"], OPERATORS["mine"]
    load_plugins([str(file)])
    assert plugin_digests().keys() == digests.keys()
    assert plugin_digests() != digests
    assert kernel_hash() not in (before, with_plugin)


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("bad.py", "\nx = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("bad.py", "def f(:\n", "SyntaxError: invalid syntax (bad.py, line 1)"),
        ("bad.py", "import no_such_module\n", "line 1: ModuleNotFoundError: No module named "),
        ("bad.py", "import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        (
            "bad.py",
            INCOMPLETE,
            "line 9: ValueError: an operator needs HalfConfig.name, HalfConfig.parameters, "
            "HalfConfig.flops_per_token, HalfConfig.state_bytes, Half.scan, Half.init_state",
        ),
        ("bad-name.py", "", "a module's name has letters, digits and _ only; rename the file"),
        ("random.py", "", "'random' is another module, "),
        ("slm.py", "", "'slm' is another module, "),
        (
            "bad.py",
            SOURCE.format(operator="ffn", name="Mine"),
            "line 12: ValueError: operator name 'ffn' is taken by slm.operators.ffn.FFN",
        ),
        (
            "bad.py",
            SOURCE.format(operator="mine", name="Mine")
            + "from slm.operators import OPERATORS\nOPERATORS['ffn'] = Mine\n",
            "ValueError: operator name 'ffn' is taken by slm.operators.ffn",
        ),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    tmp_path: Path, name: str, source: str, problem: str
) -> None:
    operators, modules = dict(OPERATORS), set(sys.modules)
    file = tmp_path / name
    file.write_text(source)
    (found,) = problems(file)
    assert found.startswith(f"plugins: '{file}': {problem}")
    assert operators == OPERATORS
    assert "bad" not in set(sys.modules) - modules
    assert plugin_digests() == {}
    assert list(tmp_path.iterdir()) == [file]


def test_every_plugin_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "nowhere.py"
    assert problems(file, "no_such.module") == [
        f"plugins: '{file}': no such file",
        "plugins: 'no_such.module': ModuleNotFoundError: No module named 'no_such'",
    ]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "my_operator.py")
    second = write(tmp_path / "b" / "my_operator.py", operator="other")
    assert problems(first, second) == [
        f"plugins: '{second}': 'my_operator' is another module, {first}; rename the file"
    ]
    assert "mine" in OPERATORS
    assert "other" not in OPERATORS
