"""How good a model is: validation loss, bits per byte, cloze accuracy.

Letters: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from slm.data.cloze import ClozeItem
from slm.data.dataset import PackedDataset
from slm.data.packing import PackedSplit

# Quantile of the normal distribution for a 95 % interval.
Z_95 = 1.959964
IGNORED = -100


@dataclass(frozen=True)
class ClozeResult:
    """Share of right answers with its 95 % confidence interval (Wilson) over n items."""

    accuracy: float
    low: float
    high: float
    n: float


def evaluate_loss(
    model: nn.Module,
    split: PackedSplit,
    sequence_tokens: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> float:
    """Mean cross-entropy in nats per token over rows of a split.

    max_tokens: if given, only so many, as rows spread evenly over the split (at least one).
    """
    dataset = PackedDataset(split, sequence_tokens)
    num_rows = len(dataset)
    if max_tokens is not None:
        num_rows = max(1, min(num_rows, max_tokens // sequence_tokens))
    rows = [index * len(dataset) // num_rows for index in range(num_rows)]
    with _evaluating(model) as device:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for begin in range(0, num_rows, batch_size):
            batch = [dataset[row] for row in rows[begin : begin + batch_size]]
            tokens = torch.stack([row["tokens"] for row in batch]).to(device)  # [B, T + 1]
            documents = torch.stack([row["documents"] for row in batch]).to(device)  # [B, T]
            logits = model(tokens[:, :-1], documents)  # [B, T, V]
            total += _cross_entropy(logits, tokens[:, 1:]).sum(dtype=torch.float64)
    return total.item() / (num_rows * sequence_tokens)


def bits_per_byte(loss: float, split: PackedSplit) -> float:
    """Loss in nats per token of a split, as bits per byte of its text.

    It compares models across tokenizers.
    """
    return loss / math.log(2) * len(split) / split.num_bytes


def cloze_accuracy(
    model: nn.Module, tokenizer: Tokenizer, items: Sequence[ClozeItem], batch_size: int
) -> ClozeResult:
    """Share of items whose true sentence is more probable than the three others.

    A sentence is scored as a document of its own: by the sum of its tokens' log-probabilities.
    Raises ValueError if there are no items, or if a score is not finite.
    """
    right = cloze_answers(model, tokenizer, items, batch_size)
    return wilson_interval(int(right.sum()), len(items))


def cloze_answers(
    model: nn.Module, tokenizer: Tokenizer, items: Sequence[ClozeItem], batch_size: int
) -> Tensor:
    """Which items are answered right, [N] bool; as `cloze_accuracy`."""
    if not items:
        raise ValueError("cloze accuracy needs at least one item")
    sentences = [sentence for item in items for sentence in item.sentences]
    scores = sentence_log_probabilities(model, tokenizer, sentences, batch_size)
    if not scores.isfinite().all():
        raise ValueError("cloze accuracy: the model's log-probabilities are not finite")
    answers = torch.tensor([item.answer for item in items])
    return scores.view(len(items), -1).argmax(1) == answers


def sentence_log_probabilities(
    model: nn.Module, tokenizer: Tokenizer, sentences: Sequence[str], batch_size: int
) -> Tensor:
    """Log-probability of each sentence at the start of a document [len(sentences)], on the CPU."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(sentences))]
    # Sentences of like length together need little padding.
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    scores = torch.empty(len(ids))
    with _evaluating(model) as device:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            tokens, targets = _pad([ids[index] for index in batch])
            # Padding comes last, and no token sees what comes after it.
            losses = _cross_entropy(model(tokens.to(device)), targets.to(device))
            scores[batch] = -losses.sum(1).cpu()
    return scores


def wilson_interval(num_right: float, n: float) -> ClozeResult:
    """Share and 95 % score interval of a binomial count (Wilson, 1927).

    Numbers that are not whole stand for as many independent answers.
    """
    share = num_right / n
    scale = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return ClozeResult(share, max(0.0, centre - half), min(1.0, centre + half), n)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target [B, T] under logits [B, T, V]; 0 where the target is ignored."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape)


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, T]: each row's tokens but the last, and but the first."""
    length = max(map(len, rows)) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    for index, row in enumerate(rows):
        tokens[index, : len(row) - 1] = torch.tensor(row[:-1])
        targets[index, : len(row) - 1] = torch.tensor(row[1:])
    return tokens, targets


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, for a while; yields the model's device."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
