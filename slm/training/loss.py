"""The loss of a language model."""

from __future__ import annotations

from torch import Tensor

from slm.model import LanguageModel


def next_token_loss(model: LanguageModel, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of every next token, in nats.

    batch: tokens [B, T + 1] int64, of which the model sees all but the last; documents [B, T]
    int64, changing where a new document begins. The target after a document's last token is the
    first token of the next, which ends the text: no target is masked.
    """
    tokens = batch["tokens"]
    return model(tokens[:, :-1], batch["documents"], targets=tokens[:, 1:])
