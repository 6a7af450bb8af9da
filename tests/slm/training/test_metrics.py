"""What a run records of itself, against the same figures computed by hand."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from slm.architecture import Architecture
from slm.config import ConfigError
from slm.data import prepare
from slm.data.dataset import PackedDataset
from slm.model import LanguageModel
from slm.training.config import TrainConfig
from slm.training.fit import fit
from slm.training.loggers import MetricsFile
from slm.training.metrics import Metrics
from slm.training.module import TrainingModule
from slm.training.norms import parameters_by_kind
from slm.training.throughput import training_flops_per_token

ConfigMaker = Callable[..., TrainConfig]
# The model of conftest.py: which of its weights are of which kind.
PREFIXES = {
    "embedding": ("embedding.",),
    "meta_tokens": ("meta_tokens",),
    "attention": ("layers.0.operator.",),
    "ffn": ("layers.1.operator.",),
    "mamba2": ("layers.2.operator.",),
    "deltanet": ("layers.3.operator.",),
    "norms": ("layers.0.norm.", "layers.1.norm.", "layers.2.norm.", "layers.3.norm.", "norm."),
}
LONG = 1_000_000


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def total_norm(tensors: dict[str, Tensor], prefixes: tuple[str, ...] = ("",)) -> float:
    chosen = [tensor for name, tensor in tensors.items() if name.startswith(prefixes)]
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in chosen))


def test_norms_are_those_of_the_step_that_closes_a_window(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients summed over both batches of the step and not yet clipped; weights after it."""
    gradients: list[dict[str, Tensor]] = []
    weights: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self: TrainingModule, optimizer: Any) -> None:
        named = self.model.named_parameters()
        gradients.append({name: each.grad.clone() for name, each in named if each.numel()})

    def on_train_batch_end(self: TrainingModule, *arguments: Any) -> None:
        weights.append({name: each.clone() for name, each in self.model.state_dict().items()})

    monkeypatch.setattr(TrainingModule, "on_before_optimizer_step", on_before_optimizer_step)
    monkeypatch.setattr(TrainingModule, "on_train_batch_end", on_train_batch_end)
    trainer = {"log_every_steps": 3, "max_steps": 7, "gradient_clip": 0.01}
    fit(make_config(trainer=trainer), tmp_path)
    rows = [row for row in rows_of(tmp_path) if row["loss"]]
    assert [int(row["step"]) for row in rows] == [3, 6, 7]
    for row in rows:
        step = int(row["step"])
        # Two batches per step.
        gradient, weight = gradients[step - 1], weights[2 * step - 1]
        for kind, prefixes in PREFIXES.items():
            expected = total_norm(gradient, prefixes), total_norm(weight, prefixes)
            found = float(row[f"gradient_norm/{kind}"]), float(row[f"weight_norm/{kind}"])
            assert found == pytest.approx(expected, rel=1e-5), kind
        total = float(row["gradient_norm"])
        assert total == pytest.approx(total_norm(gradient), rel=1e-5)
        assert total > 0.01
    assert {key for key in rows[0] if "_norm/" in key} == {
        f"{of}_norm/{kind}" for of in ("gradient", "weight") for kind in PREFIXES
    }


@pytest.mark.parametrize("text", ["tie_embeddings=False", "meta_tokens=3"])
def test_each_parameter_is_of_one_kind(text: str) -> None:
    operators = "attention(head_dim=16) ffn attention(head_dim=16)"
    model = LanguageModel(Architecture.parse(f"width=32 vocab_size=50 {text} | {operators}"))
    kinds = parameters_by_kind(model)
    last = {"head"} if "tie" in text else {"meta_tokens"}
    assert set(kinds) == {"embedding", "attention", "ffn", "norms"} | last
    found = [id(each) for parameters in kinds.values() for each in parameters]
    assert len(found) == len(set(found))
    assert set(found) == {id(each) for each in model.parameters() if each.numel()}
    assert len(kinds["attention"]) == 4
    assert len(kinds["norms"]) == 4


