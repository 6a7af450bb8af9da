"""The model for transformers: a shell around `slm.model.LanguageModel`.

Letters: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from slm.architecture import Architecture
from slm.hub.cache import SLMCache
from slm.hub.configuration import SLMConfig
from slm.model import LanguageModel, initialize
from slm.operators import Operator


class SLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that `AutoModelForCausalLM` loads.

    `generate` decodes on the model's own static state, greedily, by sampling or by beam search;
    batches may be padded on either side, `attention_mask` says where.
    """

    config_class = SLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    # Nothing can be taken back from a recurrent state, so no assisted decoding.
    _is_stateful = True
    # `forward` takes num_items_in_batch: transformers' Trainer asks before it passes it.
    accepts_loss_kwargs = True

    def __init__(self, config: SLMConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(Architecture.parse(config.architecture))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, and with it a head that is tied to it."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None if it is the embedding."""
        return None if self.config.tie_word_embeddings else self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace a head of its own."""
        self.model.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: SLMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of input_ids [B, T], and the loss if `labels` [B, T] are given.

        attention_mask: [B, T], or [B, past + T] with a cache; 0 marks padding. The logits of
            padding mean nothing.
        past_key_values: the cache that an earlier call returned; updated in place.
        labels: the tokens themselves, shifted here; −100 is not counted.
        use_cache: return a cache. Default: the config's, where no gradient is recorded. A call
            with a cache records none.
        logits_to_keep: only the last so many logits, or those at these places; 0: all.
        num_items_in_batch: number of labels that the loss is a mean over; default: those given.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not torch.is_grad_enabled()
        if past_key_values is not None and not isinstance(past_key_values, SLMCache):
            raise ValueError(f"past_key_values: must be a SLMCache, got {type(past_key_values)}")
        if use_cache and past_key_values is None:
            past_key_values = SLMCache()
        if past_key_values is not None and labels is not None and torch.is_grad_enabled():
            raise ValueError(
                "labels: a call with a cache records no gradient, use_cache=False does"
            )

        hidden = self._hidden(input_ids, attention_mask, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,  # type: ignore[arg-type]
        )

    def _hidden(
        self, tokens: Tensor, attention_mask: Tensor | None, cache: SLMCache | None
    ) -> Tensor:
        """The normed residual [B, T, D] of tokens [B, T], wherever their padding stands."""
        inverse = lengths = None
        if attention_mask is not None:
            is_real = attention_mask[:, -tokens.shape[1] :].bool()
            if not bool(is_real.all()):
                # The model wants the real tokens of a row first, then its padding.
                order = (~is_real).byte().argsort(dim=1, stable=True)
                inverse, lengths = order.argsort(dim=1), is_real.sum(dim=1)
                tokens = tokens.gather(1, order)
        if cache is None:
            hidden = self.model.hidden(tokens, lengths=lengths)
        else:
            hidden = cache.append(self.model, tokens, lengths)
        if inverse is None:
            return hidden
        return hidden.gather(1, inverse.unsqueeze(-1).expand_as(hidden))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SLMCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next call of `forward`: with a cache only the tokens it has not read.

        kwargs is what `generate` keeps for other models. Raises ValueError for position_ids.
        """
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids: positions follow from attention_mask")
        unread = next_sequence_length
        if unread is None and past_key_values is not None and attention_mask is not None:
            unread = attention_mask.shape[1] - past_key_values.num_tokens
        return {
            "input_ids": input_ids if unread is None else input_ids[:, -unread:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *_: Any,
    ) -> None:
        """Give `generate` a cache with room for all it may read, unless the caller brought one."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "cache_implementation: the model has one cache of its own, "
                f"got {generation_config.cache_implementation!r}"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = SLMCache(max_cache_length)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint lacks, as `LanguageModel` does; called children first."""
        # An operator may begin with other linear maps than `initialize` gives it.
        parameters = list(module.parameters(recurse=isinstance(module, Operator)))
        loaded = [p for p in parameters if getattr(p, "_is_hf_initialized", False)]
        if len(loaded) == len(parameters):
            return
        values = [parameter.clone() for parameter in loaded]
        if isinstance(module, nn.Linear | nn.Embedding):
            initialize(module)
        elif isinstance(module, LanguageModel):
            nn.init.normal_(module.meta_tokens)
        else:
            module.reset_parameters()  # type: ignore[operator]
        for parameter, value in zip(loaded, values, strict=True):
            parameter.copy_(value)
