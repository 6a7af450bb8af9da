"""What is shipped to train with: every config composes and builds, and the command line works."""

import csv
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from programs import run_program

from slm.architecture import Architecture
from slm.config import CONFIG_DIR, ConfigError, compose, read
from slm.model import LanguageModel
from slm.model_config import BlockConfig
from slm.training.config import TrainConfig, read_config
from slm.training.fit import fit

ROOT = Path(__file__).parent.parent
GPT2_SIZE = 50257


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    (config,) = compose("train", overrides)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def config_of(*overrides: str) -> TrainConfig:
    return read(TrainConfig, composed(*overrides))


def architecture_of(*overrides: str) -> Architecture:
    return config_of(*overrides).model.architecture(4096)


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda path: path.stem)
def test_each_file_begins_with_its_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    # Hydra wants the package on the first line.
    command = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert command.startswith("# python ")
    assert yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", options("model"))
def test_models_build(name: str) -> None:
    architecture = architecture_of(f"model={name}")
    with torch.device("meta"):
        model = LanguageModel(architecture)
    assert architecture.parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("nemotron_flash_1b", 965_389_440, "DFMFAFMFDFMFAFMFDFMFDFMF"),
        ("nemotron_flash_3b", 2_749_998_624, 3 * "DFMFAFMF" + 3 * "DFMF"),
    ],
)
def test_nemotron_flash_is_the_released_one(name: str, parameters: int, layers: str) -> None:
    architecture = architecture_of(f"model={name}")
    assert architecture.parameters() == parameters
    letters = {"deltanet": "D", "mamba2": "M", "attention": "A", "ffn": "F"}
    assert "".join(letters[operator.name] for operator in architecture.operators) == layers
    assert (architecture.vocab_size, architecture.meta_tokens) == (131072, 256)
    assert architecture.normalize_logits
    assert architecture.tie_embeddings


