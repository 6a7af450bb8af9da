"""The loss is the mean negative log-probability of every next token."""

import itertools

import torch

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.training.loss import next_token_loss


def test_equals_documents_scored_one_by_one() -> None:
    model = LanguageModel(
        Architecture.parse("width=32 vocab_size=20 meta_tokens=2 | attention(head_dim=16) ffn")
    )
    tokens = torch.randint(1, 20, (2, 9))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0]])
    loss = next_token_loss(model, {"tokens": tokens, "documents": documents})

    total = 0.0
    for row, places in enumerate([(0, 3, 7, 8), (0, 8)]):
        for begin, end in itertools.pairwise(places):
            logits = model(tokens[row : row + 1, begin:end])[0]
            for place, line in enumerate(logits.log_softmax(-1), start=begin):
                total -= line[tokens[row, place + 1]].item()
    torch.testing.assert_close(loss.item(), total / 16, rtol=1e-5, atol=1e-6)
