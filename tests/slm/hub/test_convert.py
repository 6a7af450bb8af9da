"""Conversion between formats by the command, checked by whoever loads what comes out."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program
from safetensors.torch import load_file

from slm.config import ConfigError
from slm.hub.loading import load_model, load_model_and_tokenizer

GOLDEN = Path(__file__).parent / "nemotron_flash"
LLAMA = "attention(head_dim=8) ffn attention(head_dim=8) ffn"


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program("-m", "slm.hub.convert", *arguments, folder=Path.cwd())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nemotron_flash_becomes_ours_and_back(dtype: str, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    done = convert(f"path={GOLDEN / 'untied'}", f"out={ours}", f"dtype={dtype}", "license=other")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["max_abs_logit_difference"] < 1e-4
    assert report["cached_equals_uncached"] is True
    assert json.loads((ours / "config.json").read_text())["dtype"] == dtype
    card = (ours / "README.md").read_text()
    assert "license: other" in card
    assert "converted by slm-frontier" in card
    assert "trust_remote_code=True" in card

    done = convert(f"path={ours}", f"out={back}", "format=nemotron_flash", "license=other")
    assert done.returncode == 0, done.stderr
    expected = load_file(GOLDEN / "untied" / "model.safetensors")
    actual = load_file(back / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor.to(getattr(torch, dtype)))
    assert json.loads((back / "config.json").read_text())["dtype"] == dtype
    assert "NVIDIA" in (back / "README.md").read_text()


def test_an_export_becomes_a_class_of_transformers(
    make_run: Any, run_export: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", "", LLAMA)
    done = run_export(f"checkpoint={run}", "format=native", "new_tokens=4", "context_tokens=512")
    assert done.returncode == 0, done.stderr
    folder = run / "export_native"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 512
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    assert not list(folder.glob("*.py"))
    report = json.loads((run / "export_native.json").read_text())
    assert report["sample"].startswith("The")

    # In the layout of Nemotron-Flash there is no model without the division of logits.
    done = run_export(f"checkpoint={run}", "format=nemotron_flash")
    assert done.returncode == 2
    assert "normalize_logits: must be True" in done.stderr
    assert not (run / "export_nemotron_flash").exists()


def test_the_tokenizer_goes_along(make_run: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(GOLDEN / "default_rope", path)
    run = make_run(tmp_path / "run", "", "ffn")
    shutil.copy(run / "tokenizer.json", path)
    done = convert(f"path={path}", f"out={out}", "license=other", "new_tokens=4")
    assert done.returncode == 0, done.stderr
    assert (out / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert json.loads(done.stdout)["sample"]
    model, tokenizer_file = load_model(out)
    assert model.architecture.meta_tokens == 8
    assert tokenizer_file == out / "tokenizer.json"
    # Theirs says in its config what ends a text, a run's tokenizer by beginning with it.
    assert load_model_and_tokenizer(path)[2] == load_model_and_tokenizer(out)[2] == [2]
    assert load_model_and_tokenizer(run)[2] == [0]
    config = json.loads((path / "config.json").read_text())
    converted = json.loads((out / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert converted[name] == config[name]
    for given, problem in (
        (["</s>"], "eos_token_id"),
        (-5, "eos_token_id: must be ids, got -5"),
        (10**6, "the model knows 320"),
    ):
        (path / "config.json").write_text(json.dumps(config | {"eos_token_id": given}))
        with pytest.raises(ConfigError, match=problem):
            load_model_and_tokenizer(path)
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 5]}))
    assert load_model_and_tokenizer(path)[2] == [2, 5]


def test_problems_are_gathered_and_nothing_is_lost(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text('{"model_type": "llama"}')
    done = convert(f"path={tmp_path / 'none'}", f"out={mine}", "license=other")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: path: '{tmp_path / 'none'}': there is no config.json",
        f"error: out: '{mine}' exists and is not an export",
    ]
    done = convert(f"path={mine}", f"out={tmp_path / 'out'}", "license=other")
    assert done.returncode == 2
    assert "model_type 'llama' is not known" in done.stderr
    assert not (tmp_path / "out").exists()


EVIL = """
import pathlib
from transformers import PreTrainedTokenizerFast

pathlib.Path(__file__).with_name("was run").touch()


class Evil(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_a_tokenizer_is_neither_run_nor_passed_on(make_run: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(GOLDEN / "default_rope", path)
    run = make_run(tmp_path / "run", "", "ffn")
    shutil.copy(run / "tokenizer.json", path)
    (path / "evil.py").write_text(EVIL)
    tokenizer = {
        "auto_map": {"AutoTokenizer": [None, f"{path}--evil.Evil"]},
        "tokenizer_class": "Evil",
        "model_max_length": 77,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    done = convert(f"path={path}", f"out={out}", "license=other", "new_tokens=2")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("was run"))
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 77}
    assert not (out / "evil.py").exists()
