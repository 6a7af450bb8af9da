"""What transformers' common tests ask of a model, which are not part of its wheel.

Each of them by name, and where it is covered: here unless a file is named (modeling:
test_modeling.py, generate: test_generate_common.py, export: test_export.py, code:
test_remote_code.py, fine_tuning: test_fine_tuning.py, placement: test_placement.py).

ModelTesterMixin
- save_load, can_use_safetensors, torch_save_load, load_contiguous_weights: modeling
  test_saving_and_loading_gives_the_same_model, test_weights_are_saved_in_shards
- from_pretrained_no_checkpoint, can_load_from_state_dict: test_weights_may_be_handed_in
- keep_in_fp32_modules: none are declared; placement test_half_precision_loads checks all weights
- save_load_keys_to_ignore: none are declared
- load_with_mismatched_shapes, mismatched_shapes_have_properly_initialized_weights:
  test_weights_of_another_shape_are_drawn_anew_if_so_wished; refused otherwise: code
- can_be_initialized_on_meta, can_load_with_meta_device_context_manager: test_meta_device
- initialization, init_weights_can_init_buffers (there are no buffers): test_initialization,
  modeling test_missing_weights_are_initialised_and_others_left_alone
- all_tensors_are_parameter_or_buffer: test_every_tensor_is_a_parameter
- determinism, forward_signature: test_determinism_and_signature
- batching_equivalence: test_rows_do_not_depend_on_each_other
- training, causal_lm_can_accept_kwargs: modeling test_loss_is_cross_entropy_…,
  test_loss_can_be_a_mean_over_more_than_the_batch
- training_gradient_checkpointing (all variants), gradient_checkpointing_enable_disable,
  enable_input_require_grads: test_gradient_checkpointing, fine_tuning
- peft_gradient_checkpointing_enable_disable: fine_tuning test_lora
- attention_outputs, attention masks of four dimensions, sdpa / flash / flex dispatch,
  can_set_attention_dynamically: there is one attention, and most operators have none:
  test_what_cannot_be_had_is_refused
- hidden_states_output: test_hidden_states_…; retain_grad_hidden_states_attentions: test_retain_grad
- head_pruning, feed_forward_chunking, resize_position_vector_embeddings: nothing of the kind exists
- resize_tokens_embeddings, resize_embeddings_untied: test_resized_vocabulary, modeling
  test_vocabulary_can_be_extended
- model_get_set_embeddings: test_embeddings_can_be_replaced
- model_main_input_name: test_determinism_and_signature
- tie_model_weights, tied_weights_keys, correct_missing_keys,
  model_weights_reload_no_missing_tied_weights: a tied head is the embedding itself, not a second
  parameter: test_tied_head_is_the_embedding
- load_save_without_tied_weights: the architecture's text decides: test_config
- model_outputs_equivalence, return_dict: test_tuples_hold_what_the_dictionary_does
- inputs_embeds, inputs_embeds_matches_input_ids: test_embeddings_in_place_of_tokens
- problem_types: of sequence classification, for which there is no head
- forward_with_logits_to_keep: test_logits_to_keep
- disk_offload (bin: there is no such file, safetensors), cpu_offload, model_parallelism: placement
- torch_compile_for_training: test_compiled_training_step
- tensor parallel, pipeline, context parallel, deepspeed: no plans are declared
- config, internal_model_config_and_subconfig_are_same: test_config
- num_layers_is_small, model_is_small: about the sizes of transformers' own test models

GenerationTesterMixin: generate, whose list is there.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig

from slm.architecture import Architecture
from slm.hub.configuration import SLMConfig
from slm.hub.loading import load_model
from slm.hub.modeling import SLMForCausalLM
from slm.model import LanguageModel
from slm.operators import Operator

Wrap = Callable[..., SLMForCausalLM]

VARIANTS = ["", "tie_embeddings=False", "meta_tokens=3", "meta_tokens=2 normalize_logits=True"]


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(1, 64, shape)


def padded_on_the_left(tokens: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] as [B, count + T], and the mask."""
    rows = len(tokens)
    padded = torch.cat([torch.zeros(rows, count, dtype=torch.int64), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :count] = 0
    return padded, mask


def gradients(model: SLMForCausalLM, tokens: Tensor, **arguments: object) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, **arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.numel()}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("fields", VARIANTS)
def test_hidden_states_are_those_of_the_first_layers(
    wrap: Wrap, fields: str, use_cache: bool
) -> None:
    model, tokens = wrap(fields), some_tokens(2, 7)
    architecture, weights = model.model.architecture, model.model.state_dict()
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True, use_cache=use_cache)
        assert len(out.hidden_states) == len(architecture.operators) + 1
        assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))
        for count in range(1, len(architecture.operators) + 1):
            first = replace(architecture, operators=architecture.operators[:count])
            short = LanguageModel(first).eval()
            short.load_state_dict(weights, strict=False)
            seen = out.hidden_states[count]
            if count < len(architecture.operators):
                seen = short.norm(seen)
            torch.testing.assert_close(seen, short.hidden(tokens), rtol=1e-4, atol=1e-5)
        assert torch.equal(model.model.logits(out.hidden_states[-1]), out.logits)
        assert model(tokens).hidden_states is None


