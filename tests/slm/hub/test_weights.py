"""Folders of weights that are not what they should be, or larger than one file."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from slm.config import ConfigError
from slm.hub.formats import FormatConfig, special_tokens, write_model
from slm.hub.loading import load_model
from slm.hub.modeling import SLMForCausalLM
from slm.hub.weights import read_weights
from tests.slm.hub.conftest import build_model


class Bomb:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was read')",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(build_model(), FormatConfig(), special_tokens(0), tmp_path)
    return tmp_path


def problem(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    (found,) = error.value.problems
    assert str(folder) in found
    return found


def test_a_pickle_is_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert problem(folder).endswith(
        "no such file; 'pytorch_model.bin' is a pickle, which is not read"
    )


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_weights_are_refused(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors': cannot be read: " in problem(folder)


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../else.safetensors"}}']
)
def test_an_index_must_be_one_of_this_folder(folder: Path, index: str) -> None:
    # transformers, too, looks for the whole first.
    (folder / "model.safetensors.index.json").write_text(index)
    load_model(folder)
    (folder / "model.safetensors").unlink()
    assert "index.json': is damaged" in problem(folder) or "is no file's name" in problem(folder)


def test_a_config_of_another_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architecture": "width=8 | teleport"})
    )
    assert "operator 'teleport' is unknown" in problem(folder) or "vocab_size" in problem(folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "architecture": config["architecture"].replace("32", "64", 1)})
    )
    assert "size mismatch" in problem(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type 'llama' is not known" in problem(folder)


def test_shards_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.hub.formats.MAX_SHARD_SIZE", "10KB")
    model = build_model("tie_embeddings=False")
    write_model(model, FormatConfig(), special_tokens(0), tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    back, _ = load_model(tmp_path)
    weights = read_weights(tmp_path)
    assert len(weights) == len(model.state_dict())
    tokens = torch.randint(64, (1, 9))
    theirs = SLMForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(back(tokens), model(tokens))
        assert torch.equal(theirs(tokens).logits, model(tokens))
