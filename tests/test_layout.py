"""The shape of the repository itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("slm", "latency", "search")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    allowed = PACKAGES[: PACKAGES.index(path.relative_to(ROOT).parts[0]) + 1]
    assert imported_packages(path) & set(PACKAGES) <= set(allowed)


def test_train_needs_slm_only_and_stays_short() -> None:
    path = ROOT / "train.py"
    assert imported_packages(path) & set(PACKAGES) <= {"slm"}
    assert len(path.read_text().splitlines()) < 100


def test_core_needs_torch_only() -> None:
    """What an exported model is made of imports no other package."""
    core = [ROOT / "slm/architecture.py", ROOT / "slm/model.py"]
    core += [*(ROOT / "slm/operators").glob("*.py"), *(ROOT / "slm/kernels").glob("*.py")]
    for path in core:
        foreign = imported_packages(path) - {"slm", "torch"} - set(sys.stdlib_module_names)
        assert not foreign, path


def test_importing_does_no_work() -> None:
    """No output, no environment written, no device asked, no slow package pulled in."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODULES
        if path.name not in ("__main__.py", "__init__.py")
    ]
    code = (
        "import os, sys, importlib\n"
        # What our classes derive from writes to the environment by itself.
        "import torch, lightning, transformers; transformers.GenerationMixin\n"
        "before = dict(os.environ)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert dict(os.environ) == before, set(os.environ) ^ set(before)\n"
        "assert not torch.cuda.is_initialized()\n"
        "slow = {'wandb', 'datasets', 'fla', 'plotly', 'lm_eval'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