def test_a_run_on_a_cpu(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(trainer={"log_every_steps": 4, "validate_every_steps": LONG})
    fit(config, tmp_path)
    first, last, validation = rows_of(tmp_path)
    train = prepare(config.data, config.tokenizer).train
    for row in (first, last):
        nats_per_byte = float(row["loss"]) * train.num_tokens / train.num_bytes
        assert float(row["train_bits_per_byte"]) == pytest.approx(nats_per_byte / math.log(2))
        # Its weights alone are a part of what a process holds; torch takes some 100 MB.
        assert 1e8 < int(row["memory_bytes"]) < 1e11
        assert 0 < float(row["data_share"]) < 0.5
        # What a CPU could do at most is in no table.
        assert row["mfu"] == row["mfu_causal"] == row["validation_loss"] == ""
    assert validation["loss"] == validation["gradient_norm"] == ""
    assert float(validation["validation_loss"]) > 0


def test_the_time_that_data_takes_is_seen(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other: neither that of a slow step, nor that of a validation between steps."""
    get = PackedDataset.__getitem__
    original = TrainingModule.training_step
    clock = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s)

    def slow_get(self: PackedDataset, index: int) -> dict[str, Tensor]:
        clock.now_s += 0.04
        return get(self, index)

    def slow_step(self: TrainingModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        clock.now_s += 0.08
        return original(self, batch, batch_idx)

    monkeypatch.setattr("slm.training.metrics.time", clock)
    monkeypatch.setattr(PackedDataset, "__getitem__", slow_get)
    monkeypatch.setattr(TrainingModule, "training_step", slow_step)
    trainer = {"log_every_steps": 2, "max_steps": 4, "validate_every_steps": 1}
    fit(make_config(trainer=trainer), tmp_path)
    windows = [row for row in rows_of(tmp_path) if row["loss"]]
    assert len(windows) == 2
    for row in windows:
        # Two rows and a step per batch.
        assert float(row["data_share"]) == pytest.approx(0.5)
        # 4 batches of 160 ms each; with the validations it would be longer.
        assert float(row["tokens_per_s"]) == pytest.approx(192 / 0.64)


def test_mfu_where_the_peak_is_known(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Metrics.on_train_start

    def on_train_start(self: Metrics, *arguments: Any) -> None:
        begin(self, *arguments)
        self.peak_flops = 1e7

    monkeypatch.setattr(Metrics, "on_train_start", on_train_start)
    config = make_config(trainer={"max_steps": 2})
    result = fit(config, tmp_path)
    row = rows_of(tmp_path)[0]
    architecture = Architecture.parse(result.architecture)
    for name, causal in (("mfu", False), ("mfu_causal", True)):
        flops = training_flops_per_token(architecture, 24, causal=causal)
        assert float(row[name]) == pytest.approx(flops * float(row["tokens_per_s"]) / 1e7, rel=1e-3)
    assert float(row["mfu_causal"]) < float(row["mfu"])


def test_the_device_is_read_once_per_window(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each read makes the host wait until all that was asked for is done."""
    reads: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        def method(self: Tensor, *arguments: Any) -> Any:
            if self.is_floating_point():
                reads.append(name)
            return read(self, *arguments)

        return method

    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, counting(name))
    trainer = {"max_steps": 12, "log_every_steps": 4, "sample_tokens": 0}
    trainer |= {"validate_every_steps": LONG, "checkpoint_every_steps": LONG}
    fit(make_config(trainer=trainer), tmp_path)
    # Three windows; at the end a validation and a checkpoint.
    assert reads[:4] == ["tolist"] * 3 + ["item"]
    assert set(reads[4:]) <= {"cpu"}


def test_a_file_goes_on_where_the_run_does(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.begin(0, ["step", "loss", "lr"])
    for step in (1, 2, 3):
        file.log_metrics({"loss": step / 2}, step=step)
    # Of a version that did not know `tokens`, and that wrote `lr`, which this one does not.
    again = MetricsFile(file.path)
    again.begin(2, ["step", "tokens", "loss"])
    again.log_metrics({"tokens": 96, "loss": 7.5}, step=3)
    assert file.path.read_text().splitlines() == [
        "step,tokens,loss,lr",
        "1,,0.5,",
        "2,,1.0,",
        "3,96,7.5,",
    ]
    with pytest.raises(ValueError, match="los"):
        again.log_metrics({"los": 1.0}, step=4)
    # From the start nothing is left, old columns included.
    again.begin(0, ["step", "loss"])
    assert file.path.read_text().splitlines() == ["step,loss"]


def test_tensorboard_has_to_be_installed(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.training.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger\.name: 'tensorboard' needs `pip install"):
        make_config(logger={"name": "tensorboard"})
    assert make_config().logger.name == "csv"


def test_tensorboard(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its own reader finds it, of a run that was stopped and went on."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == 6:
            raise RuntimeError("out of memory")
        return original(self, batch, batch_idx)

    config = make_config(logger={"name": "tensorboard"})
    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", training_step)
        with pytest.raises(RuntimeError):
            fit(config, tmp_path)
    fit(config, tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    rows = rows_of(tmp_path)
    for name in ("loss", "gradient_norm/mamba2", "validation_loss"):
        events = [(event.step, event.value) for event in board.Scalars(name)]
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        # In single precision; what the first part had told of steps 5 and 6 is withdrawn.
        assert events == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert "mfu" not in board.Tags()["scalars"]
    # This reader withdraws no texts.
    texts = board.Tensors("samples/0/text_summary")
    assert [event.step for event in texts] == [3, 6, 6, 8]
    assert "optimizer.lr: 0.01" in (tmp_path / "tensorboard" / "hparams.yaml").read_text()
    fit(make_config(logger={"name": "tensorboard"}, resume="never"), tmp_path)
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 1
