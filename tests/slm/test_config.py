"""Configs are read whole: every problem is named, and a bad command line leaves nothing behind."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from slm import config as config_module
from slm.config import ConfigError, compose, entry_point, read, schema


@schema
class Inner:
    steps: Annotated[int, Field(gt=0)]
    kind: Literal["red", "blue"] = "red"
    sizes: tuple[int, ...] = ()
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.steps == 7:
            raise ConfigError(["steps: seven is taken", "kind: so is red"])
        if self.steps == 8:
            raise ValueError("eight does not go")


@schema
class Outer:
    trainer: Inner
    other: Inner | None = None
    blocks: dict[str, Inner] = Field(default_factory=dict)
    name: str = "x"


def problems_of(values: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(Outer, values)
    return caught.value.problems


def test_values_are_converted_and_frozen() -> None:
    node = OmegaConf.create(
        {"trainer": {"steps": 3, "sizes": [1, 2], "rate": 1}, "name": 12, "blocks": {"A": "${b}"}}
    )
    node["b"] = {"steps": 4}
    with pytest.raises(ConfigError, match="b: unknown field"):
        read(Outer, node)
    del node["b"]
    node.blocks = {"A": {"steps": "${trainer.steps}"}}
    result = read(Outer, node)
    assert result == Outer(
        trainer=Inner(steps=3, sizes=(1, 2), rate=1.0), name="12", blocks={"A": Inner(steps=3)}
    )
    with pytest.raises(AttributeError):
        result.name = "y"  # type: ignore[misc]


def test_every_problem_is_named_once() -> None:
    found = problems_of(
        {
            "trainer": {"steps": -1, "kind": "green", "sizes": [1, "q"], "rate": float("nan")},
            "othr": {},
            "blocks": {"A": {"step": 1}},
        }
    )
    assert sorted(found) == sorted(
        [
            "trainer.steps: must be greater than 0, got -1",
            "trainer.kind: must be 'red' or 'blue', got 'green'",
            "trainer.sizes[1]: must be a valid integer, unable to parse string as an integer, "
            "got 'q'",
            "trainer.rate: must be a finite number, got nan",
            "blocks.A.steps: is missing, give it a value",
            "blocks.A.step: unknown field; did you mean 'steps'?",
            "othr: unknown field; did you mean 'other'?",
        ]
    )


def test_problems_of_a_dataclass_keep_their_place() -> None:
    found = problems_of({"trainer": {"steps": 7}, "other": {"steps": 8}})
    assert found == [
        "trainer.steps: seven is taken",
        "trainer.kind: so is red",
        "other: eight does not go",
    ]


def test_what_is_left_open_is_missing() -> None:
    node = OmegaConf.create({"trainer": {"steps": "???", "sizes": ["???"]}, "name": "???"})
    with pytest.raises(ConfigError) as caught:
        read(Outer, node)
    assert caught.value.problems == [
        "trainer.steps: is missing, give it a value",
        "trainer.sizes[0]: is missing, give it a value",
        "name: is missing, give it a value",
    ]
    with pytest.raises(ConfigError, match="nowhere"):
        read(Outer, OmegaConf.create({"trainer": {"steps": "${nowhere}"}}))


APP = """
defaults: [{model: small}, _self_]
trainer: {steps: 3, rate: 0.5}
name: app
hydra:
  run: {dir: "runs/${name}"}
  sweep: {dir: "runs/${name}", subdir: "${hydra.job.num}"}