@pytest.mark.parametrize(
    ("name", "width", "heads", "kv_heads", "in_proj_rows", "channels"),
    [
        ("nemotron_flash_1b", 2048, 16, 4, 8512, 4352),
        ("nemotron_flash_3b", 3072, 24, 6, 12640, 6400),
    ],
)
def test_nemotron_flash_has_the_released_shapes(
    name: str, width: int, heads: int, kv_heads: int, in_proj_rows: int, channels: int
) -> None:
    with torch.device("meta"):
        model = LanguageModel(architecture_of(f"model={name}"))
    assert model.embedding.weight.shape == (131072, width)
    assert model.meta_tokens.shape == (256, width)
    inner = 2 * width
    # Matrices that read the same input lie below one another here: q, k, v; gate and up.
    expected = {
        "deltanet": {
            "qkv_proj.weight": (3 * width, width),
            "o_proj.weight": (width, width),
            "beta_proj.weight": (heads, width),
            "convolution.weight": (3 * width, 1, 4),
            "o_norm.weight": (128,),
        },
        "mamba2": {
            "in_proj.weight": (in_proj_rows, width),
            "convolution.weight": (channels, 1, 4),
            "convolution.bias": (channels,),
            "A_log": (inner // 64,),
            "D": (inner // 64,),
            "dt_bias": (inner // 64,),
            "norm.weight": (inner,),
            "out_proj.weight": (width, inner),
        },
        "attention": {
            "qkv_proj.weight": (width + 2 * kv_heads * 128, width),
            "o_proj.weight": (width, width),
        },
        "ffn": {
            "gate_up_proj.weight": (2 * 3 * width, width),
            "down_proj.weight": (width, 3 * width),
        },
    }
    for layer in model.layers:
        shapes = {key: tuple(p.shape) for key, p in layer.operator.named_parameters()}
        assert shapes == expected[layer.operator.config.name]


def test_small_models_are_small() -> None:
    tiny, llama = architecture_of("model=tiny"), architecture_of("model=llama_tiny")
    assert 0.8e6 < tiny.parameters() < 1.3e6
    assert 0.8 < llama.parameters() / tiny.parameters() < 1.25
    assert {operator.name for operator in llama.operators} == {"attention", "ffn"}


@pytest.mark.parametrize("name", options("block"))
def test_blocks_go_into_a_model(name: str) -> None:
    overrides = ["model=llama_tiny", "model.width=512", f"block@model.blocks.A={name}"]
    architecture = architecture_of(*overrides)
    file = yaml.safe_load((CONFIG_DIR / "block" / f"{name}.yaml").read_text())
    expected = read(BlockConfig, file).parse()
    assert architecture.operators == expected * 6


@pytest.mark.parametrize(
    "override",
    [f"{group}={name}" for group in ("trainer", "optimizer", "logger") for name in options(group)],
)
def test_options_train(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, of few tokens, of each."""
    if override == "logger=tensorboard":
        pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"so {n} " * n for n in range(40)))
    config = config_of(
        override,
        *("data=text", f"data.files=[{tmp_path / 'text.txt'}]", f"data.cache_dir={tmp_path}"),
        *("data.validation_fraction=0.5", "tokenizer.vocab_size=300", "model.width=32"),
        *("trainer.accelerator=cpu", "trainer.precision=float32"),
        *("trainer.max_steps=2", "trainer.batch_tokens=64", "trainer.sequence_tokens=16"),
        *("trainer.micro_batch_size=2", "trainer.validation_tokens=64"),
    )
    result = fit(config, tmp_path / "run")
    assert result.steps == 2
    assert math.isfinite(result.validation_loss)


def is_for_training(experiment: str) -> bool:
    text = (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text()
    return "# python train.py" in text


@pytest.mark.parametrize("name", list(filter(is_for_training, options("experiment"))))
def test_experiments_are_read(name: str) -> None:
    config = config_of(f"experiment={name}")
    assert config.name == name
    config.model.architecture(4096)


def test_nemotron_flash_is_trained_as_published() -> None:
    """Steps of 2M tokens, 4.5T tokens at 4096, then 25B at 29,000; Adam with weight norm."""
    first = config_of("experiment=nemotron_flash_1b")
    second = config_of("experiment=nemotron_flash_1b_long")
    for stage, context, tokens in ((first, 4096, 4.5e12), (second, 29_000, 25e9)):
        assert stage.trainer.sequence_tokens == context
        assert stage.trainer.batch_tokens == pytest.approx(2.1e6, rel=0.01)
        assert stage.trainer.max_steps * stage.trainer.batch_tokens == pytest.approx(
            tokens, rel=0.01
        )
        assert (stage.optimizer.name, stage.optimizer.weight_decay) == ("adam", 0)
        assert stage.optimizer.weight_norm
    assert first.optimizer.lr == 1e-3
    assert second.optimizer.lr == pytest.approx(first.optimizer.lr * first.optimizer.min_lr_ratio)
    assert second.init_from == Path("runs") / first.name / "checkpoints" / "last.ckpt"
    assert first.model == second.model


@pytest.mark.parametrize("launcher", options("hydra/launcher"))
def test_launchers_compose(launcher: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    jobs = compose("train", [f"hydra/launcher={launcher}", "model.depth=2,4"], multirun=True)
    assert [job.model.depth for job in jobs] == [2, 4]
    assert jobs[0].hydra.runtime.choices["hydra/launcher"] == launcher


def test_a_missing_first_stage_is_named() -> None:
    with pytest.raises(ConfigError, match=r"init_from: 'nowhere\.ckpt' does not exist"):
        read_config(composed("init_from=nowhere.ckpt"))


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program(ROOT / "train.py", *arguments, folder=folder)


def test_a_typo_costs_nothing(tmp_path: Path) -> None:
    done = train(
        tmp_path, "model.width=100", "trainer.max_stepz=3", "model.blocks.A.operators=[atention]"
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert "error: trainer.max_stepz: unknown field; did you mean 'max_steps'?" in lines
    assert any("atention" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_gives_a_table(tmp_path: Path) -> None:
    words = "so the sea and the sun and the moon and the storm go on and on "
    text = "\n<|endoftext|>\n".join(words * (2 + number) for number in range(30))
    (tmp_path / "text.txt").write_text(text)
    arguments = ["experiment=smoke", "data=text", "data.files=[text.txt]", "name=sweep"]
    arguments += ["tokenizer.vocab_size=300", "trainer.max_steps=2", "model.width=32"]
    done = train(tmp_path, "-m", *arguments, "model.depth=1,2")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "runs/sweep/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["status"], row["model.depth"]) for row in rows] == [
        ("0", "finished", "1"),
        ("1", "finished", "2"),
    ]
    for row in rows:
        result = json.loads((tmp_path / "runs/sweep" / row["job"] / "result.json").read_text())
        assert float(row["bits_per_byte"]) == result["bits_per_byte"]
    assert rows[0]["digest"] != rows[1]["digest"]


def test_a_job_that_fails_costs_a_sweep_only_itself(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"so {n} " * n for n in range(40)))
    arguments = ["experiment=smoke", "data=text", "data.files=[text.txt]", "name=sweep"]
    arguments += ["tokenizer.vocab_size=300", "trainer.max_steps=2", "model.width=32"]
    arguments += ["trainer.batch_tokens=65536", "data.validation_fraction=0.5"]
    # The first asks for longer rows than the text.
    rows = "trainer.sequence_tokens=65536,64"
    done = train(tmp_path, "-m", *arguments, rows)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    first, second = done.stderr.splitlines()[-2:]
    assert first == "error: 1 of 2 jobs failed; the same command does them again"
    assert second.startswith(
        "error: job 0 (trainer.sequence_tokens=65536): trainer.sequence_tokens:"
    )
    with (tmp_path / "runs/sweep/results.csv").open(newline="") as file:
        failed, finished = csv.DictReader(file)
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert second.endswith(failed["error"])

    # What is mended is done again, and its failure forgotten.
    done = train(tmp_path, "-m", *arguments, "trainer.sequence_tokens=128,64")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("error.txt"))


def test_sweeps_that_would_start_themselves_again_are_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    done = train(tmp_path, "-m", "trainer.devices=2", "model.depth=1,2")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: trainer.devices: a sweep of jobs with 2 devices each needs")
    assert "--nproc-per-node=2" in line
    assert "hydra.launcher.tasks_per_node=2" in line
    done = train(tmp_path, "hydra/launcher=local")
    assert done.returncode == 2
    assert done.stderr == ("error: hydra/launcher: 'local' launches the jobs of a sweep; add -m\n")
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_a_sweep_run_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"so {n} " * n for n in range(40)))
    arguments = ["experiment=smoke", "data=text", "data.files=[text.txt]", "name=sweep"]
    arguments += ["tokenizer.vocab_size=300", "trainer.max_steps=2", "model.width=32"]
    arguments += ["data.validation_fraction=0.5"]
    local = ["hydra/launcher=local", "hydra.launcher.n_jobs=2", "trainer.threads=1"]
    done = train(tmp_path, "-m", *arguments, *local, "model.depth=1,2")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "runs/sweep/results.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished"] * 2
