"""How good a model is: validation loss, bits per byte, accuracy in the cloze and in continuations.

Letters: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from slm.data.cloze import ClozeItem
from slm.data.continuation import ContinuationItem
from slm.data.dataset import PackedDataset
from slm.data.packing import PackedSplit

# Quantile of the normal distribution for a 95 % interval.
Z_95 = 1.959964
IGNORED = -100


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers among n, with its 95 % confidence interval."""

    accuracy: float
    low: float
    high: float
    n: float


class Stretch(NamedTuple):
    """Tokens of one document, of which those from `start` on are scored, given those before."""

    tokens: Sequence[int] | np.ndarray
    start: int


def evaluate_loss(
    model: nn.Module,
    split: PackedSplit,
    sequence_tokens: int,
    batch_size: int,
    max_tokens: int | None = None,
    share_rows: bool = False,
) -> float:
    """Mean cross-entropy in nats per token over rows of a split.

    max_tokens: if given, only so many, as rows spread evenly over the split (at least one).
    share_rows: all processes of the group call it, each scores a part of the rows, and all get the
        mean of all.
    """
    dataset = PackedDataset(split, sequence_tokens)
    num_rows = len(dataset)
    if max_tokens is not None:
        num_rows = max(1, min(num_rows, max_tokens // sequence_tokens))
    rows = [index * len(dataset) // num_rows for index in range(num_rows)]
    batches = [rows[begin : begin + batch_size] for begin in range(0, num_rows, batch_size)]
    rank = torch.distributed.get_rank() if share_rows else 0
    num_ranks = torch.distributed.get_world_size() if share_rows else 1
    with _evaluating(model) as device:
        total = torch.zeros((), dtype=torch.float64, device=device)
        # All compute as often as the others: where weights are sharded, each waits for all.
        for turn in range(rank, rank + len(batches), num_ranks):
            is_real = turn < len(batches)
            batch = [dataset[row] for row in batches[turn if is_real else -1]]
            tokens = torch.stack([row["tokens"] for row in batch]).to(device)  # [B, T + 1]
            documents = torch.stack([row["documents"] for row in batch]).to(device)  # [B, T]
            # Of the batch: a mean over its tokens.
            loss = model(tokens[:, :-1], documents, targets=tokens[:, 1:])
            total += len(batch) * loss * is_real
        if share_rows:
            torch.distributed.all_reduce(total)
    return total.item() / num_rows


def bits_per_byte(loss: float, split: PackedSplit) -> float:
    """Loss in nats per token of a split, as bits per byte of its text.

    It compares models across tokenizers.
    """
    return loss / math.log(2) * len(split) / split.num_bytes


def cloze_accuracy(
    model: nn.Module, tokenizer: Tokenizer, items: Sequence[ClozeItem], batch_size: int
) -> Accuracy:
    """Share of items whose true sentence is more probable than the three others.

    A sentence is scored as a document of its own: by the sum of its tokens' log-probabilities.
    Raises ValueError if there are no items, or if a score is not finite.
    """
    right = cloze_answers(model, tokenizer, items, batch_size)
    return clustered_interval(right.tolist(), [item.document for item in items])


def cloze_answers(
    model: nn.Module, tokenizer: Tokenizer, items: Sequence[ClozeItem], batch_size: int
) -> Tensor:
    """Which items are answered right, [N] bool; as `cloze_accuracy`."""
    sentences = [sentence for item in items for sentence in item.sentences]
    # Token 0 is the end of text.
    stretches = [Stretch(each.ids, 1) for each in tokenizer.encode_batch_fast(sentences)]
    return _answers(model, stretches, [item.answer for item in items], batch_size)


def continuation_accuracy(
    model: nn.Module, items: Sequence[ContinuationItem], batch_size: int
) -> Accuracy:
    """Share of items whose true continuation is more probable, given the context, than the others.

    A continuation is scored by the sum of its tokens' log-probabilities. Raises ValueError if there
    are no items, or if a score is not finite.
    """
    right = continuation_answers(model, items, batch_size)
    return clustered_interval(right.tolist(), [item.document for item in items])


def continuation_answers(
    model: nn.Module, items: Sequence[ContinuationItem], batch_size: int
) -> Tensor:
    """Which items are answered right, [N] bool; as `continuation_accuracy`."""
    stretches = [
        Stretch((*item.context, *continuation), len(item.context))
        for item in items
        for continuation in item.continuations
    ]
    return _answers(model, stretches, [item.answer for item in items], batch_size)


def log_probabilities(model: nn.Module, stretches: Sequence[Stretch], batch_size: int) -> Tensor:
    """Sum of the log-probabilities of each stretch's scored tokens [len(stretches)], on the CPU."""
    # Stretches of like length together need little padding.
    order = sorted(range(len(stretches)), key=lambda index: len(stretches[index].tokens))
    scores = torch.empty(len(stretches))
    with _evaluating(model) as device:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            tokens, targets = pad_stretches([stretches[index] for index in batch])
            # Padding comes last, and no token sees what comes after it.
            losses = _cross_entropy(model(tokens.to(device)), targets.to(device))
            scores[batch] = -losses.sum(1).cpu()
    return scores


def clustered_interval(right: Sequence[bool], clusters: Sequence[int]) -> Accuracy:
    """Share of right answers with its 95 % interval over clusters of questions.

    Questions about one text are right or wrong together more often than questions about several.
    Wilson's interval is taken at the effective number of answers (Korn and Graubard 1998, Dean and
    Pagano 2015): so many independent ones would vary as these do from cluster to cluster. It is
    never above the true number. Answers of one cluster alone count as independent.
    clusters: the cluster of each answer.
    """
    from scipy.special import stdtrit

    num_answers, share = len(right), sum(right) / len(right)
    _, members = np.unique(clusters, return_inverse=True)
    residuals = np.bincount(members, weights=np.array(right) - share)
    num_clusters = len(residuals)
    effective = float(num_answers)
    if num_clusters > 1:
        # Linearized variance of a ratio; its few degrees of freedom widen the interval.
        variance = float(np.square(residuals / num_answers).sum())
        variance *= num_clusters / (num_clusters - 1)
        widening = float(stdtrit(num_clusters - 1, 0.975)) / Z_95
        # Where nothing varies, only the clusters count.
        effective = share * (1 - share) / variance if variance else num_clusters
        effective = min(effective / widening**2, num_answers)
    return replace(wilson_interval(share * effective, effective), n=num_answers)


def wilson_interval(num_right: float, n: float) -> Accuracy:
    """Share and 95 % score interval of a binomial count (Wilson, 1927).

    Numbers that are not whole stand for as many independent answers.
    """
    share = num_right / n
    scale = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return Accuracy(share, max(0.0, centre - half), min(1.0, centre + half), n)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target [B, T] under logits [B, T, V]; 0 where the target is ignored."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape)


def _answers(
    model: nn.Module, stretches: Sequence[Stretch], answers: Sequence[int], batch_size: int
) -> Tensor:
    """Whether the stretch of each item [N] that should be most probable is so.

    stretches: the choices of the first item, of the second, and so on.
    """
    if not answers:
        raise ValueError("accuracy: needs at least one item")
    scores = log_probabilities(model, stretches, batch_size)
    if not scores.isfinite().all():
        raise ValueError("accuracy: the model's log-probabilities are not finite")
    return scores.view(len(answers), -1).argmax(1) == torch.tensor(answers)


def pad_stretches(stretches: Sequence[Stretch]) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, T] of stretches: all tokens but the last; those that are scored."""
    length = max(len(tokens) for tokens, _ in stretches) - 1
    inputs = torch.zeros(len(stretches), length, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for index, (tokens, start) in enumerate(stretches):
        inputs[index, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        targets[index, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return inputs, targets


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
