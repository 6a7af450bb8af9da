"""The training batches of a packed corpus, for Lightning."""

import signal

import lightning as L
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from slm.data.dataset import PackedDataset
from slm.data.packing import PackedCorpus
from slm.data.sampler import ShuffledSampler


class PackedDataModule(L.LightningDataModule):
    """Batches of rows of a packed corpus: {"tokens": [B, T + 1], "documents": [B, T]}.

    The training loader shuffles by `seed` and has a state, which the Trainer keeps in its
    checkpoints: a resumed run sees the batches that the uninterrupted one would have seen.
    """

    def __init__(
        self,
        corpus: PackedCorpus,
        *,
        sequence_tokens: int,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.corpus = corpus
        self.sequence_tokens = sequence_tokens
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled full batches; the rest of an epoch, smaller than a batch, is left out."""
        trainer = self.trainer
        dataset = PackedDataset(self.corpus.train, self.sequence_tokens)
        sampler = ShuffledSampler(
            dataset,
            seed=self.seed,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
        )
        return StatefulDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            num_workers=self.num_workers,
            worker_init_fn=_ignore_signals,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _ignore_signals(worker: int) -> None:
    """A scheduler's reach every process of a job; the training process decides when it ends."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