@pytest.mark.parametrize("use_cache", [False, True])
def test_hidden_states_stand_where_their_tokens_stand(wrap: Wrap, use_cache: bool) -> None:
    model, tokens = wrap(), some_tokens(2, 6)
    padded, mask = padded_on_the_left(tokens)
    arguments = {"output_hidden_states": True, "use_cache": use_cache}
    with torch.no_grad():
        plain = model(tokens, **arguments).hidden_states
        shifted = model(padded, attention_mask=mask, **arguments).hidden_states
    for left, right in zip(plain, shifted, strict=True):
        torch.testing.assert_close(right[:, 3:], left, rtol=1e-4, atol=1e-5)


def test_config_may_ask_for_hidden_states(wrap: Wrap) -> None:
    model, tokens = wrap(), some_tokens(1, 4)
    model.config.output_hidden_states = True
    assert model(tokens).hidden_states is not None
    assert model(tokens, output_hidden_states=False).hidden_states is None


def test_retain_grad(wrap: Wrap) -> None:
    model, tokens = wrap(), some_tokens(2, 5)
    out = model(tokens, output_hidden_states=True)
    for stream in out.hidden_states:
        stream.retain_grad()
    out.logits[:, -1].sum().backward()
    assert all(stream.grad.abs().sum() > 0 for stream in out.hidden_states)


def test_tuples_hold_what_the_dictionary_does(wrap: Wrap) -> None:
    model, tokens = wrap(), some_tokens(2, 5)
    arguments = {"labels": tokens, "output_hidden_states": True}
    expected = model(tokens, **arguments)
    given = model(tokens, return_dict=False, **arguments)
    model.config.return_dict = False
    configured = model(tokens, **arguments)
    for found in (given, configured):
        assert isinstance(found, tuple)
        loss, logits, hidden_states = found
        assert torch.equal(loss, expected.loss)
        assert torch.equal(logits, expected.logits)
        assert all(map(torch.equal, hidden_states, expected.hidden_states))


@pytest.mark.parametrize("use_cache", [False, True])
def test_embeddings_in_place_of_tokens(wrap: Wrap, use_cache: bool) -> None:
    model = wrap()
    tokens, mask = padded_on_the_left(some_tokens(2, 6))
    embedded = model.get_input_embeddings()(tokens)
    arguments = {"attention_mask": mask, "use_cache": use_cache}
    with torch.no_grad():
        by_tokens = model(tokens, **arguments).logits
        by_embeddings = model(inputs_embeds=embedded, **arguments).logits
    assert torch.equal(by_tokens, by_embeddings)


def test_gradients_reach_embeddings_that_are_given(wrap: Wrap) -> None:
    model, tokens = wrap(), some_tokens(2, 6)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=tokens).loss.backward()
    # What follows the last token is not predicted.
    assert ((embedded.grad.abs().sum(-1) > 0) == (torch.arange(6) < 5)).all()


def count_scans(model: SLMForCausalLM) -> list[str]:
    """A list that takes the name of every operator that is computed."""
    computed: list[str] = []
    for layer in model.model.layers:

        def scan(*arguments: object, operator: Operator = layer.operator) -> object:
            computed.append(operator.config.name)
            return type(operator).scan(operator, *arguments)

        layer.operator.scan = scan
    return computed


