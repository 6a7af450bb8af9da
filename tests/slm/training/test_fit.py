"""Runs: they learn, repeat, and go on after any stop as if there had been none."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slm.config import ConfigError
from slm.training import files
from slm.training.checkpoint import load_checkpoint
from slm.training.config import TrainConfig
from slm.training.fit import RESULT_FILE, TrainResult, fit
from slm.training.module import TrainingModule
from slm.training.signals import STOPPING

ConfigMaker = Callable[..., TrainConfig]
# Time and memory are not reproducible.
TIMES = ("seconds", "tokens_per_s", "data_share", "memory_bytes")


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without their times."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in row.items() if key not in TIMES}
            for row in csv.DictReader(file)
        ]


def losses(run_dir: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(run_dir) if row["loss"]]


def saved(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def run(make_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing has interrupted."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    fit(make_config(), run_dir)
    return run_dir


# Of one x86-64 CPU with torch 2.13; another rounds otherwise, so a tolerance.
GOLDEN_LOSSES = [
    5.717386245727539,
    5.656042098999023,
    5.294848442077637,
    4.907227516174316,
    4.560641288757324,
    4.285025119781494,
    4.096597671508789,
    3.9250426292419434,
]


def test_golden_losses(run: Path) -> None:
    assert losses(run) == pytest.approx(GOLDEN_LOSSES, rel=1e-5)


def test_it_learns(run: Path) -> None:
    validations = [float(row["validation_loss"]) for row in rows(run) if row["validation_loss"]]
    # After steps 3 and 6, and at the end.
    assert len(validations) == 3
    assert validations[0] > validations[1] > validations[2]
    assert losses(run)[-1] < losses(run)[0] - 0.5


def test_what_a_run_leaves(run: Path, make_config: ConfigMaker) -> None:
    result = json.loads((run / "result.json").read_text())
    model, tokenizer_file = load_checkpoint(run)
    assert result["architecture"] == str(model.architecture)
    assert result["digest"] == model.architecture.digest
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["steps"] == 8
    # 2 sequences of 24 tokens, twice per step.
    assert result["tokens"] == 8 * 96 == int(rows(run)[-1]["tokens"])
    assert result["validation_loss"] == float(rows(run)[-1]["validation_loss"])
    assert result["bits_per_byte"] == float(rows(run)[-1]["bits_per_byte"])
    assert json.loads(tokenizer_file.read_text())["model"]["type"] == "BPE"
    assert saved(run)["global_step"] == 8
    assert [float(row["lr"]) for row in rows(run)[:3]] == pytest.approx([0.005, 0.01, 0.01])
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "metrics.csv",
        "result.json",
        "samples.jsonl",
        "tokenizer.json",
    }


def test_the_first_loss_is_that_of_the_first_rows(run: Path, make_config: ConfigMaker) -> None:
    """The mean over an accumulated step, not one batch's share of it."""
    assert losses(run)[0] == pytest.approx(5.7, abs=0.1)


