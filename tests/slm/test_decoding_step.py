"""Compiled steps against steps that are not; what is kept on disk of them."""

import logging
from pathlib import Path

import pytest
import torch
from numerics import relative_rms
from torch import Tensor

from slm.architecture import Architecture
from slm.compilation import Argument, CompilationError, cache_folder, library_path
from slm.decoding_step import init_state, pieces
from slm.generation import Decoder
from slm.model import LanguageModel

# Every operator, windows of which one ends within a block of places, and what heads can have.
ALL = (
    "width=32 vocab_size=60 meta_tokens=3 normalize_logits=True | "
    "attention(head_dim=16,query_groups=2) mamba(state_size=8) attention(head_dim=16,window=7) "
    "mamba2(head_dim=16,state_size=16) attention(head_dim=16,window=7,pinned_tokens=3) "
    "linear_attention(head_dim=16) attention(head_dim=16,window=80,qk_norm=True) gla(head_dim=32) "
    "deltanet(head_dim=16) gated_deltanet(head_dim=16) rwkv7(head_dim=16) kda(head_dim=16) "
    "short_convolution ffn ffn(activation=relu2)"
)
FEW = "width=32 vocab_size=60 meta_tokens=3 | attention(head_dim=16) ffn mamba2(head_dim=16)"
ONE = "width=32 vocab_size=60 | ffn"
# What reads the tokens' positions, and a recurrence.
SOME = (
    "width=32 vocab_size=60 meta_tokens=3 | attention(head_dim=16,query_groups=2) "
    "attention(head_dim=16,window=7,pinned_tokens=3) attention(head_dim=16,window=80,qk_norm=True) "
    "mamba2(head_dim=16,state_size=16)"
)
# More than two blocks of places.
NUM_STEPS = 150


