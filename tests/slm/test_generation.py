import pytest
import torch

from slm.architecture import Architecture
from slm.generation import Decoder, Sampler
from slm.model import LanguageModel

ARCHITECTURE = Architecture.parse(
    "width=32 vocab_size=40 meta_tokens=3 | "
    "attention(head_dim=16) ffn deltanet(head_dim=16) mamba2(state_size=8) "
    "attention(window=6,head_dim=8)"
)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ARCHITECTURE).eval()


@torch.no_grad()
def greedy_without_cache(model: LanguageModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.shape[1] :]


def test_greedy_equals_decoding_without_state(model: LanguageModel) -> None:
    prompt = torch.randint(40, (3, 5))
    decoder = Decoder(model, max_tokens=30, batch_size=3)
    for _ in range(2):  # The second request finds nothing of the first.
        generated = torch.stack(list(decoder.generate(prompt, 20)), dim=1)
        assert torch.equal(generated, greedy_without_cache(model, prompt, 20))


def test_sampling_is_seeded(model: LanguageModel) -> None:
    prompt = torch.randint(40, (1, 5))
    decoder = Decoder(model, max_tokens=40)

    def sample(seed: int) -> list[int]:
        return [int(t) for t in decoder.generate(prompt, 30, temperature=1.0, seed=seed)]

    assert sample(1) == sample(1) != sample(2)


def test_stop_tokens_end_generation(model: LanguageModel) -> None:
    prompt = torch.randint(40, (1, 5))
    decoder = Decoder(model, max_tokens=40)
    free = [int(t) for t in decoder.generate(prompt, 30, temperature=1.0)]
    stop = free[4]
    stopped = [int(t) for t in decoder.generate(prompt, 30, temperature=1.0, stop_tokens=[stop])]
    assert stopped == free[: free.index(stop) + 1]


def test_top_k_and_top_p_keep_the_right_tokens() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits = probabilities.log().expand(4000, -1)

    def frequencies(top_k: int | None, top_p: float | None) -> torch.Tensor:
        sampler = Sampler(1.0, top_k, top_p, seed=0, device=logits.device)
        return sampler(logits).bincount(minlength=4) / 4000

    torch.testing.assert_close(frequencies(None, None), probabilities[0], rtol=0, atol=0.03)
    kept = torch.tensor([0.625, 0.375, 0, 0])
    torch.testing.assert_close(frequencies(2, None), kept, rtol=0, atol=0.03)
    # 0.5 alone does not reach 0.6; with 0.3 the set does.
    torch.testing.assert_close(frequencies(None, 0.6), kept, rtol=0, atol=0.03)


def test_limits_are_named(model: LanguageModel) -> None:
    decoder = Decoder(model, max_tokens=8)
    prompt = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_tokens=8"):
        list(decoder.generate(prompt, 5))
    assert len(list(decoder.generate(prompt, 4))) == 4
    with pytest.raises(ValueError, match="9 tokens"):
        decoder.step(prompt[:, 0])
    for setting in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            list(decoder.generate(prompt, 2, **{"temperature": 1.0, **setting}))


@pytest.mark.parametrize("lengths", [None, [11, 1, 4]])
def test_long_prompts_are_read_in_pieces(
    model: LanguageModel, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = torch.randint(40, (3, 11))
    real = None if lengths is None else torch.tensor(lengths)

    def read() -> list[torch.Tensor]:
        decoder = Decoder(model, max_tokens=20, batch_size=3)
        return [decoder.prefill(prompt, real), *decoder.generate(prompt, 5, lengths=real)]

    whole = read()
    # Ends with a piece of one token, or of rows that are all padding.
    monkeypatch.setattr("slm.generation.PREFILL_TOKENS", 5)
    pieces = read()
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, pieces[1:], whole[1:]))


def test_after_pretending_steps_are_at_that_context(model: LanguageModel) -> None:
    decoder = Decoder(model, max_tokens=20)
    token = torch.tensor([3])
    decoder.prefill(token[None])
    decoder.pretend(18)
    assert decoder.num_tokens == 18
    attention, *_, window = decoder.state.operators
    assert attention.num_used == 3 + 18
    assert window.num_used == 6
    decoder.step(token)
    assert int(attention.position) == int(window.position) == 3 + 19
    with pytest.raises(ValueError, match="21 tokens"):
        decoder.pretend(21)
    # And nothing of it is left.
    fresh = Decoder(model, max_tokens=20)
    assert torch.equal(decoder.prefill(token[None]), fresh.prefill(token[None]))
