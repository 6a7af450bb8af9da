"""The proxy: a short training that stands in for a long one, and can be cut short further.

A bare loop, so that a candidate of a few million parameters costs seconds and not the start of a
framework. Every candidate sees the same batches in the same order, under a schedule that ends at
the last rung: what stops at a lower one has had the beginning of the same training, and goes on
from there as if it had never stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from search.rungs import MAX_RUNGS
from search.worker import Report
from slm.config import ConfigError, schema
from slm.training.config import OptimizerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from slm.architecture import Architecture
    from slm.data import PackedCorpus
    from slm.model import LanguageModel

# Steps between two points of the loss curve, where the device is waited for.
STEPS_PER_POINT = 10
# In a file of weights, what begins the names of the optimizer's tensors.
OPTIMIZER = "optimizer."
Positive = Annotated[int, Field(gt=0)]


@schema
class ProxyConfig:
    """How candidates are trained and scored.

    rung_tokens: tokens to train on, counted from the first, one number per rung.
    batch_size, sequence_tokens: sequences of one step; tokens of each.
    validation_tokens: tokens of the validation split that the loss is taken over.
    precision: auto computes in bfloat16 where the device does so fast.
    time_limit_s: a candidate that trains longer has failed.
    warm_start: a child begins with its parent's weights, as far as they fit (`search.warm_start`).
    """

    rung_tokens: tuple[Positive, ...]
    batch_size: Positive
    sequence_tokens: Positive
    validation_tokens: Positive
    time_limit_s: Annotated[float, Field(gt=0)]
    optimizer: OptimizerConfig
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    warm_start: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.rung_tokens:
            problems.append("rung_tokens: must not be empty")
        elif self.rung_tokens[0] < self.tokens_per_step:
            problems.append(
                f"rung_tokens: must be >= the {self.tokens_per_step} tokens of one step, "
                f"got {self.rung_tokens[0]}"
            )
        if len(self.rung_tokens) > MAX_RUNGS:
            problems.append(
                f"rung_tokens: must be {MAX_RUNGS} at most, got {len(self.rung_tokens)}"
            )
        if any(later <= rung for rung, later in itertools.pairwise(self.rung_tokens)):
            problems.append(f"rung_tokens: must increase, got {list(self.rung_tokens)}")
        if problems:
            raise ConfigError(problems)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.sequence_tokens

    def num_steps(self, tokens: int) -> int:
        """Steps that are nearest to `tokens` from below."""
        return max(1, tokens // self.tokens_per_step)


@dataclass(frozen=True)
class ProxyResult:
    """What training a candidate gave, from its first token on.

    loss: on the validation subset, train_loss: mean of the last points of the curve; nats per
    token. loss_curve: (tokens, loss) pairs. seconds: of training alone.
    """

    loss: float
    train_loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    loss_curve: list[tuple[int, float]]


class ProxyTraining:
    """A candidate in training.

    parent: architecture and checkpoint whose weights it begins with, as far as they fit.

    The same arguments give the same weights on the same devices with the same number of threads,
    however often the training was saved and loaded in between.

    ranks: the processes that train it together. Each holds all of it and reads its share of every
        batch; their mean gradient is that of the batch, since none of its targets is masked.
    step: optimizer steps so far. loss_curve: (tokens, training loss) pairs. seconds: of training.
    """

    def __init__(
        self,
        architecture: Architecture,
        corpus: PackedCorpus,
        config: ProxyConfig,
        seed: int,
        parent: tuple[Architecture, Path] | None = None,
    ) -> None:
        import torch

        from search.ranks import Ranks
        from search.warm_start import inherit
        from slm.data.dataset import PackedDataset
        from slm.model import LanguageModel
        from slm.training.optimizer import build_optimizer

        self.config = config
        self.ranks = Ranks()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        self.model = LanguageModel(architecture).to(self.device)
        # By the first alone: the parent's file may be there for one rank and gone for the next.
        if parent is not None and self.ranks.is_first:
            inherit(self.model, parent[0], read_weights(parent[1]))
        self.ranks.copy_first(self.model.state_dict().values())
        last_step = config.num_steps(config.rung_tokens[-1])
        self.optimizer, self.scheduler = build_optimizer(
            self.model, config.optimizer, last_step, config.tokens_per_step
        )
        self.step = 0
        self.loss_curve: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._seed = seed
        self._validation = corpus.validation
        self._dataset = PackedDataset(corpus.train, config.sequence_tokens)
        self._orders: dict[int, list[int]] = {}

    def train(self, tokens: int, report: Report = lambda _: None) -> None:
        """Go on until about so many tokens in all have been read.

        Raises FloatingPointError when the loss is no longer finite.
        """
        import torch

        last_step = self.config.num_steps(tokens)
        window: list[Tensor] = []
        begin_s = time.monotonic()
        while self.step < last_step:
            with self.ranks.undisturbed():
                window.append(self._train_step())
            self.step += 1
            if self.step % STEPS_PER_POINT == 0 or self.step == last_step:
                mean = torch.stack(window).mean()
                self.ranks.average([mean])
                loss = mean.item()
                window.clear()
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {self.step}")
                self.loss_curve.append((self.tokens, loss))
                report({"share": self.step / last_step, "loss": loss})
        self.seconds += time.monotonic() - begin_s

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.step * self.config.tokens_per_step

    def validate(self) -> float:
        """Loss on the validation subset. Raises FloatingPointError if it is not finite."""
        from latency.lock import device_lock
        from slm.evaluation import evaluate_loss

        with device_lock(exclusive=False):
            loss = evaluate_loss(
                self.model,
                self._validation,
                self.config.sequence_tokens,
                self.config.batch_size,
                self.config.validation_tokens,
            )
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}")
        return loss

    def result(self) -> ProxyResult:
        """Validate, and say what the training gave so far."""
        last = [loss for _, loss in self.loss_curve[-3:]]
        return ProxyResult(
            loss=self.validate(),
            train_loss=sum(last) / len(last),
            tokens=self.tokens,
            seconds=self.seconds,
            tokens_per_second=self.tokens / self.seconds,
            loss_curve=self.loss_curve,
        )

    def save(self, path: Path) -> None:
        """Write weights and optimizer, whole or not at all, as safetensors."""
        from safetensors.torch import save_file

        tensors = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{OPTIMIZER}{kind}.{name}"] = value
        metadata = {
            "architecture": str(self.model.architecture),
            "step": str(self.step),
            "seconds": str(self.seconds),
            "loss_curve": json.dumps(self.loss_curve),
            "schedule": json.dumps(self.scheduler.state_dict()),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Go on from where `save` was called.

        Raises ValueError naming a file that is not there or not whole.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["architecture"] != str(self.model.architecture):
                raise ValueError(f"of another architecture, {metadata['architecture']}")
            weights = {k: v for k, v in tensors.items() if not k.startswith(OPTIMIZER)}
            self.model.load_state_dict(weights)
            parameters = dict(self.model.named_parameters())
            for key in tensors.keys() - weights.keys():
                kind, _, name = key.removeprefix(OPTIMIZER).partition(".")
                self.optimizer.state[parameters[name]][kind] = tensors[key]
            schedule = json.loads(metadata["schedule"])
            self.scheduler.load_state_dict(schedule)
            for group, lr in zip(self.optimizer.param_groups, schedule["_last_lr"], strict=True):
                group["lr"] = lr
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: no training to go on with ({error})") from None
        self.step = int(metadata["step"])
        self.seconds = float(metadata["seconds"])
        self.loss_curve = [(tokens, loss) for tokens, loss in json.loads(metadata["loss_curve"])]

    def _train_step(self) -> Tensor:
        """One optimizer step; its loss, detached."""
        import torch
        from torch.utils.data import default_collate

        from slm.training.loss import next_token_loss
        from slm.training.precision import autocast

        rows = [self._dataset[row] for row in self.ranks.share(self._rows(self.step))]
        batch = {name: tensor.to(self.device) for name, tensor in default_collate(rows).items()}
        with autocast(self.device, self.config.precision):
            loss = next_token_loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.average(p.grad for p in self.model.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()

    def _rows(self, step: int) -> list[int]:
        """Rows of the corpus that a step reads: all in random order, epoch after epoch."""
        first = step * self.config.batch_size
        places = range(first, first + self.config.batch_size)
        epochs = [divmod(place, len(self._dataset)) for place in places]
        return [self._order(epoch)[place] for epoch, place in epochs]

    def _order(self, epoch: int) -> list[int]:
        """The rows in the order of an epoch: each draws on where the one before has ended."""
        import torch

        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self._seed)
            for each in range(epoch + 1):
                order = torch.randperm(len(self._dataset), generator=generator).tolist()
                # A batch reads from two epochs at most, one after the other.
                self._orders = {k: v for k, v in self._orders.items() if k == each - 1}
                self._orders[each] = order
        return self._orders[epoch]


def load_weights(architecture: Architecture, path: Path) -> LanguageModel:
    """The model of a training that was saved, on the GPU if there is one."""
    import torch

    from slm.model import LanguageModel

    model = LanguageModel(architecture)
    model.load_state_dict(read_weights(path))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a training that was saved.

    Raises ValueError naming a file that is not there or not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no weights ({error})") from None
    return {name: x for name, x in tensors.items() if not name.startswith(OPTIMIZER)}