@pytest.mark.parametrize("fields", VARIANTS)
def test_gradient_checkpointing(wrap: Wrap, fields: str) -> None:
    model = wrap(fields).train()
    assert model.supports_gradient_checkpointing
    tokens, mask = padded_on_the_left(some_tokens(2, 9))
    expected = gradients(model, tokens, attention_mask=mask)
    computed = count_scans(model)
    num_layers = len(model.model.layers)
    # Meta tokens pass all layers as well, but nothing follows from what the last one makes of them.
    once, again = num_layers, num_layers
    if model.model.architecture.meta_tokens:
        once, again = 2 * num_layers, 2 * num_layers - 1

    model.gradient_checkpointing_enable()
    found = gradients(model, tokens, attention_mask=mask)
    assert len(computed) == once + again
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)

    computed.clear()
    model.gradient_checkpointing_disable()
    gradients(model, tokens)
    assert len(computed) == once

    computed.clear()
    model.activation_checkpointing_enable(every_n_layers=num_layers)
    gradients(model, tokens)
    assert len(computed) == once + once // num_layers


def test_gradient_checkpointing_of_a_frozen_model_reaches_the_embeddings(wrap: Wrap) -> None:
    model, tokens = wrap().train().requires_grad_(False), some_tokens(2, 5)
    last = model.model.layers[-1].operator.down_proj.weight.requires_grad_()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    assert last.grad.abs().sum() > 0


def test_reentrant_checkpointing_is_refused_where_it_would_be_wrong(wrap: Wrap) -> None:
    reentrant = {"use_reentrant": True}
    with pytest.raises(ValueError, match="use_reentrant: must be False, or meta tokens get no"):
        wrap("meta_tokens=3").gradient_checkpointing_enable(reentrant)
    model, tokens = wrap("").train(), some_tokens(2, 5)
    expected = gradients(model, tokens)
    model.gradient_checkpointing_enable(reentrant)
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("fields", ["tie_embeddings=False", "meta_tokens=3"])
def test_embeddings_can_be_replaced(wrap: Wrap, fields: str) -> None:
    model, tokens = wrap(fields), some_tokens(1, 5)
    embedding = torch.nn.Embedding(64, 32)
    model.set_input_embeddings(embedding)
    assert model.get_input_embeddings() is embedding
    head = model.get_output_embeddings()
    assert (head is None) == model.config.tie_word_embeddings
    with torch.no_grad():
        weight = embedding.weight if head is None else head.weight
        hidden = model(tokens, output_hidden_states=True).hidden_states
        assert torch.equal(hidden[0], embedding(tokens))
        torch.testing.assert_close(model(tokens).logits, hidden[-1] @ weight.T)


def test_tied_head_is_the_embedding(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("tie_embeddings=True")
    model.tie_weights()
    names = [name for name, _ in model.named_parameters()]
    assert not any("head" in name for name in names)
    assert not model.all_tied_weights_keys
    model.save_pretrained(tmp_path)
    _, info = SLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.parametrize("size", [50, 70])
@pytest.mark.parametrize("fields", ["tie_embeddings=False", "normalize_logits=True"])
def test_resized_vocabulary(wrap: Wrap, fields: str, size: int, tmp_path: Path) -> None:
    model, tokens = wrap(fields), torch.randint(1, 50, (1, 5))
    with torch.no_grad():
        before = model(tokens).logits
        model.resize_token_embeddings(size)
        after = model(tokens).logits
    kept = min(size, 64)
    assert after.shape[-1] == size == model.config.vocab_size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    # The text of the architecture tells others, and both of them agree.
    model.save_pretrained(tmp_path)
    elsewhere, _ = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(elsewhere(tokens), after)
    assert model(tokens, labels=tokens).loss.isfinite()


def test_resized_to_a_multiple(wrap: Wrap) -> None:
    model = wrap()
    assert model.resize_token_embeddings().num_embeddings == 64
    model.resize_token_embeddings(65, pad_to_multiple_of=16)
    assert model.model.architecture.vocab_size == model.config.vocab_size == 80


def test_weights_may_be_handed_in(wrap: Wrap) -> None:
    model, tokens = wrap(), some_tokens(1, 5)
    other = SLMForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_weights_are_saved_in_shards(wrap: Wrap, tmp_path: Path) -> None:
    model, tokens = wrap("tie_embeddings=False"), some_tokens(1, 5)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    other = SLMForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_weights_of_another_shape_are_drawn_anew_if_so_wished(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap()
    model.save_pretrained(tmp_path)
    config = SLMConfig(model.config.architecture, vocab_size=80)
    other, info = SLMForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"model.embedding.weight"}
    weight = other.get_input_embeddings().weight
    assert weight.shape == (80, 32)
    assert 0.015 < weight.std() < 0.025
    assert torch.equal(other.model.meta_tokens, model.model.meta_tokens)


def test_meta_device(wrap: Wrap) -> None:
    model, tokens = wrap(), some_tokens(1, 5)
    with torch.device("meta"):
        empty = SLMForCausalLM(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty.eval()(tokens).logits, model(tokens).logits)


def test_initialization() -> None:
    text = "width=32 vocab_size=64 meta_tokens=9 | attention(head_dim=8) mamba2(head_dim=2) ffn"
    ours = LanguageModel(Architecture.parse(text)).state_dict()
    theirs = SLMForCausalLM(SLMConfig(text)).model.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name].std(), value.std(), rtol=0.5, atol=1e-6, msg=name)
        torch.testing.assert_close(theirs[name].mean(), value.mean(), rtol=0.3, atol=0.3, msg=name)


