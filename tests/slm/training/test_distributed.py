"""Two processes compute what one computes, and their sharded checkpoints are as good as files."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program

from slm.config import ConfigError
from slm.training import sharded_checkpoint
from slm.training.checkpoint import load_checkpoint, read_checkpoint

ROOT = Path(__file__).parents[3]
STRATEGIES = ("ddp", "fsdp")
TRAINER = {
    "max_steps": 6,
    "batch_tokens": 96,
    "sequence_tokens": 24,
    "validate_every_steps": 3,
    # Batches that two processes cannot share evenly.
    "validation_tokens": 120,
    "checkpoint_every_steps": 3,
    "log_every_steps": 1,
    "accelerator": "cpu",
    "precision": "float32",
}
RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def train(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunCommand:
    """Run `train.py` in a folder of runs, under torchrun for several processes."""
    folder = tmp_path_factory.mktemp("distributed")

    def run(name: str, devices: int, *overrides: str) -> "subprocess.CompletedProcess[str]":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        command = [
            *([sys.executable, *launcher] if devices > 1 else [sys.executable]),
            str(ROOT / "train.py"),
            f"name={name}",
            f"trainer.devices={devices}",
            "data=text",
            f"data.files=[{text_file}]",
            "data.validation_fraction=0.25",
            f"data.cache_dir={text_file.parent / 'cache'}",
            "tokenizer.vocab_size=300",
            "model.width=32",
            "optimizer=adam_weight_norm",
            *(f"trainer.{field}={value}" for field, value in TRAINER.items()),
            *overrides,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        result.run_dir = folder / "runs" / name  # type: ignore[attr-defined]
        return result

    return run


@pytest.fixture(scope="module")
def runs(train: RunCommand) -> dict[str, Path]:
    """The folder of a run by one process, of two with accumulation, and of each strategy."""
    found = {}
    for name, devices, overrides in (
        ("one", 1, ()),
        ("accumulated", 1, ("trainer.micro_batch_size=1",)),
        ("ddp", 2, ("trainer.strategy=ddp",)),
        ("fsdp", 2, ("trainer.strategy=fsdp",)),
    ):
        result = train(name, devices, *overrides)
        assert result.returncode == 0, result.stderr
        found[name] = result.run_dir  # type: ignore[attr-defined]
    return found


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run_dir: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(run_dir) if row[name]]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(run_dir / "checkpoints/last.ckpt")
    return checkpoint["state_dict"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["accumulated", *STRATEGIES])
def test_equals_one_process(runs: dict[str, Path], name: str) -> None:
    one, other = runs["one"], runs[name]
    for column in ("loss", "validation_loss"):
        assert len(losses(one, column)) in (2, 6)
        assert losses(other, column) == pytest.approx(losses(one, column), rel=1e-5), column
    expected = weights(one)
    found = weights(other)
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        # Adam's first steps are of the size of lr however small a gradient is.
        torch.testing.assert_close(weight, expected[key], atol=2e-4, rtol=0, msg=key)


def test_only_one_process_writes(runs: dict[str, Path]) -> None:
    for name in STRATEGIES:
        steps = [int(row["step"]) for row in rows(runs[name])]
        assert sorted(steps) == sorted([*range(1, 7), 3, 6]), name


@pytest.mark.parametrize("name", ["one", *STRATEGIES])
def test_weights_are_normalised(runs: dict[str, Path], name: str) -> None:
    state = weights(runs[name])
    reads = [key for key in state if key.endswith(("qkv_proj.weight", "gate_up_proj.weight"))]
    writes = [key for key in state if key.endswith(("o_proj.weight", "down_proj.weight"))]
    assert reads
    assert writes
    for keys, axis in ((reads, 1), (writes, 0)):
        for key in keys:
            norm = state[key].norm(dim=axis)
            torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-5, rtol=0, msg=key)


def test_a_sharded_run_goes_on_as_if_it_had_not_been_stopped(
    runs: dict[str, Path], train: RunCommand
) -> None:
    whole = runs["fsdp"]
    stopped = whole.with_name("stopped")
    shutil.copytree(whole, stopped)
    (stopped / "result.json").unlink()
    # Of step 6; what is damaged is named, and the one of step 3 taken.
    shard = next((stopped / "checkpoints/last.ckpt").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    result = train("stopped", 2, "trainer.strategy=fsdp")
    assert result.returncode == 0, result.stderr
    assert f"last.ckpt/{shard.name}': is missing or damaged" in result.stdout
    for column in ("loss", "validation_loss"):
        assert losses(stopped, column) == pytest.approx(losses(whole, column), rel=1e-6)
    for key, weight in weights(whole).items():
        torch.testing.assert_close(weights(stopped)[key], weight, atol=1e-6, rtol=1e-5, msg=key)


def test_a_sharded_checkpoint_is_read_like_a_file(runs: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer_file = load_checkpoint(runs["fsdp"])
    assert json.loads(tokenizer_file.read_text())["model"]["type"] == "BPE"
    folder = runs["fsdp"] / "checkpoints/last.ckpt"
    file = tmp_path / "checkpoints" / "model.ckpt"
    file.parent.mkdir()
    done = run_program("-m", "slm.training.sharded_checkpoint", folder, file, folder=ROOT)
    assert done.returncode == 0, done.stderr
    again, _ = load_checkpoint(file)
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(again(tokens), model(tokens))


class Payload:
    """What a pickle can do when it is loaded without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (".metadata", pickle.dumps(Payload()), "names pathlib"),
        (".metadata", pickle.dumps({}), "is no index"),
        ("meta.pt", b"", "is missing or damaged"),
        ("manifest.json", b"", "is not whole"),
    ],
    ids=["code", "other", "cut", "no-manifest"],
)
def test_a_sharded_checkpoint_of_something_else_is_refused(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hostile.ckpt"
    shutil.copytree(runs["fsdp"] / "checkpoints/last.ckpt", folder)
    (folder / name).write_bytes(content)
    if name == ".metadata":
        # Whoever made it can make the manifest, too.
        sharded_checkpoint.write_manifest(folder)
    with pytest.raises(ConfigError, match=rf"hostile\.ckpt.*{problem}"):
        load_checkpoint(folder)
    assert not Path("touched").exists()
