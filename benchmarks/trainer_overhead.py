"""What the trainer costs besides the step itself: Lightning and all callbacks of `train.py`.

A run of `slm.training.fit` is timed from step to step, as it stands: metrics, norms by kind,
progress and loggers included; validations and checkpoints not, for these are work that was asked
for. Each of its steps is followed by one of a bare loop: the same `training_step`, clipping,
optimizer and schedule on a copy of the model, with a loader of its own on the same text. So both
meet the same machine. Each step of a log window has its own median, since the last one has more to
do, and the mean of these counts. Nothing else is timed meanwhile: the device lock is held. The
default batch makes steps of about 100 ms.

python benchmarks/trainer_overhead.py
python benchmarks/trainer_overhead.py --windows 20 --batch 2
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from latency.device import Device
from latency.lock import device_lock
from latency.timer import CpuMeter
from slm.config import compose
from slm.data.datamodule import PackedDataModule
from slm.runtime import thread_count
from slm.training.config import TrainConfig, read_config
from slm.training.fit import fit
from slm.training.module import TrainingModule

# Steps of a log window, the default of `configs/trainer`.
WINDOW = 10
# Windows that warm caches and allocators up.
WARMUP_WINDOWS = 2
SEQUENCE_TOKENS = 128
NUM_DOCUMENTS = 400
NUM_RESAMPLES = 1000


class Alternation(Callback):
    """Follows each step of the trainer with a step of the bare loop.

    trainer_ms, bare_ms: of each whole step so far.
    """

    def __init__(self) -> None:
        self.trainer_ms: list[float] = []
        self.bare_ms: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build the bare loop; the first step is timed from here."""
        assert isinstance(pl_module, TrainingModule)
        self.bare_step = bare_loop(trainer, pl_module)
        self.since_s = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """As the last callback: what Lightning does after it counts with the next step."""
        begin_s = time.perf_counter()
        self.bare_step()
        end_s = time.perf_counter()
        self.trainer_ms.append(1000 * (begin_s - self.since_s))
        self.bare_ms.append(1000 * (end_s - begin_s))
        self.since_s = time.perf_counter()


def bare_loop(trainer: L.Trainer, module: TrainingModule) -> Callable[[], None]:
    """A step of the same training without a trainer."""
    twin = TrainingModule(
        copy.deepcopy(module.model), module.trainer_config, module.optimizer_config
    )
    (optimizer,), (schedule,) = twin.configure_optimizers()
    used = trainer.datamodule  # type: ignore[attr-defined]
    data = PackedDataModule(
        used.corpus, sequence_tokens=used.sequence_tokens, batch_size=used.batch_size
    )
    batches = itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))
    clip = module.trainer_config.gradient_clip
    assert clip is not None

    def step() -> None:
        loss = twin.training_step(next(batches), 0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
        schedule["scheduler"].step()

    return step


def main() -> None:
    arguments = parse_arguments()
    alternation = Alternation()
    # How Lightning lets a module add callbacks of its own, after all others.
    TrainingModule.configure_callbacks = lambda self: [alternation]  # type: ignore[method-assign]
    device = Device.current(threads=arguments.threads, kind="cpu")
    with tempfile.TemporaryDirectory() as folder, device_lock(), thread_count(device.threads):
        meter = CpuMeter()
        fit(config_of(Path(folder), arguments), Path(folder) / "run")
        others_busy = meter.others_busy()
    of_trainer, of_bare = (
        np.array(steps).reshape(-1, WINDOW)[WARMUP_WINDOWS:]
        for steps in (alternation.trainer_ms, alternation.bare_ms)
    )
    results = compare(of_trainer, of_bare)
    print_results(results)
    environment = {
        **device.describe(),
        "windows": len(of_bare),
        "window_steps": WINDOW,
        "batch": arguments.batch,
        "sequence_tokens": SEQUENCE_TOKENS,
        "other_cpus_busy": others_busy,
        "samples_ms": {"trainer": of_trainer.tolist(), "bare": of_bare.tolist()},
    }
    print(
        json.dumps(
            {"benchmark": "trainer_overhead", "results": results, "environment": environment}
        )
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=60, help=f"that count, of {WINDOW} steps")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


def config_of(folder: Path, arguments: argparse.Namespace) -> TrainConfig:
    """The smallest model that there is a config for, on text that is nobody's."""
    draw = random.Random(0)
    letters = "abcdefghij klmnop qrstu vwxyz "
    documents = ["".join(draw.choices(letters, k=2000)) for _ in range(NUM_DOCUMENTS)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    num_steps = (WARMUP_WINDOWS + arguments.windows) * WINDOW
    overrides = [
        *("model=tiny", "trainer=cpu_small", "data=text", "tokenizer.vocab_size=512"),
        *(f"data.files=[{folder}/text.txt]", f"data.cache_dir={folder}/cache"),
        f"trainer.batch_tokens={arguments.batch * SEQUENCE_TOKENS}",
        f"trainer.sequence_tokens={SEQUENCE_TOKENS}",
        *(f"trainer.max_steps={num_steps}", f"trainer.log_every_steps={WINDOW}"),
        *(f"trainer.threads={arguments.threads}", "trainer.validation_tokens=1024"),
        *(f"trainer.{what}_every_steps={num_steps}" for what in ("validate", "checkpoint")),
    ]
    (config,) = compose("train", overrides)
    return read_config(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))


def compare(of_trainer: np.ndarray, of_bare: np.ndarray) -> dict[str, Any]:
    """Milliseconds of a step, from those of all steps [windows, steps of a window].

    overhead_ms: [low, median, high] of what the trainer takes more, with the 95 % interval from
    windows drawn anew; overhead_share: by how much the ratio of the two times is above 1.
    """
    differences = of_trainer - of_bare
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(differences), size=(NUM_RESAMPLES, len(differences)))
    low, high = np.quantile([typical(differences[each]) for each in drawn], [0.025, 0.975])
    return {
        "trainer_ms": typical(of_trainer),
        "bare_ms": typical(of_bare),
        "overhead_ms": [float(low), typical(differences), float(high)],
        "overhead_share": typical(of_trainer) / typical(of_bare) - 1,
    }


def typical(steps: np.ndarray) -> float:
    """The mean over a window's steps of each one's median."""
    return float(np.median(steps, axis=0).mean())


def print_results(results: dict[str, Any]) -> None:
    table = Table(title="a training step")
    for column in ("trainer, ms", "bare loop, ms", "more, ms", "95 % interval", "more, %"):
        table.add_column(column, justify="right")
    low, overhead_ms, high = results["overhead_ms"]
    table.add_row(
        f"{results['trainer_ms']:.2f}",
        f"{results['bare_ms']:.2f}",
        f"{overhead_ms:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{100 * results['overhead_share']:.2f}",
    )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
