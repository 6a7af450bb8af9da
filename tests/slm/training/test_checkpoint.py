"""A checkpoint gives its model back, or is refused by its name."""

from pathlib import Path

import pytest
import torch

from slm.architecture import Architecture
from slm.config import ConfigError
from slm.model import LanguageModel
from slm.training.checkpoint import checkpoint_file, load_checkpoint

TEXT = (
    "width=32 vocab_size=20 meta_tokens=2 | attention(head_dim=16) mamba2(head_dim=16,state_size=8)"
)


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(Architecture.parse(TEXT)).eval()


def save(model: LanguageModel, path: Path, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {"architecture": TEXT},
    }
    torch.save(content | changes, path)
    return path


def test_the_model_comes_back(model: LanguageModel, tmp_path: Path) -> None:
    file = save(model, tmp_path / "run" / "checkpoints" / "last.ckpt")
    tokens = torch.randint(20, (2, 7))
    for path in (file, str(file), tmp_path / "run"):
        loaded, tokenizer_file = load_checkpoint(path)
        assert tokenizer_file == tmp_path / "run" / "tokenizer.json"
        assert not loaded.training
        assert str(loaded.architecture) == TEXT
        assert torch.equal(loaded(tokens), model(tokens))
    assert checkpoint_file(tmp_path / "run") == file


def test_a_cut_file_is_refused_by_name(model: LanguageModel, tmp_path: Path) -> None:
    file = save(model, tmp_path / "half.ckpt")
    content = file.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 30):
        file.write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"half\.ckpt'"):
            load_checkpoint(file)


def test_damage_inside_is_refused_by_name(model: LanguageModel, tmp_path: Path) -> None:
    file = save(model, tmp_path / "damaged.ckpt")
    content = bytearray(file.read_bytes())
    place = content.index(b"data.pkl") + 60
    content[place : place + 200] = bytes(200)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"damaged\.ckpt'"):
        load_checkpoint(file)


class Payload:
    """What a pickle can do when it is loaded without care."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("touched"),)


def test_code_in_a_file_is_not_run(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = save(model, tmp_path / "evil.ckpt", extra=Payload())
    with pytest.raises(ConfigError, match=r"evil\.ckpt': cannot be read"):
        load_checkpoint(file)
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"hyper_parameters": {}},
        {"hyper_parameters": {"architecture": "width=0 vocab_size=2 | ffn"}},
        {"hyper_parameters": {"architecture": TEXT.replace("width=32", "width=64")}},
        {"state_dict": {}},
        {"state_dict": None},
    ],
)
def test_another_content_is_refused_by_name(
    model: LanguageModel, tmp_path: Path, changes: dict
) -> None:
    file = save(model, tmp_path / "other.ckpt", **changes)
    with pytest.raises(ConfigError, match=r"other\.ckpt': does not hold a model"):
        load_checkpoint(file)


def test_no_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.ckpt': no such file"):
        load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ConfigError, match=r"last\.ckpt': no such file"):
        load_checkpoint(tmp_path)
