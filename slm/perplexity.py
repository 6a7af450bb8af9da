"""Perplexity and bits per byte of documents of any length.

A document begins with the end of text, as in training, and each of its tokens after that is scored
once; the end of text behind it is not. Where a window is given, a token is scored with as much to
its left as the window shows: the first window of a document scores all that it holds, every later
one the tokens that it adds, and the last ends with the document. (With a stride as long as the
window that is what lm-evaluation-harness calls a rolling log-likelihood.) Without a window the
context is the whole document, in memory that only attention makes grow with it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from slm.data.tokenizer import end_of_text_id
from slm.evaluation import Stretch
from slm.model import LanguageModel
from slm.scoring import score_stretches, track

# Documents that are in memory, and sorted by length, together.
GROUP_DOCUMENTS = 1024


class Estimate(NamedTuple):
    """A figure with its 95 % confidence interval over documents; of one document there is none."""

    value: float
    low: float | None
    high: float | None

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The same on another scale, which the function, an increasing one, leads to."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), low, high)


@dataclass(frozen=True)
class Perplexity:
    """How well documents are predicted.

    loss: nats per token. num_tokens: those scored. num_bytes: of the text in UTF-8.
    """

    loss: Estimate
    bits_per_byte: Estimate
    num_documents: int
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> Estimate:
        """e to the loss."""
        return self.loss.map(_exp)


def _exp(nats: float) -> float:
    """e to a number, infinite where no float is so large."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def perplexity(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    batch_size: int,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
) -> Perplexity:
    """How well a model predicts documents.

    model: in evaluation mode. batch_size: windows, or documents, at a time.
    context_tokens: of a window; None: no windows, each token sees the whole document before it.
    stride_tokens: by which a window moves on; None: by its length.
    Raises ValueError if there are no documents, if the loss is not finite, if the stride is longer
    than the window, or if the tokenizer does not put one token before a text.
    """
    # Otherwise first tokens were not scored, or scored without a context.
    end_of_text_id(tokenizer)
    nats: list[float] = []
    tokens: list[int] = []
    sizes: list[int] = []
    rest = iter(documents)
    while group := list(islice(rest, GROUP_DOCUMENTS)):
        encoded = [np.array(each.ids) for each in tokenizer.encode_batch_fast(group)]
        nats += _nats(model, encoded, batch_size, context_tokens, stride_tokens)
        tokens += [len(document) - 1 for document in encoded]
        sizes += [len(document.encode()) for document in group]
    if not sum(tokens):
        raise ValueError("perplexity: there is no text")
    if not math.isfinite(sum(nats)):
        raise ValueError("perplexity: the model's log-probabilities are not finite")
    return Perplexity(
        loss=ratio_estimate(nats, tokens),
        bits_per_byte=ratio_estimate(nats, sizes).map(lambda nats: nats / math.log(2)),
        num_documents=len(nats),
        num_tokens=sum(tokens),
        num_bytes=sum(sizes),
    )


def windows(
    tokens: Sequence[int] | np.ndarray, context_tokens: int | None, stride_tokens: int | None
) -> Iterator[Stretch]:
    """Yield the windows of a document, which together score each token after the first once.

    A window shows up to `context_tokens` tokens besides the last that it scores.
    Raises ValueError if the stride is longer than the window.
    """
    num_scored = len(tokens) - 1
    context = num_scored if context_tokens is None else context_tokens
    stride = context if stride_tokens is None else stride_tokens
    if context_tokens is not None and stride > context_tokens:
        raise ValueError(f"stride_tokens: must be <= context_tokens={context}, got {stride}")
    done, end = 0, min(context, num_scored)
    while done < num_scored:
        begin = max(0, end - context)
        yield Stretch(tokens[begin : end + 1], done + 1 - begin)
        done, end = end, min(end + stride, num_scored)


def ratio_estimate(totals: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """Sum of totals over sum of sizes, both given by document, with its 95 % interval.

    The variance is that of a ratio, linearized; Student's quantile makes up for few documents.
    """
    from scipy.special import stdtrit

    ratio, count = math.fsum(totals) / sum(sizes), len(totals)
    if count == 1:
        return Estimate(ratio, None, None)
    residuals = np.array(totals) - ratio * np.array(sizes)
    variance = count / (count - 1) * float(np.square(residuals / sum(sizes)).sum())
    half = float(stdtrit(count - 1, 0.975)) * math.sqrt(variance)
    return Estimate(ratio, ratio - half, ratio + half)


def _nats(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    batch_size: int,
    context_tokens: int | None,
    stride_tokens: int | None,
) -> list[float]:
    """Of each document, the sum over its tokens."""
    pairs = [
        (place, window)
        for place, document in enumerate(documents)
        for window in windows(document, context_tokens, stride_tokens)
    ]
    scores = score_stretches(model, [window for _, window in pairs], batch_size)
    nats = [0.0] * len(documents)
    for index, score in track(scores, "windows", total=len(pairs)):
        nats[pairs[index][0]] -= score.log_probability
    return nats
