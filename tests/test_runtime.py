"""`plugins` and `backend`, in every program and in the search's worker processes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from programs import run_program

from latency.__main__ import check as check_latency
from latency.device import Device
from search.config import read_config as read_search_config
from search.worker import JobError, Worker
from slm.config import ConfigError, compose, read
from slm.generate import GenerateConfig
from slm.kernels.backend import current_backend, set_backend
from slm.operators import parse_operator
from slm.runtime import Runtime, RuntimeConfig
from slm.training.config import read_config as read_train_config

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
from slm.operators.base import Operator, OperatorConfig, register

@dataclass(frozen=True)
class MineConfig(OperatorConfig):
    name: ClassVar[str] = "mine"

    def problems(self, width):
        return []

    parameters = flops_per_token = state_bytes = lambda *_: 0

@register(MineConfig)
class Mine(Operator):
    scan = step = init_state = lambda *_: None
"""


@pytest.fixture
def file(tmp_path: Path, _no_plugins: None) -> Path:
    (tmp_path / "my_operator.py").write_text(SOURCE)
    return tmp_path / "my_operator.py"


@pytest.fixture(autouse=True)
def _same_backend_afterwards() -> Iterator[None]:
    yield
    set_backend("auto")


def composed(name: str, *overrides: str) -> DictConfig:
    (config,) = compose(name, overrides)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def test_plugins_are_imported_before_the_operators_are_read(file: Path) -> None:
    overrides = [f"plugins=[{file}]", "model.blocks.A.operators=[mine,ffn]"]
    config = read_train_config(composed("train", *overrides))
    assert config.model.operators()[0].name == "mine"
    assert set(config.identity()) >= {"plugins.my_operator"}


def test_a_mistake_in_a_plugin_is_all_that_is_said(file: Path) -> None:
    file.write_text("raise RuntimeError('why')")
    overrides = [f"plugins=[{file}]", "model.blocks.A.operators=[mine,ffn]", "model.depth=0"]
    with pytest.raises(ConfigError) as caught:
        read_train_config(composed("train", *overrides))
    assert caught.value.problems == [f"plugins: '{file}': line 1: RuntimeError: why"]
    with pytest.raises(ConfigError) as caught:
        read(GenerateConfig, {"checkpoint": str(file), "plugins": "my_operator.py"})
    assert caught.value.problems == [
        "plugins: must be a list, [my_operator.py], got 'my_operator.py'"
    ]


@pytest.mark.parametrize("program", ["train.py", "search", "latency", "slm.generate"])
def test_programs_refuse_before_they_write(root: Path, tmp_path: Path, program: str) -> None:
    start = [str(root / program)] if program == "train.py" else ["-m", program]
    more = ["checkpoint=."] if program == "slm.generate" else []
    arguments = [*start, "plugins=[nowhere.py]", *more]
    done = run_program(*arguments, folder=tmp_path, environment={"PYTHONPATH": str(root)})
    assert done.returncode == 2
    assert done.stderr == "error: plugins: 'nowhere.py': no such file\n"
    assert list(tmp_path.iterdir()) == []


def test_fla_is_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    generate = {"checkpoint": str(tmp_path / "file"), "backend": "fla", "device": "cpu"}
    attempts = [
        lambda: read_train_config(composed("train", "backend=fla", "trainer.accelerator=cpu")),
        lambda: check_latency(composed("latency", "backend=fla", "device=cpu")),
        lambda: read(GenerateConfig, generate),
    ]
    if not torch.cuda.is_available():
        attempts.append(lambda: read_search_config(composed("search", "backend=fla")))
    for attempt in attempts:
        with pytest.raises(ConfigError) as caught:
            attempt()
        (problem,) = caught.value.problems
        assert problem.startswith("backend: 'fla' needs tensors on a CUDA device")


def test_the_backend_is_part_of_the_identities() -> None:
    default, torch_forms = (
        read_search_config(composed("search", f"backend={name}")) for name in ("auto", "torch")
    )
    assert default.identity()["backend"] == "auto"
    assert torch_forms.identity()["backend"] == "torch"
    _, _, device = check_latency(composed("latency", "device=cpu"))
    _, _, other = check_latency(composed("latency", "device=cpu", "backend=torch"))
    assert (device.backend, other.backend) == ("auto", "torch")
    assert device.key != other.key
    assert Device.current(threads=1, kind="cpu").key == other.key


@dataclass(frozen=True)
class Target:
    """A job for another process."""

    runtime: Runtime

    def parse(self, text: str, report: object) -> tuple[int, str, str]:
        self.runtime.apply()
        return os.getpid(), str(parse_operator(text)), current_backend()


def test_a_worker_process_computes_with_the_same_operators_and_kernels(file: Path) -> None:
    runtime = RuntimeConfig(plugins=(str(file),), backend="torch").runtime()
    worker = Worker(Target(runtime))
    pid, text, backend = worker.run("parse", "mine", time_limit_s=60)
    assert pid != os.getpid()
    assert (text, backend) == ("mine", "torch")
    # The next process would import another operator than the first did.
    worker.close()
    file.write_text(SOURCE + "# changed\n")
    with pytest.raises(JobError, match="plugins: my_operator has changed since the start"):
        worker.run("parse", "mine", time_limit_s=60)
    worker.close()
