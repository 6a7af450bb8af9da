"""Log-probabilities of stretches of documents, of any length, in bounded memory.

A stretch is read in pieces; what is longer than one goes on from the model's static state, as in
decoding. Logits are computed of the tokens alone that predict one that is scored, a part at a time.

Letters: B rows, T tokens, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.evaluation import IGNORED, Stretch, pad_stretches
from slm.generation import PREFILL_TOKENS
from slm.model import LanguageModel

Item = TypeVar("Item")

# Values of the logits that are in memory at a time: 64 MiB.
LOGITS_AT_A_TIME = 2**24


class Score(NamedTuple):
    """Of the scored tokens of a stretch.

    log_probability: their sum, in nats. is_greedy: each is the likeliest in its place.
    """

    log_probability: float
    is_greedy: bool


def score_stretches(
    model: LanguageModel,
    stretches: Sequence[Stretch],
    batch_size: int,
    piece_tokens: int = PREFILL_TOKENS,
) -> Iterator[tuple[int, Score]]:
    """Yield the place and the score of each stretch, the longest first.

    model: in evaluation mode. piece_tokens: of a row, read at a time.
    """
    # Stretches of like length together need little padding; what memory lacks shows at once.
    order = sorted(range(len(stretches)), key=lambda index: -len(stretches[index].tokens))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        scores = _score_batch(model, [stretches[index] for index in batch], piece_tokens)
        yield from zip(batch, scores, strict=True)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yield items, with a bar where standard error is a terminal.

    total: how many there are; None: as many as `len` says, or unknown.
    """
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    bar = {"console": console, "transient": True, "disable": not console.is_terminal}
    yield from rich_track(items, what, total=total, **bar)  # type: ignore[arg-type]


@torch.no_grad()
def _score_batch(
    model: LanguageModel, stretches: Sequence[Stretch], piece_tokens: int
) -> list[Score]:
    # Padding comes last, and no token sees what comes after it.
    tokens, targets = (each.to(model.norm.weight.device) for each in pad_stretches(stretches))
    log_probabilities = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    num_unlikely = torch.zeros_like(log_probabilities, dtype=torch.int64)
    begin = 0
    for hidden in _read(model, tokens, piece_tokens):
        wanted = targets[:, begin : begin + hidden.shape[1]]
        begin += hidden.shape[1]
        for places in (wanted != IGNORED).nonzero().split(_part_tokens(model)):
            rows, columns = places.T
            logits, target = model.logits(hidden[rows, columns]), wanted[rows, columns]  # [N, V]
            losses = F.cross_entropy(logits, target, reduction="none")
            log_probabilities.index_add_(0, rows, -losses.double())
            num_unlikely.index_add_(0, rows, (logits.argmax(-1) != target).long())
    are_greedy = (num_unlikely == 0).tolist()
    return [Score(*each) for each in zip(log_probabilities.tolist(), are_greedy, strict=True)]


def _read(model: LanguageModel, tokens: Tensor, piece_tokens: int) -> Iterator[Tensor]:
    """Yield the residual stream [B, T, D] of each piece of tokens [B, T]."""
    if tokens.shape[1] <= piece_tokens:
        yield model.hidden(tokens)
        return
    state = model.init_state(*tokens.shape)
    for piece in tokens.split(piece_tokens, dim=1):
        yield model.append(piece, state)


def _part_tokens(model: LanguageModel) -> int:
    return max(1, LOGITS_AT_A_TIME // model.architecture.vocab_size)
