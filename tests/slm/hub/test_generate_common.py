"""What transformers' common tests ask of `generate`, which are not part of its wheel.

Each check of GenerationTesterMixin and of generation/test_utils, and where it is covered: here
unless another file is named (modeling: test_modeling.py, placement: test_placement.py).

- greedy_generate, left_padding_compatibility: modeling test_greedy_generation_is_the_same_…
- greedy_generate_dict_outputs(_use_cache): test_greedy_dictionary
- sample_generate, sample_generate_dict_output: test_sampled_dictionary, modeling
  test_sampling_is_seeded_and_uses_the_cache
- beam_search_generate, beam_search_generate_dict_outputs(_use_cache): test_beams_dictionary,
  modeling test_beam_search_reorders_the_cache
- beam_sample_generate(_dict_output): test_beam_sampling
- model_parallel_beam_search: placement
- generate_without_input_ids: test_without_a_prompt
- assisted_decoding_*, prompt_lookup_decoding_*: test_what_would_have_to_go_back_is_refused; so are
  contrastive search and the other modes that transformers keeps on the Hub
- past_key_values_format, new_cache_format: test_cache_format
- generate_from_(random_)inputs_embeds: test_from_embeddings
- generate_continue_from_past_key_values: modeling
  test_generation_goes_on_from_a_cache_of_ones_own, test_a_padded_batch_goes_on_from_its_cache
- generate_continue_from_inputs_embeds: test_going_on_from_embeddings
- generate_with_static_cache, _quant_cache, offloaded_cache_implementation: the model has one cache,
  static by itself: modeling test_what_cannot_be_done_is_refused
- generate_compile_model_forward, generate_compilation_all_outputs: only static caches of
  transformers are compiled for: test_cache_format pins that ours never is
- generate_methods_with_logits_to_keep: every test here, for generate always passes it
- generate_with_and_without_position_ids: refused, modeling test_what_cannot_be_done_is_refused
- inherits_generation_mixin, prepare_inputs_for_generation: test_next_inputs
- dola, constrained and group beam search: as contrastive search
- eager_matches_sdpa_generate, flash attention: there is one attention, see test_common.py
- num_return_sequences: test_sampled_dictionary, test_beams_dictionary
- stopping criteria, stop strings, max_time, end of text: test_stopping
- logits processors, bad words, prefix_allowed_tokens_fn: test_constraints
- streamers: test_streamer
- compute_transition_scores: test_greedy_dictionary, test_beams_dictionary
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import (
    BaseStreamer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from slm.hub.cache import SLMCache
from slm.hub.modeling import SLMForCausalLM

Wrap = Callable[..., SLMForCausalLM]

NUM_LAYERS = 7


def padded_batch() -> dict[str, Tensor]:
    tokens, mask = torch.randint(1, 64, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0
    mask[1, :1] = 0
    return {"input_ids": tokens, "attention_mask": mask}


EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("use_cache", [False, True])
def test_greedy_dictionary(wrap: Wrap, use_cache: bool) -> None:
    model, batch = wrap(), padded_batch()
    out = model.generate(
        **batch, max_new_tokens=5, do_sample=False, use_cache=use_cache, **EVERYTHING
    )
    new = out.sequences[:, 9:]
    assert new.shape == (3, 5)
    logits = torch.stack(out.logits, dim=1)
    assert torch.equal(logits.argmax(-1), new)
    assert (out.past_key_values is not None) == use_cache

    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        whole = model(
            out.sequences[:, :-1], attention_mask=mask, output_hidden_states=True, use_cache=False
        )
    torch.testing.assert_close(logits, whole.logits[:, -5:], rtol=1e-4, atol=1e-4)
    for layer in range(NUM_LAYERS + 1):
        last = [step[layer][:, -1] for step in out.hidden_states]
        torch.testing.assert_close(
            torch.stack(last, dim=1), whole.hidden_states[layer][:, -5:], rtol=1e-4, atol=1e-4
        )
    read = [step[0].shape[1] for step in out.hidden_states]
    assert read == ([9, 1, 1, 1, 1] if use_cache else [9, 10, 11, 12, 13])

    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    expected = logits.log_softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores, expected)


def test_sampled_dictionary(wrap: Wrap) -> None:
    model, batch = wrap(), padded_batch()
    arguments = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 4, "top_k": 3}
    torch.manual_seed(3)
    out = model.generate(**batch, **arguments, **EVERYTHING)
    assert out.sequences.shape == (12, 15)
    assert torch.equal(out.sequences[:, :9], batch["input_ids"].repeat_interleave(4, dim=0))
    for step, logits in enumerate(out.logits):
        chosen = out.sequences[:, 9 + step, None]
        assert (logits.topk(3).indices == chosen).any(-1).all()
    assert len({tuple(row) for row in out.sequences[:4].tolist()}) > 1


@pytest.mark.parametrize("use_cache", [False, True])
def test_beams_dictionary(wrap: Wrap, use_cache: bool) -> None:
    model, batch = wrap(), padded_batch()
    arguments = {"max_new_tokens": 6, "num_beams": 4, "num_return_sequences": 2}
    out = model.generate(**batch, use_cache=use_cache, **arguments, **EVERYTHING)
    assert out.sequences.shape == (6, 15)
    # The scores are those of the sequences, read anew.
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        logits = model(out.sequences, attention_mask=mask.repeat_interleave(2, dim=0)).logits
    log_p = logits[:, 8:-1].log_softmax(-1).gather(-1, out.sequences[:, 9:, None]).squeeze(-1)
    torch.testing.assert_close(out.sequences_scores, log_p.mean(-1), rtol=1e-4, atol=1e-4)
    scores = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    torch.testing.assert_close(scores, log_p, rtol=1e-4, atol=1e-4)


def test_beam_sampling(wrap: Wrap) -> None:
    model, batch = wrap(), padded_batch()
    found = []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        out = model.generate(
            **batch, max_new_tokens=8, num_beams=3, do_sample=True, use_cache=use_cache
        )
        found.append(out)
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])


def test_without_a_prompt(wrap: Wrap) -> None:
    model = wrap()
    begin = torch.zeros(1, 1, dtype=torch.int64)
    expected = model.generate(begin, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_from_embeddings(wrap: Wrap, num_beams: int) -> None:
    model, batch = wrap(), padded_batch()
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    expected = model.generate(**batch, **arguments)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    new = model.generate(inputs_embeds=embedded, attention_mask=mask, **arguments)
    assert torch.equal(new, expected[:, 9:])
    with_tokens = model.generate(**batch, inputs_embeds=embedded, **arguments)
    assert torch.equal(with_tokens, expected)
    other = model.generate(
        inputs_embeds=torch.rand_like(embedded), attention_mask=mask, **arguments
    )
    assert not torch.equal(other, new)


def test_a_padded_batch_goes_on_from_its_cache(wrap: Wrap) -> None:
    model, batch = wrap(), padded_batch()
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=3, **arguments)
    asked = torch.randint(1, 64, (3, 2))
    tokens = torch.cat([first.sequences, asked], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.int64)], dim=1)
    at_once = model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
    more = model.generate(
        tokens,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        **arguments,
    )
    assert torch.equal(more.sequences, at_once)
    assert more.past_key_values is first.past_key_values
    with pytest.raises(ValueError, match="the cache has read all of the tokens already"):
        model.generate(
            more.sequences[:, :-1], past_key_values=more.past_key_values, max_new_tokens=1
        )


def test_going_on_from_embeddings(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (2, 5))
    embed = model.get_input_embeddings()
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(inputs_embeds=embed(tokens), max_new_tokens=3, **arguments)
    whole = torch.cat([tokens, first.sequences], dim=1)
    more = model.generate(
        inputs_embeds=embed(whole),
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        **arguments,
    )
    expected = model.generate(tokens, max_new_tokens=7, do_sample=False)
    assert torch.equal(torch.cat([whole, more.sequences], dim=1), expected)


def test_cache_format(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (2, 5))
    cache = model.generate(
        tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    assert isinstance(cache, SLMCache)
    assert cache.get_seq_length() == 5 + 4 - 1
    assert len(cache.state.operators) == NUM_LAYERS
    assert all(len(t) == 2 for state in cache.state.operators for t in state.tensors())
    # So `generate` neither compiles for it nor takes tokens back.
    assert not cache.is_compileable
    assert not cache.is_croppable


def test_next_inputs(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (2, 5))
    assert isinstance(model, GenerationMixin)
    assert model.can_generate()
    cache = SLMCache()
    with torch.no_grad():
        model(tokens[:, :3], past_key_values=cache, use_cache=True)
    mask = torch.ones_like(tokens)
    inputs = model.prepare_inputs_for_generation(tokens, past_key_values=cache, attention_mask=mask)
    assert torch.equal(inputs["input_ids"], tokens[:, 3:])
    inputs = model.prepare_inputs_for_generation(tokens, attention_mask=mask)
    assert torch.equal(inputs["input_ids"], tokens)


def test_what_would_have_to_go_back_is_refused(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (1, 5))
    for arguments in ({"assistant_model": wrap()}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match=r"only supports .* but got .*ASSISTED"):
            model.generate(tokens, max_new_tokens=2, do_sample=False, **arguments)
    with pytest.raises(ValueError, match=r"only supports .* but got .*CONTRASTIVE"):
        model.generate(tokens, max_new_tokens=2, penalty_alpha=0.6, top_k=4, trust_remote_code=True)


class AtToken(StoppingCriteria):
    """Each row ends at a token of its own."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return input_ids[:, -1] == self.ends


