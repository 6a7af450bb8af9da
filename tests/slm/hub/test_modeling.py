"""The model under transformers: `generate`, padding, losses, saving."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from slm.generation import Decoder
from slm.hub.cache import SLMCache
from slm.hub.configuration import SLMConfig
from slm.hub.modeling import SLMForCausalLM

Wrap = Callable[..., SLMForCausalLM]

VARIANTS = ["", "tie_embeddings=False", "meta_tokens=3", "meta_tokens=2 normalize_logits=True"]


def padded_batch() -> tuple[Tensor, Tensor]:
    tokens, mask = torch.randint(1, 64, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0
    mask[1, :1] = 0
    return tokens, mask


@pytest.mark.parametrize("fields", VARIANTS)
def test_greedy_generation_is_the_same_with_and_without_cache(wrap: Wrap, fields: str) -> None:
    model, (tokens, mask) = wrap(fields), padded_batch()
    arguments = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    cached = model.generate(tokens, **arguments)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **arguments))
    # What stands to the left as padding must not matter: each row alone, by the Decoder.
    for row, first in enumerate(mask.argmax(dim=1).tolist()):
        decoder = Decoder(model.model, max_tokens=40)
        alone = torch.cat([*decoder.generate(tokens[row : row + 1, first:], 14)])
        assert torch.equal(cached[row, 9:], alone)


def test_padding_on_either_side_and_in_between_does_not_matter(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (1, 6))
    with torch.no_grad():
        plain = model(tokens).logits
        for places in itertools.combinations(range(8), 6):
            padded, mask = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8)
            padded[:, places], mask[:, places] = tokens, 1
            for use_cache in (True, False):
                logits = model(padded, attention_mask=mask, use_cache=use_cache).logits
                torch.testing.assert_close(logits[:, places], plain, rtol=1e-4, atol=1e-5)


def test_sampling_is_seeded_and_uses_the_cache(wrap: Wrap) -> None:
    model, (tokens, mask) = wrap(), padded_batch()
    runs = []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        runs.append(
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=12, do_sample=True, use_cache=use_cache
            )
        )
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_beam_search_reorders_the_cache(wrap: Wrap) -> None:
    model, (tokens, mask) = wrap(), padded_batch()
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": 3}
    cached = model.generate(tokens, **arguments)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **arguments))


@pytest.mark.parametrize("chunk", [1, 4])
def test_prompt_may_be_read_in_chunks(wrap: Wrap, chunk: int) -> None:
    model, (tokens, mask) = wrap(), padded_batch()
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    chunked = model.generate(tokens, prefill_chunk_size=chunk, **arguments)
    assert torch.equal(chunked, model.generate(tokens, **arguments))


def test_cache_grows_and_goes_on_with_more_text(wrap: Wrap) -> None:
    model, (tokens, mask) = wrap(), padded_batch()
    with torch.no_grad():
        cache = model(tokens[:, :6], attention_mask=mask[:, :6]).past_key_values
        assert cache.max_tokens == 6
        rest = model(tokens[:, 6:], attention_mask=mask, past_key_values=cache).logits
        whole = model(tokens, attention_mask=mask, use_cache=False).logits
    assert cache.max_tokens == 12
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-5)


def test_generation_goes_on_from_a_cache_of_ones_own(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (2, 5))
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(tokens, max_new_tokens=4, **arguments)
    more = model.generate(
        first.sequences, max_new_tokens=4, past_key_values=first.past_key_values, **arguments
    )
    at_once = model.generate(tokens, max_new_tokens=8, **arguments)
    assert torch.equal(more.sequences, at_once.sequences)


def test_generate_takes_room_once(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (1, 5))
    out = model.generate(tokens, max_new_tokens=7, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, SLMCache)
    assert out.past_key_values.max_tokens == 5 + 7 - 1


@pytest.mark.parametrize("fields", VARIANTS)
def test_loss_is_cross_entropy_and_reaches_every_parameter(wrap: Wrap, fields: str) -> None:
    model, tokens = wrap(fields), torch.randint(1, 64, (2, 7))
    labels = tokens.clone()
    labels[0, 3] = -100
    out = model(tokens, labels=labels)
    expected = F.cross_entropy(
        model.model(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.numel() and p.grad is None]
    assert missing == []
    assert out.past_key_values is None


def test_loss_can_be_a_mean_over_more_than_the_batch(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (2, 7))
    whole = model(tokens, labels=tokens).loss
    part = model(tokens, labels=tokens, num_items_in_batch=24).loss
    torch.testing.assert_close(part, whole / 2)


@pytest.mark.parametrize("fields", VARIANTS)
def test_saving_and_loading_gives_the_same_model(wrap: Wrap, fields: str, tmp_path: Path) -> None:
    model, tokens = wrap(fields), torch.randint(1, 64, (2, 7))
    model.save_pretrained(tmp_path)
    loaded, info = SLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.architecture == str(model.model.architecture)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_missing_weights_are_initialised_and_others_left_alone(wrap: Wrap, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = wrap()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [name for name in weights if re.search(r"A_log|\.D$|dt_bias|meta_tokens", name)]
    kept = {name: value for name, value in weights.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = SLMForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    for name in lost:
        assert state[name].isfinite().all()
        assert state[name].abs().sum() > 0


def test_runs_in_bfloat16(wrap: Wrap, tmp_path: Path) -> None:
    wrap().save_pretrained(tmp_path)
    model = SLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(1, 64, (1, 5))
    out = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert model.dtype == torch.bfloat16
    assert out.shape == (1, 11)


@pytest.mark.parametrize("fields", ["tie_embeddings=False", "meta_tokens=3"])
def test_vocabulary_can_be_extended(wrap: Wrap, fields: str, tmp_path: Path) -> None:
    model, tokens = wrap(fields), torch.randint(1, 64, (1, 5))
    with torch.no_grad():
        before = model(tokens).logits
        model.resize_token_embeddings(70, mean_resizing=False)
        model.save_pretrained(tmp_path)
        after = SLMForCausalLM.from_pretrained(tmp_path)(tokens).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :64], before)


def test_what_cannot_be_done_is_refused(wrap: Wrap) -> None:
    model, tokens = wrap(), torch.randint(1, 64, (1, 5))
    with pytest.raises(ValueError, match="must be a SLMCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="records no gradient"):
        model(tokens, labels=tokens, use_cache=True)
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(tokens, position_ids=tokens, max_new_tokens=2)
    with pytest.raises(ValueError, match="hidden_size: the architecture says 32, got 48"):
        SLMConfig(model.config.architecture, hidden_size=48)