"""


@schema
class AppConfig:
    trainer: Inner
    model: dict[str, int]
    name: str


def check(config: DictConfig) -> AppConfig:
    result = read(AppConfig, config)
    if result.model["width"] % 2:
        raise ValueError(f"model.width: {result.model['width']} is odd")
    return result


Program = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Program:
    """Run a command line in an empty folder: exit code, and what it says on stderr."""
    configs = tmp_path / "configs"
    (configs / "model").mkdir(parents=True)
    (configs / "app.yaml").write_text(APP)
    (configs / "model" / "small.yaml").write_text("{width: 4, depth: 2}")
    (configs / "model" / "broken.yaml").write_text("{width: [")
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(config_module, "CONFIG_DIR", configs)
    monkeypatch.chdir(tmp_path / "work")

    @entry_point("app", check)
    def main(config: DictConfig) -> int:
        if config.trainer.steps == 99:
            raise ConfigError(["steps: found too late"])
        if config.trainer.steps == 98:
            raise RuntimeError("a bug")
        if config.trainer.steps == 97:
            os.kill(os.getpid(), signal.SIGINT)
        Path(f"ran-{config.trainer.steps}-{config.model.width}").touch()
        return config.trainer.steps

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
        code = 0
        try:
            run.result = main()  # type: ignore[attr-defined]
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainer.stepz=3"], ["trainer.stepz: unknown field; did you mean 'steps'?"]),
        (["trainr.steps=3"], ["trainr.steps: unknown field; did you mean 'trainer'?"]),
        (["modl=small"], ["modl: unknown field; did you mean 'model'?"]),
        (["+extra=1"], ["extra: unknown field"]),
        (["hydra.run.dirr=x"], ["hydra.run.dirr: unknown field; did you mean 'dir'?"]),
        (["model=smal"], ["model: no option 'smal'; did you mean 'small'?"]),
        (["model=zzz"], ["model: no option 'zzz'; there are: broken, small"]),
        (
            ["trainer.steps=1,2"],
            ["trainer.steps: '1,2' is a sweep; add -m to run it, or write a list as [a,b]"],
        ),
        (
            ["trainer.steps=[kda(head_dim=32)]"],
            ['trainer.steps: put quotes around what has parentheses: ["kda(…)"]'],
        ),
        (["model.width=3"], ["model.width: 3 is odd"]),
        (
            ["trainer.stepz=3", "trainer.rate=high", "model=smal", "trainer.steps=-1"],
            [
                "model: no option 'smal'; did you mean 'small'?",
                "trainer.stepz: unknown field; did you mean 'steps'?",
                "trainer.steps: must be greater than 0, got -1",
                "trainer.rate: must be a valid number, unable to parse string as a number, "
                "got 'high'",
            ],
        ),
        (
            ["-m", "trainer.steps=1,-2,5", "model.width=4,3"],
            ["model.width: 3 is odd", "trainer.steps: must be greater than 0, got -2"],
        ),
        (["-m", "model=small,smal"], ["model: no option 'smal'; did you mean 'small'?"]),
        (["--config-dir", "nowhere"], ["--config-dir: 'nowhere' is not a folder"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_command_lines(program: Program, arguments: list[str], expected: list[str]) -> None:
    code, lines = program(*arguments)
    assert code == 2
    assert lines == [f"error: {line}" for line in expected]
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["trainer.rate=[1"], ["nonsense"], ["model=broken"], ["--config-name=nowhere"]]
)
def test_what_cannot_be_parsed_takes_one_line(program: Program, arguments: list[str]) -> None:
    code, lines = program(*arguments)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert arguments[0].partition("=")[2].lstrip("[") in lines[0]
    assert list(Path().iterdir()) == []


def test_a_run_has_one_folder(program: Program) -> None:
    assert program("trainer.steps=5") == (0, [])
    assert program.result == 5  # type: ignore[attr-defined]
    assert Path("ran-5-4").exists()
    assert Path("runs/app/.hydra/config.yaml").exists()


def test_a_sweep_runs_every_job(program: Program) -> None:
    code, _ = program("-m", "trainer.steps=1,2", "model.width=2,4")
    assert code == 0
    assert {path.name for path in Path().glob("ran-*")} == {
        "ran-1-2",
        "ran-1-4",
        "ran-2-2",
        "ran-2-4",
    }
    assert all((Path("runs/app") / str(number)).is_dir() for number in range(4))


def test_own_configs_come_first(program: Program) -> None:
    own = Path("own/model")
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("{width: 8}")
    assert program("--config-dir", "own", "model=mine") == (0, [])
    assert Path("ran-3-8").exists()


def test_an_error_of_the_run_is_told_by_its_kind(program: Program) -> None:
    assert program("trainer.steps=99") == (2, ["error: steps: found too late"])
    code, lines = program("trainer.steps=98")
    assert code == 1
    assert "RuntimeError: a bug" in lines
    assert any(line.startswith("Traceback") for line in lines)
    assert program("trainer.steps=97") == (130, ["interrupted"])


def test_the_config_can_be_looked_at(program: Program) -> None:
    # What is only shown is not checked.
    assert program("--cfg", "job", "model.width=3") == (0, [])
    assert program("--help") == (0, [])
    assert program("--cfg", "job", "model.widht=3")[0] == 2
    assert list(Path().iterdir()) == []


def test_compose_gives_every_job(program: Program) -> None:
    (single,) = compose("app", ["trainer.steps=5"])
    assert single.trainer.steps == 5
    jobs = compose("app", ["trainer.steps=5,6"], multirun=True)
    assert [(job.trainer.steps, job.hydra.job.num) for job in jobs] == [(5, 0), (6, 1)]
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        compose("app", ["trainer.stepz=5"])