def test_stopping(wrap: Wrap) -> None:
    model, batch = wrap(), padded_batch()
    arguments = {"max_new_tokens": 12, "do_sample": False}
    free = model.generate(**batch, **arguments)[:, 9:]
    end = int(free[1, 4])
    stopped = model.generate(**batch, eos_token_id=end, **arguments)[:, 9:]
    for row, (whole, cut) in enumerate(zip(free.tolist(), stopped.tolist(), strict=True)):
        length = whole.index(end) + 1 if end in whole else len(whole)
        assert cut[: min(length, len(cut))] == whole[: min(length, len(cut))], row
        assert not any(cut[length:]), row

    criteria = StoppingCriteriaList([AtToken(free[:, 2])])
    stopped = model.generate(**batch, stopping_criteria=criteria, **arguments)[:, 9:]
    last = max(row.tolist().index(int(row[2])) for row in free)
    assert stopped.shape[1] == last + 1
    assert model.generate(**batch, max_time=1e-9, **arguments).shape[1] == 10
    least = model.generate(**batch, eos_token_id=end, min_new_tokens=7, **arguments)
    assert (least[:, 9:16] != end).all()


class Shift(LogitsProcessor):
    """Only the token after the last one may follow."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = (input_ids[:, -1:] + 1) % scores.shape[-1]
        return torch.full_like(scores, -torch.inf).scatter(1, allowed, 0.0)


def test_constraints(wrap: Wrap) -> None:
    model, batch = wrap(), padded_batch()
    arguments = {"max_new_tokens": 6, "do_sample": False}
    shifted = model.generate(**batch, logits_processor=LogitsProcessorList([Shift()]), **arguments)
    last = batch["input_ids"][:, -1:]
    assert torch.equal(shifted[:, 9:], (last + torch.arange(1, 7)) % 64)

    free = model.generate(**batch, **arguments)[:, 9:]
    banned = sorted(set(free.flatten().tolist()))
    without = model.generate(**batch, bad_words_ids=[[x] for x in banned], **arguments)[:, 9:]
    assert not set(without.flatten().tolist()) & set(banned)

    for num_beams in (1, 2):
        chosen = model.generate(
            **batch,
            prefix_allowed_tokens_fn=lambda row, tokens: [10 + row, 20 + row],
            num_beams=num_beams,
            **arguments,
        )[:, 9:]
        rows = torch.arange(3)[:, None]
        assert ((chosen == 10 + rows) | (chosen == 20 + rows)).all()


class Collect(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.has_ended = True


def test_streamer(wrap: Wrap) -> None:
    model, tokens, streamer = wrap(), torch.randint(1, 64, (1, 5)), Collect()
    out = model.generate(tokens, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert [piece.numel() for piece in streamer.pieces] == [5, 1, 1, 1, 1]
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.pieces]), out[0])
    assert streamer.has_ended
