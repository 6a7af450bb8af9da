"""What transformers' `generate` carries from call to call: the model's own static state.

Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm.model import LanguageModel, ModelState
from slm.operators import Sequence


class SLMCache:
    """The `past_key_values` of a `SLMForCausalLM`.

    Room for `max_tokens` tokens per row is taken at the first call; a call that needs more
    doubles it. num_tokens: tokens read per row, padding included.
    """

    # What transformers asks every cache.
    is_compileable = False
    is_croppable = False

    def __init__(self, max_tokens: int = 0) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        # Real tokens of each row [B]; None as long as nothing was padding.
        self.lengths: Tensor | None = None
        self.state: ModelState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read per row, padding included."""
        return self.num_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes row beam_idx[b] (beam search)."""
        if self.state is not None:
            self.state.reorder(beam_idx)
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, beam_idx)

    @torch.no_grad()
    def append(
        self,
        model: LanguageModel,
        x: Tensor,
        lengths: Tensor | None,
        streams: list[Tensor] | None = None,
    ) -> Tensor:
        """Read embedded tokens x [B, T, D], of which `lengths` [B] are real.

        Returns the residual stream [B, T, D] after the last norm; streams: takes it as each layer
        leaves it.
        """
        num_rows, num_tokens, _ = x.shape
        state = self._reserve(model, num_rows, num_tokens)
        if lengths is not None:
            self.lengths = lengths + (self.num_tokens if self.lengths is None else self.lengths)
        elif self.lengths is not None:
            self.lengths = self.lengths + num_tokens
        self.num_tokens += num_tokens

        if num_tokens > 1 or lengths is not None:
            return model.extend(x, state, lengths, streams)
        last = model.extend_one(x.squeeze(1), state, streams)
        if streams is not None:
            streams[:] = [stream.unsqueeze(1) for stream in streams]
        return last.unsqueeze(1)

    def _reserve(self, model: LanguageModel, batch_size: int, num_tokens: int) -> ModelState:
        """The state, with room for so many tokens more per row."""
        needed = self.num_tokens + num_tokens
        if self.state is None:
            self.max_tokens = max(self.max_tokens, needed)
            self.state = model.init_state(batch_size, self.max_tokens)
        elif needed > self.max_tokens:
            self.max_tokens = max(2 * self.max_tokens, needed)
            self.state = self._grown(model, self.state, batch_size)
        return self.state

    def _grown(self, model: LanguageModel, state: ModelState, batch_size: int) -> ModelState:
        """What `state` holds, with room for `max_tokens` tokens."""
        num_meta = model.architecture.meta_tokens
        sequence = Sequence(None, None if self.lengths is None else num_meta + self.lengths)
        grown = model.init_state(batch_size, self.max_tokens)
        for index, (old, new) in enumerate(zip(state.operators, grown.operators, strict=True)):
            if [x.shape for x in old.tensors()] == [x.shape for x in new.tensors()]:
                # Its size does not depend on the number of tokens: nothing to move.
                grown.operators[index] = old
            else:
                new.reset()
                new.write(old.read(), sequence)
        return grown