def test_every_tensor_is_a_parameter(wrap: Wrap) -> None:
    model = wrap()
    model(some_tokens(1, 4))
    assert not list(model.buffers())
    for name, module in model.named_modules():
        loose = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
        assert not loose, name


def test_determinism_and_signature(wrap: Wrap) -> None:
    model, tokens = wrap().train(), some_tokens(2, 5)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert model.main_input_name == "input_ids"
    with pytest.raises(TypeError, match="token_type_ids"):
        model(tokens, token_type_ids=tokens)
    for wrong in ({}, {"input_ids": tokens, "inputs_embeds": torch.zeros(2, 5, 32)}):
        with pytest.raises(ValueError, match="input_ids, inputs_embeds: one of them"):
            model(**wrong)


@pytest.mark.parametrize("fields", VARIANTS)
def test_rows_do_not_depend_on_each_other(wrap: Wrap, fields: str) -> None:
    model, tokens = wrap(fields), some_tokens(3, 7)
    lengths = torch.tensor([7, 2, 5])
    mask = (torch.arange(7) < lengths[:, None]).long()
    with torch.no_grad():
        together = model(tokens, attention_mask=mask).logits
        for row, length in enumerate(lengths.tolist()):
            alone = model(tokens[row : row + 1, :length]).logits
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_logits_to_keep(wrap: Wrap) -> None:
    model, tokens = wrap(), some_tokens(2, 6)
    with torch.no_grad():
        whole = model(tokens).logits
        torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, whole[:, -2:])
        places = torch.tensor([1, 4])
        torch.testing.assert_close(model(tokens, logits_to_keep=places).logits, whole[:, places])


def test_config(wrap: Wrap, tmp_path: Path) -> None:
    config = wrap("tie_embeddings=False").config
    config.save_pretrained(tmp_path)
    assert SLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert SLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert PretrainedConfig.get_config_dict(tmp_path)[0]["model_type"] == "slm_frontier"
    # Shown by tools that know nothing of architectures.
    assert config.num_hidden_layers == 7
    assert config.hidden_size == 32
    assert config.to_diff_dict()["architecture"] == config.architecture
    # What is tied is the architecture's to say.
    with pytest.raises(ValueError, match="tie_word_embeddings: the architecture says False"):
        SLMConfig(config.architecture, tie_word_embeddings=True)


def test_compiled_training_step() -> None:
    model = SLMForCausalLM(SLMConfig("width=32 vocab_size=64 | short_convolution ffn"))
    tokens = some_tokens(2, 8)
    expected = gradients(model, tokens)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(tokens, labels=tokens).loss.backward()
    for name, gradient in expected.items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_what_cannot_be_had_is_refused(wrap: Wrap) -> None:
    model, tokens = wrap(), some_tokens(1, 5)
    with pytest.raises(ValueError, match="output_attentions: most layers have none"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions: most layers have none"):
        model.generate(
            tokens, output_attentions=True, return_dict_in_generate=True, max_new_tokens=1
        )
    with pytest.raises(ValueError, match="output_hidden_states: must be True or False"):
        model(tokens, output_hidden_states=[-1])
    with pytest.raises(ValueError, match=r"attention_mask: .* got \[1, 1, 5, 5\] for \[1, 5\]"):
        model(tokens, attention_mask=torch.ones(1, 1, 5, 5))
    for name in ("eager", "flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="attn_implementation: the model's attention is"):
            SLMForCausalLM._from_config(SLMConfig(), attn_implementation=name)
        with pytest.raises(ValueError, match="attn_implementation: the model's attention is"):
            model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="sdpa"):
        model.config.output_attentions = True
