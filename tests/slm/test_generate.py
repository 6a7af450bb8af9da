"""`python -m slm.generate`: text from whatever a model was written to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import run_program
from tokenizers import Tokenizer

from slm.architecture import Architecture
from slm.config import ConfigError, read
from slm.data.config import TokenizerConfig
from slm.data.tokenizer import build_tokenizer
from slm.generate import GenerateConfig, stream
from slm.model import LanguageModel


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose model was not trained."""
    config = TokenizerConfig(name="bpe", vocab_size=300)
    tokenizer = build_tokenizer(config, ["Ça va — être ou ne pas être ?\n"] * 20)
    vocab_size = tokenizer.get_vocab_size()
    model = LanguageModel(
        Architecture.parse(f"width=32 vocab_size={vocab_size} | attention(head_dim=8) ffn")
    )
    (tmp_path / "checkpoints").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    checkpoint = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"architecture": str(model.architecture)},
    }
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path


def greedy(run: Path, prompt: str, new_tokens: int) -> list[int]:
    """What the model says, computed without any cache."""
    from slm.hub.loading import load_model

    model, tokenizer_file = load_model(run)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokens = tokenizer.encode(prompt).ids
    for _ in range(new_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


def test_streams_what_the_model_says(run: Path) -> None:
    config = GenerateConfig(checkpoint=run, prompt="Ça", new_tokens=12, temperature=0, device="cpu")
    text = "Ça" + "".join(stream(config))
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    whole = tokenizer.decode(greedy(run, "Ça", 12))
    # A character may be unfinished at the end.
    assert whole.startswith(text)
    assert len(text) >= len("Ça") + 1


def test_sampling_follows_the_seed(run: Path) -> None:
    def text(seed: int) -> str:
        config = GenerateConfig(checkpoint=run, new_tokens=20, seed=seed, device="cpu")
        return "".join(stream(config))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_command_prints_prompt_and_text(run: Path, tmp_path: Path) -> None:
    arguments = [f"checkpoint={run}", "prompt='Ça va'", "new_tokens=6", "temperature=0"]
    done = run_program("-m", "slm.generate", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    config = GenerateConfig(checkpoint=run, prompt="Ça va", new_tokens=6, temperature=0)
    assert done.stdout == "Ça va" + "".join(stream(config)) + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
        (lambda run: (run / "checkpoints/last.ckpt").write_text("x"), "no checkpoint"),
        (lambda run: (run / "config.json").write_text("{}"), "holds no architecture"),
    ],
)
def test_damaged_files_are_named(run: Path, change: Callable[[Path], int], message: str) -> None:
    change(run)
    with pytest.raises(ConfigError, match=message):
        next(stream(GenerateConfig(checkpoint=run)))


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        read(GenerateConfig, {"checkpoint": str(tmp_path / "no.ckpt")})
