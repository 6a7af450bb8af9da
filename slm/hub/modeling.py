"""The model for transformers: a shell around `slm.model.LanguageModel`.

Letters: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from slm.architecture import Architecture
from slm.hub.cache import SLMCache
from slm.hub.configuration import SLMConfig
from slm.hub.layer import SLMLanguageModel
from slm.model import LanguageModel, initialize
from slm.operators import Operator, Sequence


class SLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that `AutoModelForCausalLM` loads.

    `generate` decodes on the model's own static state, greedily, by sampling or by beam search;
    batches may be padded on either side, `attention_mask` says where.
    """

    config_class = SLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["SLMLayer"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Recurrent states are not handed from device to device.
    _supports_context_parallel = False
    # Nothing can be taken back from a recurrent state, so no assisted decoding.
    _is_stateful = True
    _supported_generation_modes = ("greedy_search", "sample", "beam_search", "beam_sample")
    # `forward` takes num_items_in_batch: transformers' Trainer asks before it passes it.
    accepts_loss_kwargs = True

    def __init__(self, config: SLMConfig) -> None:
        super().__init__(config)
        self.model = SLMLanguageModel(Architecture.parse(config.architecture))
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *arguments: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """As transformers has it, with errors that name what is wrong.

        Raises ValueError if weights do not have the shapes that the config says, and OSError if
        their file is damaged, or a pickle of more than tensors.
        """
        path = pretrained_model_name_or_path
        try:
            loaded: Any = super().from_pretrained(
                path,
                *arguments,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except UnpicklingError:
            # torch's own message tells how to run it.
            raise OSError(
                f"'{path}': the weights are a pickle of more than tensors, which could run code; "
                "nothing of it was loaded"
            ) from None
        except Exception as error:
            # Of safetensors, which this file may not import; it does not say which file it read.
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(f"'{path}': the weights cannot be read: {error}") from error
        model, info = loaded
        wrong = [
            f"{name} is {list(found)}, not {list(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ]
        if wrong and not ignore_mismatched_sizes:
            raise ValueError(f"'{path}': not the weights of its config: {'; '.join(wrong)}")
        return (model, info) if output_loading_info else model

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """The one there is. Raises ValueError if another is asked for."""
        if requested_attention not in (None, "sdpa"):
            raise ValueError(
                "attn_implementation: the model's attention is torch's "
                f"scaled_dot_product_attention ('sdpa'), got {requested_attention!r}"
            )
        return "sdpa"

    def _set_gradient_checkpointing(self, *arguments: Any, **options: Any) -> None:
        run = options.get("gradient_checkpointing_func")
        if run is not None and run.keywords.get("use_reentrant") and len(self.model.meta_tokens):
            raise ValueError("use_reentrant: must be False, or meta tokens get no gradient")
        super()._set_gradient_checkpointing(*arguments, **options)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, and with it a head that is tied to it."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None if it is the embedding: one matrix, which nothing has to tie."""
        return None if self.model.architecture.tie_embeddings else self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace a head of its own."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Embedding:
        """As transformers has it; the architecture says so, too."""
        embedding = super().resize_token_embeddings(*arguments, **options)
        self.model.architecture = replace(
            self.model.architecture, vocab_size=embedding.num_embeddings
        )
        self.config.architecture = str(self.model.architecture)
        return embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of input_ids [B, T], and the loss if `labels` [B, T] are given.

        attention_mask: [B, T], or [B, past + T] with a cache; 0 marks padding. The logits of
            padding mean nothing.
        past_key_values: the cache that an earlier call returned; updated in place.
        inputs_embeds: [B, T, D], what the embedding would make of input_ids; in place of these.
        labels: the tokens themselves, shifted here; −100 is not counted.
        use_cache: return a cache. Default: the config's, where no gradient is recorded. A call
            with a cache records none.
        output_attentions: must not be set, for most layers have none. Default: the config's.
        output_hidden_states: return the residual stream [B, T, D] before the first layer and after
            each, the last one normed. Default: the config's.
        logits_to_keep: only the last so many logits, or those at these places; 0: all.
        num_items_in_batch: number of labels that the loss is a mean over; default: those given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: one of them must be given, and one only")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: most layers have none; must not be set")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not isinstance(output_hidden_states, bool):
            raise ValueError(
                f"output_hidden_states: must be True or False, got {output_hidden_states!r}"
            )
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

        x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        streams: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self._hidden(x, attention_mask, past_key_values, streams)
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
            hidden_states=None if streams is None else (x, *streams[:-1], hidden),
        )

    def _hidden(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cache: SLMCache | None,
        streams: list[Tensor] | None,
    ) -> Tensor:
        """The normed residual [B, T, D] of embedded tokens x, wherever their padding stands.

        streams: takes the residual stream [B, T, D] as each layer leaves it.
        """
        order = lengths = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < x.shape[1]:
                raise ValueError(
                    f"attention_mask: must tell of each token whether it is real, [B, T]; "
                    f"got {list(attention_mask.shape)} for {list(x.shape[:2])} tokens"
                )
            is_real = attention_mask[:, -x.shape[1] :].bool()
            if not bool(is_real.all()):
                # The model wants the real tokens of a row first, then its padding.
                order = (~is_real).byte().argsort(dim=1, stable=True)
                lengths = is_real.sum(dim=1)
                x = _take(x, order)
        if cache is None:
            hidden = self.model.scan(x, Sequence(None, lengths), streams)
        else:
            hidden = cache.append(self.model, x, lengths, streams)
        if order is None:
            return hidden
        place = order.argsort(dim=1)
        if streams is not None:
            streams[:] = [_take(stream, place) for stream in streams]
        return _take(hidden, place)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SLMCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next call of `forward`: with a cache only the tokens it has not read.

        inputs_embeds: of the prompt; read once.
        kwargs is what `generate` keeps for other models. Raises ValueError for position_ids.
        """
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids: positions follow from attention_mask")
        unread = next_sequence_length
        if unread is None and past_key_values is not None and attention_mask is not None:
            unread = attention_mask.shape[1] - past_key_values.num_tokens
        if unread is not None and unread < 1:
            raise ValueError("past_key_values: the cache has read all of the tokens already")
        name, prompt = "input_ids", input_ids
        if inputs_embeds is not None and is_first_iteration:
            name, prompt = "inputs_embeds", inputs_embeds
        return {
            name: prompt if unread is None else prompt[:, -unread:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
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


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Of each row of x [B, T, D] the tokens at index [B, T]."""
    return x.take_along_dim(index.unsqueeze(-1).to(x.device), dim=1)