def build(text: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model whose layers all matter."""
    model = LanguageModel(Architecture.parse(text))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval().to(dtype)


def worst_error(
    model: LanguageModel, decoder: Decoder, batch_size: int, lengths: Tensor | None
) -> float:
    """Of the logits of steps, relative RMS, against a decoder that is not compiled."""
    plain = Decoder(model, 9 + NUM_STEPS, batch_size)
    worst = 0.0
    for _ in range(2):  # The second request finds nothing of the first.
        prompt = torch.randint(60, (batch_size, 9))
        plain.prefill(prompt, lengths)
        decoder.prefill(prompt, lengths)
        for _ in range(NUM_STEPS):
            tokens = torch.randint(60, (batch_size,))
            worst = max(worst, relative_rms(decoder.step(tokens), plain.step(tokens)))
    return worst


def test_whole_step_equals_eager() -> None:
    model = build(ALL)
    assert worst_error(model, Decoder(model, 9 + NUM_STEPS, 1, "step"), 1, None) < 2e-5


def test_rows_of_different_lengths_equal_eager() -> None:
    model = build(SOME)
    lengths = torch.tensor([4, 9, 1])
    assert worst_error(model, Decoder(model, 9 + NUM_STEPS, 3, "step"), 3, lengths) < 2e-5


def test_operators_equal_eager() -> None:
    model = build(FEW)
    assert worst_error(model, Decoder(model, 9 + NUM_STEPS, 1, "operator"), 1, None) < 1e-5


def test_many_rows_in_bfloat16_equal_eager() -> None:
    """Both round to eight bits after each operator, not always to the same side."""
    model = build(FEW, torch.bfloat16)
    assert worst_error(model, Decoder(model, 9 + NUM_STEPS, 6, "step"), 6, None) < 0.02


def test_tokens_are_looked_at_before_a_library_takes_them() -> None:
    """Libraries read what is in memory, whatever strides, dtype and shape say."""
    model = build(ONE)
    plain, decoder = Decoder(model, 20, 3), Decoder(model, 20, 3, "operator")
    tokens = torch.randint(60, (3, 5))
    for each in (plain, decoder):
        each.prefill(tokens)
    for given in (tokens[:, 0], tokens[:, 1].to(torch.int32)):
        assert relative_rms(decoder.step(given), plain.step(given.long())) < 1e-5
    with pytest.raises(ValueError, match=r"tokens: expected \[3\], got \[2\]"):
        decoder.step(tokens[:2, 0])


def test_another_dtype_wants_another_decoder() -> None:
    model = build(ONE)
    decoder = Decoder(model, 20, 3, "operator")
    model.bfloat16()
    with pytest.raises(ValueError, match="make another decoder"):
        decoder.prefill(torch.randint(60, (3, 5)))


@torch.no_grad()
def test_greedy_equals_decoding_without_state() -> None:
    model = build(SOME)
    decoder = Decoder(model, 40, 3, "step")
    prompt = torch.randint(60, (3, 5))
    expected = prompt
    for _ in range(30):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(torch.stack(list(decoder.generate(prompt, 30)), 1), expected[:, 5:])


def test_changed_weights_are_seen() -> None:
    """Also what is computed from them once, the norms of the head's rows."""
    text = "width=32 vocab_size=60 normalize_logits=True | attention(head_dim=16) ffn"
    model = build(text)
    decoder = Decoder(model, 20, 1, "operator")
    prompt = torch.randint(60, (1, 5))
    generated = [torch.cat(list(decoder.generate(prompt, 8)))]
    for assign in (False, True):
        changed = build(text)
        model.load_state_dict(changed.state_dict(), assign=assign)
        generated.append(torch.cat(list(decoder.generate(prompt, 8))))
        expected = torch.cat(list(Decoder(changed, 20, 1).generate(prompt, 8)))
        assert torch.equal(generated[-1], expected)
    assert not torch.equal(generated[0], generated[1])


def test_a_bad_library_is_named_and_made_anew(caplog: pytest.LogCaptureFixture) -> None:
    model = build(ONE)
    decoder = Decoder(model, 20, 3, "operator")
    state = init_state(model, 3, 20)
    with torch.inference_mode():
        path = pieces(model, state, 3, "operator")[0].library_path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        again = Decoder(model, 20, 3, "operator")
    assert str(path) in caplog.text
    tokens = torch.randint(60, (3,))
    decoder.prefill(tokens[:, None])
    again.prefill(tokens[:, None])
    assert torch.equal(decoder.step(tokens), again.step(tokens))
    assert [each for each in cache_folder().glob(f"{path.stem}*") if each.suffix == ".pt2"] == [
        path
    ]


def path_of(x: Tensor, varying: tuple[int, ...] = (), name: str = "f") -> Path:
    return library_path(name, [Argument(x, varying)])


def test_the_key_holds_what_is_compiled_for_and_nothing_else() -> None:
    x = torch.zeros(4, 6)
    assert path_of(x) == path_of(torch.ones(4, 6))
    others = [
        path_of(x.double()),
        path_of(x[:3]),
        path_of(torch.zeros(6, 4).T),
        path_of(x, varying=(0,)),
        path_of(x, name="g"),
    ]
    torch.set_num_threads(2)
    others.append(path_of(x))
    torch.set_num_threads(1)
    assert len({path_of(x), *others}) == 1 + len(others)
    assert path_of(x, varying=(0,)) == path_of(x[:3], varying=(0,))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_library_serves_every_length(batch_size: int) -> None:
    model = build(FEW)

    def paths(max_tokens: int) -> list[Path]:
        with torch.inference_mode():
            state = init_state(model, batch_size, max_tokens)
            return [p.library_path for p in pieces(model, state, batch_size, "operator")]

    assert paths(70) == paths(9000)


def test_where_nothing_can_be_kept_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CompilationError, match=r"Not a directory.*SLM_CACHE_DIR names another"):
        Decoder(build("width=16 vocab_size=20 | ffn"), 9, 1, "operator")


def test_what_the_compiler_says_is_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path))
    broken = torch._inductor.config.patch({"cpp.cxx": (None, "/bin/false")})
    with broken, pytest.raises(CompilationError, match="cannot be compiled"):
        Decoder(build("width=16 vocab_size=20 | ffn"), 9, 1, "operator")
    assert not list(tmp_path.rglob("*.pt2"))
