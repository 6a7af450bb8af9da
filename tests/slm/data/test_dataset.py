import itertools
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from slm.config import ConfigError
from slm.data import PackedCorpus
from slm.data.datamodule import PackedDataModule
from slm.data.dataset import PackedDataset
from slm.data.sampler import ShuffledSampler


@pytest.mark.parametrize("sequence_tokens", [1, 7, 64, 5000])
def test_rows_cover_the_split(corpus: PackedCorpus, sequence_tokens: int) -> None:
    split = corpus.validation
    dataset = PackedDataset(split, sequence_tokens)
    sampled = range(0, len(dataset), max(1, len(dataset) // 300))
    for index in sampled:
        row = dataset[index]
        begin = index * sequence_tokens
        assert row["tokens"].dtype == row["documents"].dtype == torch.int64
        expected = np.array(split.tokens[begin : begin + sequence_tokens + 1], np.int64)
        assert np.array_equal(row["tokens"], expected)
        # A document begins with the end of text; the row's first token does not count.
        starts = expected[:-1] == corpus.end_of_text
        starts[0] = False
        assert np.array_equal(row["documents"], np.cumsum(starts))
    # The last row ends within the split, another one would not.
    assert len(dataset) * sequence_tokens + 1 <= len(split)
    assert (len(dataset) + 1) * sequence_tokens + 1 > len(split)


def test_rows_outside_are_refused(corpus: PackedCorpus) -> None:
    dataset = PackedDataset(corpus.train, 64)
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[index]
    with pytest.raises(ConfigError, match=r"sequence_tokens: \d+ .* validation split"):
        PackedDataset(corpus.validation, len(corpus.validation))
    assert len(PackedDataset(corpus.validation, len(corpus.validation) - 1)) == 1


def batches(loader: StatefulDataLoader, number: int) -> list[torch.Tensor]:
    """The tokens of the first batches, epoch after epoch."""
    found: list[torch.Tensor] = []
    while len(found) < number:
        found += [batch["tokens"] for batch in itertools.islice(loader, number - len(found))]
    return found


def module_of(corpus: PackedCorpus, *, seed: int = 0, num_workers: int = 0) -> PackedDataModule:
    return PackedDataModule(
        corpus, sequence_tokens=4096, batch_size=3, seed=seed, num_workers=num_workers
    )


def test_an_epoch_is_a_shuffle(corpus: PackedCorpus) -> None:
    module = module_of(corpus)
    loader = module.train_dataloader()
    rows = torch.cat([batch["tokens"] for batch in loader])
    dataset = PackedDataset(corpus.train, 4096)
    assert len(rows) == len(dataset) // 3 * 3 > 6
    order = [tuple(row.tolist()) for row in rows]
    everything = [tuple(dataset[index]["tokens"].tolist()) for index in range(len(dataset))]
    assert len(set(order)) == len(order)
    assert set(order) <= set(everything)
    assert order != everything[: len(order)]
    again, other = (batches(module_of(corpus, seed=seed).train_dataloader(), 1) for seed in (0, 1))
    assert torch.equal(rows[:3], again[0])
    assert not torch.equal(again[0], other[0])


def test_processes_share_the_rows_out(corpus: PackedCorpus) -> None:
    dataset = PackedDataset(corpus.train, 4096)
    whole = list(ShuffledSampler(dataset, seed=3, num_replicas=1, rank=0))
    parts = [list(ShuffledSampler(dataset, seed=3, num_replicas=4, rank=rank)) for rank in range(4)]
    assert {len(part) for part in parts} == {len(dataset) // 4}
    assert [index for indices in zip(*parts, strict=True) for index in indices] == (
        whole[: len(dataset) // 4 * 4]
    )


def test_an_epoch_that_is_broken_off_is_not_repeated(corpus: PackedCorpus) -> None:
    sampler = ShuffledSampler(PackedDataset(corpus.train, 64), seed=0, num_replicas=1, rank=0)
    firsts = [next(iter(sampler)) for _ in range(5)]
    assert firsts == [sampler.order(epoch)[0] for epoch in range(5)]
    assert len(set(firsts)) > 1


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stop_after", ["two batches", "an epoch", "an epoch and one"])
def test_a_resumed_loader_goes_on_exactly(
    corpus: PackedCorpus, num_workers: int, stop_after: str
) -> None:
    module = module_of(corpus, num_workers=num_workers)
    per_epoch = len(module.train_dataloader())
    stop = {"two batches": 2, "an epoch": per_epoch, "an epoch and one": per_epoch + 1}[stop_after]
    expected = batches(module.train_dataloader(), 3 * per_epoch)
    loader = module.train_dataloader()
    before = batches(loader, stop)
    state = loader.state_dict()
    resumed = module.train_dataloader()
    resumed.load_state_dict(state)
    after = batches(resumed, len(expected) - stop)
    assert len(before + after) == len(expected)
    assert all(map(torch.equal, before + after, expected))
    assert not torch.equal(
        torch.cat(expected[:per_epoch]), torch.cat(expected[per_epoch:][:per_epoch])
    )


class Recorder(L.LightningModule):
    """Remembers its batches."""

    def __init__(self, stop: int, checkpoint: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.stop = stop
        self.checkpoint = checkpoint

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["tokens"])
        return self.weight**2

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.stop:
            self.trainer.save_checkpoint(self.checkpoint)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("stop_after", ["two batches", "an epoch", "an epoch and one"])
def test_a_resumed_trainer_goes_on_exactly(
    corpus: PackedCorpus, stop_after: str, tmp_path: Path
) -> None:
    per_epoch = len(module_of(corpus).train_dataloader())
    stop = {"two batches": 2, "an epoch": per_epoch, "an epoch and one": per_epoch + 1}[stop_after]
    checkpoint = tmp_path / "last.ckpt"

    def train(resume_from: Path | None) -> list[torch.Tensor]:
        recorder = Recorder(stop, checkpoint)
        trainer = L.Trainer(
            max_steps=2 * per_epoch + 1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(recorder, module_of(corpus), ckpt_path=resume_from, weights_only=True)
        return recorder.seen

    expected = train(None)
    resumed = train(checkpoint)
    assert len(expected) == 2 * per_epoch + 1
    assert len(resumed) == len(expected) - stop
    assert all(map(torch.equal, resumed, expected[stop:]))
