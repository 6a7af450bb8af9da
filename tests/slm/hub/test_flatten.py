"""Flat modules: what they hold, and what is refused."""

import ast
import re
import sys
from pathlib import Path

import pytest

from slm.hub.flatten import flatten
from slm.hub.formats import FormatConfig, special_tokens, write_model
from slm.hub.verify import verify
from tests.slm.hub.conftest import build_model

ENTRIES = ("slm.hub.configuration", "slm.hub.modeling")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package with nothing in it yet."""
    folder = tmp_path / "flat_example"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("flat_example")]:
        del sys.modules[name]


def test_model_needs_torch_transformers_and_its_own_files_only() -> None:
    files = flatten(ENTRIES)
    foreign = set()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                foreign |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert f"{node.module}.py" in files
            elif isinstance(node, ast.ImportFrom):
                foreign.add(node.module.partition(".")[0])
    assert foreign - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_operators_that_a_model_has_not_are_left_out(tmp_path: Path) -> None:
    model = build_model("", "attention(head_dim=8) deltanet(head_dim=8)")
    write_model(model, FormatConfig(), special_tokens(0), tmp_path)
    operators = {path.name for path in tmp_path.glob("slm_operators_*.py")}
    # The config's default has an FFN.
    parts = {f"slm_operators_{name}.py" for name in ("base", "parts", "ffn")}
    assert operators == parts | {"slm_operators_attention.py", "slm_operators_deltanet.py"}
    assert "slm_kernels_rwkv7.py" not in {path.name for path in tmp_path.iterdir()}
    assert verify(model, tmp_path, FormatConfig()).max_abs_logit_difference < 1e-5


def test_only_imports_are_changed(root: Path) -> None:
    for name, text in flatten(ENTRIES).items():
        original = next(
            path
            for path in (root / "slm").rglob("*.py")
            if "_".join(path.relative_to(root).with_suffix("").parts).removesuffix("___init__")
            == name.removesuffix(".py")
        )
        before, after = original.read_text().splitlines(), text.splitlines()[1:]
        changed = [(a, b) for a, b in zip(before, after, strict=False) if a != b]
        assert all(a.startswith("from slm") and b.startswith("from .slm_") for a, b in changed)


def test_entries_import_every_file_they_need() -> None:
    """Versions of transformers differ in whether they follow imports of imports."""
    imports = {
        name: set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE))
        for name, text in flatten(ENTRIES).items()
    }
    for entry in ("slm_hub_configuration.py", "slm_hub_modeling.py"):
        for name in imports[entry]:
            assert imports[f"{name}.py"] <= imports[entry]


def test_relative_and_long_imports(package: Path) -> None:
    (package / "root.py").write_text(
        "from . import helper as not_a_module\n"
        "from .inner.deep import (\n    one,\n    two,\n)\n"
        "def f():\n    from flat_example.inner import three\n    return one + two + three\n"
    )
    (package / "__init__.py").write_text("helper = 0\n")
    (package / "inner").mkdir()
    (package / "inner" / "__init__.py").write_text("three = 3\n")
    (package / "inner" / "deep.py").write_text("from ..other import one\ntwo = 2\n")
    (package / "other.py").write_text("one = 1\n")
    files = flatten(["flat_example.root"])
    assert set(files) == {
        "flat_example.py",
        "flat_example_root.py",
        "flat_example_inner.py",
        "flat_example_inner_deep.py",
        "flat_example_other.py",
    }
    assert (
        "from .flat_example_inner_deep import (\n    one,\n    two,\n)"
        in (files["flat_example_root.py"])
    )
    assert "    from .flat_example_inner import three\n" in files["flat_example_root.py"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import numpy", "'flat_example.root': imports 'numpy'"),
        ("def f():\n    from einops import rearrange", "imports 'einops'"),
        ("import flat_example.other", "'import flat_example.other' has no flat form"),
        ("from flat_example import other", "import names, not modules"),
        ("from flat_example.other import *", "import names, not modules"),
    ],
)
def test_what_has_no_flat_form_is_refused(package: Path, source: str, message: str) -> None:
    (package / "other.py").write_text("one = 1\n")
    (package / "root.py").write_text("# ruff: noqa\n")
    import flat_example.root  # noqa: F401  Importable, whatever stands in it later.

    (package / "root.py").write_text(source + "\n")
    with pytest.raises(ValueError, match=message):
        flatten(["flat_example.root"])