def assert_same(resumed_dir: Path, whole_dir: Path) -> None:
    """Bit for bit: metrics, weights, optimizer."""
    assert rows(resumed_dir) == rows(whole_dir)
    whole, resumed = saved(whole_dir), saved(resumed_dir)
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
    for index, state in whole["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, resumed["optimizer_states"][0]["state"][index][key])


def stop_at(step: int, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen in the middle of a step, once."""
    original = TrainingModule.training_step
    waiting = [True]

    def training_step(self: TrainingModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if waiting and self.trainer.global_step == step:
            waiting.clear()
            stop()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)


def crash() -> None:
    raise RuntimeError("out of memory")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def preempt() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize(
    ("stop", "error", "saved_step"),
    [
        (crash, RuntimeError, 4),
        (interrupt, KeyboardInterrupt, 7),
        (terminate, SystemExit, 7),
        (preempt, SystemExit, 7),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    run: Path,
    make_config: ConfigMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: Callable[[], None],
    error: type[BaseException],
    saved_step: int,
) -> None:
    config = make_config()
    handlers = [signal.getsignal(number) for number in STOPPING]
    stop_at(6, stop, monkeypatch)
    with pytest.raises(error) as caught:
        fit(config, tmp_path)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143
    assert [signal.getsignal(number) for number in STOPPING] == handlers
    assert not (tmp_path / "result.json").exists()
    assert saved(tmp_path)["global_step"] == saved_step

    result = fit(config, tmp_path)
    assert_same(tmp_path, run)
    assert (
        result.validation_loss == json.loads((run / "result.json").read_text())["validation_loss"]
    )


def test_a_finished_run_is_not_trained_again(
    run: Path, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    stop_at(0, crash, monkeypatch)
    result = fit(make_config(), run)
    assert isinstance(result, TrainResult)
    assert result.steps == 8
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_finish_that_was_cut_off_is_made_up_for(run: Path, make_config: ConfigMaker) -> None:
    """All steps are done and saved, but the result was not written."""
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    again = fit(make_config(), run)
    assert again.validation_loss == result["validation_loss"]
    assert again.steps == 8
    assert json.loads((run / "result.json").read_text())["tokens"] == result["tokens"]


def test_a_folder_of_another_run_is_refused(
    run: Path, make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_config(optimizer={"lr": 0.02}, trainer={"batch_tokens": 144})
    with pytest.raises(ConfigError) as caught:
        fit(other, run)
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "optimizer.lr",
        "trainer.batch_tokens",
    ]
    assert "was begun with 0.01, not 0.02" in caught.value.problems[0]

    stop_at(6, crash, monkeypatch)
    with pytest.raises(RuntimeError):
        fit(make_config(), tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        fit(other, tmp_path)
    # What decides nothing may change.
    fit(make_config(trainer={"log_every_steps": 2}), tmp_path)


def test_starting_afresh_equals_the_first_time(
    run: Path, make_config: ConfigMaker, tmp_path: Path
) -> None:
    fit(make_config(optimizer={"lr": 0.02}), tmp_path)
    fit(make_config(resume="never"), tmp_path)
    assert rows(tmp_path) == rows(run)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def flip(file: Path) -> None:
    """One bit of the largest tensor."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + largest.file_size // 2 + 200] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken(
    run: Path,
    make_config: ConfigMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    folder = tmp_path / "checkpoints"
    damage(folder / "last.ckpt")
    damaged = (folder / "last.ckpt").read_bytes()
    fit(make_config(), tmp_path)
    assert (folder / "damaged.ckpt").read_bytes() == damaged
    said = capsys.readouterr().out
    assert "checkpoints/last.ckpt': " in said
    assert "going on from" in said
    assert_same(tmp_path, run)

    (tmp_path / "result.json").unlink()
    for file in folder.iterdir():
        damage(file)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError) as caught:
        fit(make_config(), tmp_path)
    assert [line.partition("'")[2].partition("'")[0] for line in caught.value.problems] == [
        str(folder / name) for name in ("last.ckpt", "previous.ckpt")
    ]
    # Nothing is lost: somebody may know better what to do with them.
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(
    make_config: ConfigMaker, tmp_path: Path, loader_workers: int
) -> None:
    """SIGKILL, again and again, at moments that differ; mid-epoch and within accumulated steps."""
    trainer = {"max_steps": 40, "checkpoint_every_steps": 3, "loader_workers": loader_workers}
    config = make_config(trainer=trainer)
    fit(config, tmp_path / "whole")
    context, kills, pause_s = multiprocessing.get_context("fork"), 0, 0.05
    while not (tmp_path / "killed" / "result.json").exists():
        process = context.Process(target=fit, args=(config, tmp_path / "killed"))
        process.start()
        process.join(pause_s)
        if process.is_alive():
            kills += 1
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        # So that the moments differ, and each gets somewhere at last.
        pause_s *= 1.3
    assert kills > 3
    assert_same(tmp_path / "killed", tmp_path / "whole")


def test_checkpoints_hold_normalised_weights(make_config: ConfigMaker, tmp_path: Path) -> None:
    optimizer = {"name": "adam", "weight_decay": 0.0, "weight_norm": True}
    fit(make_config(optimizer=optimizer, trainer={"max_steps": 2}), tmp_path)
    weights = saved(tmp_path)["state_dict"]
    for name, axis in {
        "model.layers.0.operator.qkv_proj.weight": 1,
        "model.layers.0.operator.o_proj.weight": 0,
        "model.layers.2.operator.in_proj.weight": 1,
        "model.layers.3.operator.o_proj.weight": 0,
    }.items():
        norm = weights[name].norm(dim=axis)
        torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-5, rtol=0)
    assert weights["model.embedding.weight"].norm(dim=1).max() < 0.9


