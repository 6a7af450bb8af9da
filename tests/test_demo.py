"""`make demo` as a person runs it, killed on the way, and the commands of the README."""

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, open_dict
from pages import page_commands

from slm.config import compose
from slm.evaluate import as_hydra_wants

DEADLINE_S = 400


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a clone has it: no caches, no runs, no environment."""
    folder = tmp_path_factory.mktemp("checkout") / "slm-frontier"
    ignored = shutil.ignore_patterns(".*", "runs", "cache", "wandb", "__pycache__", "*.egg-info")
    shutil.copytree(root, folder, ignore=ignored)
    return folder


def start_demo(checkout: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [
        "make",
        "--no-print-directory",
        "demo",
        "DEMO=demo_smoke",
        f"PYTHON={sys.executable}",
    ]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=checkout, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(condition: Callable[[], bool], demo: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert demo.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def scored(run: Path) -> dict[int, dict]:
    path = run / "candidates.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return {row["number"]: row for row in rows if row["state"] == "scored"}


@pytest.mark.timeout(900)
def test_demo_survives_a_kill_and_runs_to_its_end(checkout: Path, tmp_path: Path) -> None:
    run, log = checkout / "runs" / "demo", tmp_path / "log"

    demo = start_demo(checkout, log)
    wait_for(lambda: len(scored(run)) >= 2, demo, log)
    os.killpg(demo.pid, signal.SIGKILL)
    demo.wait()
    before = scored(run)

    demo = start_demo(checkout, log)
    assert demo.wait(DEADLINE_S) == 0, log.read_text()
    after = scored(run)
    # What was scored before the kill has been kept, not repeated.
    for number, row in before.items():
        assert after[number]["loss"] == row["loss"]
        assert after[number]["finished_at"] == row["finished_at"]
    digests = [row["digest"] for row in after.values()]
    assert len(set(digests)) == len(digests) >= 3

    chosen = (run / "frontier" / "chosen").read_text().strip()
    result = json.loads((run / "train" / "result.json").read_text())
    export = json.loads((run / "export.json").read_text())
    assert result["digest"] == chosen
    assert export["max_abs_logit_difference"] < 1e-5
    assert export["cached_equals_uncached"]
    page = (run / "report.html").read_text()
    assert result["architecture"] in page.replace("&#34;", '"')
    last_lines = log.read_text().splitlines()[-4:]
    assert [line.split()[0] for line in last_lines] == ["report", "frontier", "model", "export"]
    assert all((checkout / line.split()[1]).exists() for line in last_lines)

    # Once more: everything is there already.
    weights = (run / "export" / "model.safetensors").stat().st_mtime_ns
    demo = start_demo(checkout, log)
    assert demo.wait(DEADLINE_S) == 0, log.read_text()
    assert scored(run) == after
    assert json.loads((run / "train" / "result.json").read_text()) == result
    assert (run / "export" / "model.safetensors").stat().st_mtime_ns == weights


ENTRY_POINTS = {
    "train.py": ("train", "slm.training.config", "read_config"),
    "search": ("search", "search.config", "read_config"),
    "search.operator_study": ("operator_study", "search.operator_study_config", "read_config"),
    "search.depth_width": ("depth_width", "search.depth_width_config", "read_config"),
    "latency": ("latency", "latency.__main__", "check"),
    "latency.show": ("show", "latency.show", "check"),
    "slm.hub.export": ("export", "slm.hub.export", "_check"),
    "slm.evaluate": ("evaluate", "slm.evaluate", "_check"),
    "slm.generate": ("generate", "slm.generate", "_check"),
}


def test_the_commands_of_the_readme_are_good(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command composes, and its config passes all the checks it would pass when run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("A person's own text.")
    models = tmp_path / "runs/demo/frontier/model"
    models.mkdir(parents=True)
    shutil.copy(root / "configs/model/tiny.yaml", models / "0123456789ab.yaml")
    for name in ("train", "demo_train"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoints/last.ckpt").touch()

    commands = page_commands(root / "README.md")
    assert {shlex.split(c)[-1] for c in commands if c.startswith("make")} == {"demo", "test"}
    programs = [shlex.split(c.replace("<digest>", "0123456789ab")) for c in commands]
    programs = [words for words in programs if words[0] == "python"]
    assert len(programs) >= 8
    for _, *words in programs:
        name = words[1] if words[0] == "-m" else words[0]
        arguments = words[2:] if words[0] == "-m" else words[1:]
        config_name, module, function = ENTRY_POINTS[name]
        check = getattr(importlib.import_module(module), function)
        config_dir = None
        if "--config-dir" in arguments:
            place = arguments.index("--config-dir")
            config_dir = Path(arguments[place + 1])
            del arguments[place : place + 2]
        multirun = "-m" in arguments
        overrides = [argument for argument in arguments if argument != "-m"]
        if name == "slm.evaluate":
            overrides = [as_hydra_wants(each) for each in overrides]
        configs: list[DictConfig] = compose(
            config_name, overrides, config_dir=config_dir, multirun=multirun
        )
        assert len(configs) > 1 if multirun else len(configs) == 1
        for config in configs:
            with open_dict(config):
                del config["hydra"]
            check(config)
        if name == "slm.hub.export":
            (tmp_path / "runs/demo/export").mkdir(exist_ok=True)
