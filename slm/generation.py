"""The decoder: prefill a prompt, then one token at a time on static state.

It is what users run and what latency is measured with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slm.model import LanguageModel


class Decoder:
    """Decodes batches of `batch_size` rows of up to `max_tokens` tokens, prompt included."""

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, max_tokens: int, batch_size: int = 1) -> None:
        self.model = model.eval()
        self.max_tokens = max_tokens
        self.state = model.init_state(batch_size, max_tokens)
        self.num_tokens = 0

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Forget everything but the meta tokens, then read tokens [B, T]; logits [B, V].

        lengths: [B], real tokens of each row; what follows them is padding.
        """
        self._reserve(tokens.shape[1], used=0)
        self.state.reset()
        return self.model.prefill(tokens, self.state, lengths)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token [B] per row; logits [B, V]."""
        self._reserve(1, used=self.num_tokens)
        return self.model.step(tokens, self.state)

    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Yield up to `new_tokens` tokens [B] that follow the prompt tokens [B, T].

        Ends early once every row has produced one of `stop_tokens`; a row that has goes on
        repeating it. Temperature 0 is greedy. Raises ValueError if prompt and new tokens are
        more than `max_tokens`, or if a sampling setting is out of range.
        """
        if tokens.shape[1] + new_tokens - 1 > self.max_tokens:
            raise ValueError(
                f"{tokens.shape[1]} prompt tokens and {new_tokens} new ones do not fit into "
                f"max_tokens={self.max_tokens}"
            )
        sampler = Sampler(temperature, top_k, top_p, seed, tokens.device)
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=tokens.device)
        logits = self.prefill(tokens, lengths)
        stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        chosen = tokens[:, -1]
        for count in range(new_tokens):
            if count:
                logits = self.step(chosen)
            chosen = torch.where(stopped, chosen, sampler(logits))
            yield chosen
            if stop_tokens:
                stopped = stopped | torch.isin(chosen, stops)
                if bool(stopped.all()):
                    return

    def _reserve(self, count: int, used: int) -> None:
        if used + count > self.max_tokens:
            raise ValueError(f"{used + count} tokens do not fit into max_tokens={self.max_tokens}")
        self.num_tokens = used + count


class Sampler:
    """Chooses the next token of each row.

    temperature: divides the logits; 0 takes the largest.
    top_k: keep the k largest logits; top_p: keep the smallest set whose probability reaches p.
    Raises ValueError if a setting is out of range.
    """

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        device: torch.device,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature: must be >= 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: must be >= 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: must be in (0, 1], got {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens [B] for logits [B, V]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            # The token that crosses p still belongs to the set.
            is_beyond = ordered.cumsum(-1) - ordered >= self.top_p
            beyond = torch.zeros_like(is_beyond).scatter(-1, order, is_beyond)
            logits = logits.masked_fill(beyond, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(-1)