def test_a_second_stage_starts_from_the_first(
    run: Path, make_config: ConfigMaker, tmp_path: Path
) -> None:
    """Longer sequences, a new schedule, the weights of an earlier run."""
    trainer = {"sequence_tokens": 48, "micro_batch_size": 1, "max_steps": 2}
    config = make_config(init_from=str(run), trainer=trainer, optimizer={"lr": 1e-3})
    fit(config, tmp_path)
    assert losses(tmp_path)[0] < losses(run)[0] - 0.5
    wider = make_config(init_from=str(run), model={"meta_tokens": 3})
    with pytest.raises(ConfigError, match=r"init_from: .*meta_tokens=2 .* not .*meta_tokens=3"):
        fit(wider, tmp_path / "wider")
    other = make_config(
        init_from=str(run), tokenizer={"vocab_size": 280}, model={"vocab_size": 300}
    )
    with pytest.raises(ConfigError, match="another tokenizer"):
        fit(other, tmp_path / "other")


def test_a_time_budget_ends_the_run(make_config: ConfigMaker, tmp_path: Path) -> None:
    trainer = {"max_steps": 1_000_000, "max_seconds": 1.0, "validate_every_steps": 1_000_000}
    result = fit(make_config(trainer=trainer), tmp_path)
    assert 0 < result.steps < 1_000_000
    rates = [float(row["lr"]) for row in rows(tmp_path) if row["lr"]]
    # Annealed to the end of the time, which is nowhere near that of the steps.
    assert rates[-1] < 0.5 * max(rates)


def test_a_loss_that_is_not_finite_ends_the_run(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def training_step(self: TrainingModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["tokens"]).sum() * float("nan")

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        fit(make_config(), tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_one_step_that_is_not_finite_is_left_out(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if batch_idx == 5 else loss

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    result = fit(make_config(trainer={"log_every_steps": 2}), tmp_path)
    assert result.steps == 8
    # Batches 4 and 5 are those of step 2.
    skipped = [float(row["skipped_steps"]) for row in rows(tmp_path) if row["skipped_steps"]]
    assert skipped == [0, 1, 1, 1]
    assert all(torch.isfinite(weight).all() for weight in saved(tmp_path)["state_dict"].values())
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3


def test_weights_and_biases_offline(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    # As after another job of a sweep: what is set in the environment from here on is not read.
    wandb.setup()
    config = make_config(logger={"name": "wandb", "offline": True}, trainer={"max_steps": 2})
    fit(config, tmp_path)
    assert "WANDB_MODE" not in os.environ
    # Its process writes the file, and may still do so after a run's end.
    wandb.teardown()
    (offline,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = offline.read_bytes()
    assert b"bits_per_byte" in content
    assert b"optimizer.lr" in content
    assert len(losses(tmp_path)) == 2

    # A run that goes on is the same one there; one that begins anew is another.
    (tmp_path / RESULT_FILE).unlink()
    fit(config, tmp_path)
    first = (tmp_path / "wandb_id").read_text()
    fit(replace(config, resume="never"), tmp_path)
    wandb.teardown()
    ids = [path.stem for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))]
    again = (tmp_path / "wandb_id").read_text()
    assert first != again
    assert sorted(ids) == sorted([f"run-{first}", f"run-{first}", f"run-{again}"])


def test_a_split_shorter_than_a_row_is_refused_before_anything_is_written(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    long = {"sequence_tokens": 10**5, "batch_tokens": 10**5, "micro_batch_size": None}
    config = make_config(trainer=long)
    with pytest.raises(ConfigError) as caught:
        fit(config, tmp_path)
    assert len(caught.value.problems) == 2
    # Nor removed.
    (tmp_path / RESULT_FILE).write_text("{}")
    with pytest.raises(ConfigError):
        fit(replace(config, resume="never"), tmp_path)
    (tmp_path / RESULT_FILE).unlink()
    for problem, split in zip(caught.value.problems, ("train", "validation"), strict=True):
        assert problem.startswith("trainer.sequence_tokens: 100000 and the target")
        assert problem.endswith(f"tokens of the {split} split")
    assert not list(tmp_path.iterdir())


def test_bfloat16_trains_nearly_alike(run: Path, make_config: ConfigMaker, tmp_path: Path) -> None:
    fit(make_config(trainer={"precision": "bfloat16", "max_steps": 4}), tmp_path)
    assert losses(tmp_path)[0] != losses(run)[0]
    assert losses(tmp_path)[0] == pytest.approx(losses(run)[0], rel=1e-2)
    # Weights stay in float32.
    assert {weight.dtype for weight in saved(tmp_path)["state_dict"].values()} == {torch.float32}


def test_two_commands_do_not_train_in_one_folder_at_the_same_time(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with (
        files.alone(tmp_path),
        pytest.raises(ConfigError, match="name: another command is at work in"),
    ):
        fit(make_config(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
