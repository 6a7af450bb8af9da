"""The code in an export: what it needs, what it makes of hostile files, and doing without it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HOSTILE = """
import json
results = {}
for folder in sys.argv[2:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        results[folder] = None
    except Exception as error:
        results[folder] = [type(error).__name__, str(error)]
print(json.dumps(results))
"""


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def with_architecture(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["architecture"] = change(config["architecture"])
    file.write_text(json.dumps(config))


def untouched(folder: Path) -> None:
    pass


def unknown_operator(folder: Path) -> None:
    with_architecture(folder, lambda text: text.replace("mamba2", "mamba9"))


def unknown_field(folder: Path) -> None:
    with_architecture(folder, lambda text: text.replace("state_size", "state_sise"))


def no_architecture(folder: Path) -> None:
    with_architecture(folder, lambda text: "import os")


def contradiction(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 48}))


def other_shapes(folder: Path) -> None:
    with_architecture(folder, lambda text: text.replace("state_size=8", "state_size=16"))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04not weights")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = {"model.embedding.weight": Payload(folder / "was executed")}
    torch.save(content, folder / "pytorch_model.bin")


def bare_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = pickle.dumps(Payload(folder / "was executed"))
    (folder / "pytorch_model.bin").write_bytes(content)


# What is done to an export, and the type and parts of the error that follows.
CASES: dict[Callable[[Path], None], tuple[str, ...]] = {
    untouched: (),
    unknown_operator: ("ValueError", "operator 'mamba9' is unknown; known: attention"),
    unknown_field: ("ValueError", "mamba2: unknown field 'state_sise'; known: expand"),
    no_architecture: ("ValueError", "architecture 'import os': expected 'width=…"),
    contradiction: ("ValueError", "hidden_size: the architecture says 32, got 48"),
    other_shapes: (
        "ValueError",
        "not the weights of its config: ",
        "model.layers.2.operator.convolution.bias is [80], not [96]",
    ),
    truncated: ("OSError", "the weights cannot be read: "),
    no_safetensors: ("OSError", "the weights cannot be read: "),
    no_weights: ("OSError", "no file named model.safetensors"),
    pickled: ("OSError", "the weights are a pickle of more than tensors, which could run code"),
    bare_pickle: ("OSError", "the weights are a pickle of more than tensors, which could run code"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python on its own, with no network and its own cache of code; what it prints."""
    cache = tmp_path_factory.mktemp("modules")

    def run(*arguments: str) -> str:
        environment = os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_hostile_files_are_refused_and_named(
    exported: object, stranger: str, run: Callable[..., str], tmp_path: Path
) -> None:
    folders = {}
    for spoil in CASES:
        folders[spoil] = folder = tmp_path / spoil.__name__
        shutil.copytree(exported.folder, folder)
        spoil(folder)
    tokenizer = str(exported.folder / "tokenizer.json")
    printed = run("-I", "-c", stranger + HOSTILE, tokenizer, *map(str, folders.values()))
    results = json.loads(printed)
    assert results.pop(str(folders[untouched])) is None
    for (kind, *parts), found in zip(list(CASES.values())[1:], results.values(), strict=True):
        assert found[0] == kind, found
        assert all(part in found[1] for part in parts), found
    assert not list(tmp_path.rglob("was executed"))


REGISTERED = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from slm.hub.auto import register
folder, copy = sys.argv[1:]
remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
register()
register()
ours = AutoModelForCausalLM.from_pretrained(folder)
trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
tokens = AutoTokenizer.from_pretrained(folder)("to be", return_tensors="pt")
ours.save_pretrained(copy)
again = AutoModelForCausalLM.from_pretrained(copy)
models = (remote, ours, trusted, again)
generated = [m.generate(**tokens, max_new_tokens=4, do_sample=False).tolist() for m in models]
print(json.dumps({
    "modules": [type(m).__module__ for m in (*models, fresh)],
    "generated": generated,
}))
"""


def test_registered_classes_need_no_remote_code(
    exported: object, run: Callable[..., str], tmp_path: Path
) -> None:
    found = json.loads(run("-c", REGISTERED, str(exported.folder), str(tmp_path / "copy")))
    remote, *ours = found["modules"]
    assert remote.startswith("transformers_modules.")
    assert set(ours) == {"slm.hub.modeling"}
    assert all(tokens == found["generated"][0] for tokens in found["generated"])
    # No code lies beside the copy, and its config says of none.
    assert "auto_map" in json.loads((exported.folder / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "copy" / "config.json").read_text())
