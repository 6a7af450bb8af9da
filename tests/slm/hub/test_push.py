"""Upload by the real client to a server on this machine."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve

from slm.hub.loading import load_model
from slm.hub.weights import write_weights
from tests.slm.hub.conftest import build_model

TOKEN = "hf_" + "secret" * 5


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(TOKEN) as server:
        yield server


@pytest.fixture
def at_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """What the client needs to talk to it, as a person has set it up."""
    values = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return hub


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_export(*arguments: str) -> subprocess.CompletedProcess[str]:
    """By an interpreter of its own, which reads where the hub is when it imports the client."""
    return run([sys.executable, "-m", "slm.hub.export", *arguments])


def push_command(folder: Path) -> list[str]:
    code = "import sys, pathlib; from slm.hub.push import push;"
    code += "push(pathlib.Path(sys.argv[1]), 'local/tiny', True)"
    return [sys.executable, "-c", code, str(folder)]


def test_export_is_uploaded_and_can_be_loaded_from_there(
    at_hub: Hub, make_run: Any, tmp_path: Path
) -> None:
    trained = make_run(tmp_path / "run")
    command = [f"checkpoint={trained}", "push_to=local/tiny", "new_tokens=4"]
    rehearsal = run_export(*command, "dry_run=true")
    assert rehearsal.returncode == 0, rehearsal.stderr
    assert re.search(r"^ +[\d,]+  model\.safetensors$", rehearsal.stdout, re.M)
    assert rehearsal.stdout.splitlines()[-1].endswith("bytes would go to local/tiny")
    assert not at_hub.repositories

    done = run_export(*command)
    assert done.returncode == 0, done.stderr
    repository = at_hub.repositories["local/tiny"]
    assert repository.private
    files = {path.name: path.read_bytes() for path in (trained / "export").iterdir()}
    assert repository.files == files
    address = done.stdout.splitlines()[-1]
    assert address == f"uploaded: {at_hub.endpoint}/local/tiny/commit/{repository.revision}"
    # Nowhere is a token: neither printed, nor written, nor sent as a file.
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert TOKEN not in done.stdout + done.stderr + rehearsal.stdout + rehearsal.stderr
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]

    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "m = M.from_pretrained('local/tiny', trust_remote_code=True);"
        "t = T.from_pretrained('local/tiny', trust_remote_code=True);"
        "print(type(m).__name__, m(**t('to be', return_tensors='pt')).logits.shape[-1])"
    )
    loaded = run([sys.executable, "-I", "-c", code])
    vocab_size = load_model(trained)[0].architecture.vocab_size
    assert loaded.stdout.strip() == f"SLMForCausalLM {vocab_size}", loaded.stderr


def test_a_broken_upload_goes_on_with_what_is_missing(
    at_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.hub.weights.MAX_SHARD_SIZE", "10KB")
    folder = tmp_path / "export"
    folder.mkdir()
    write_weights(build_model().state_dict(), folder)
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 3

    at_hub.room = 2
    with subprocess.Popen(push_command(folder), stderr=subprocess.DEVNULL) as broken:
        assert at_hub.is_full.wait(60)
        broken.kill()
    assert len(at_hub.received) == 2
    assert not at_hub.repositories["local/tiny"].files

    at_hub.room = None
    at_hub.go_on.set()
    whole = run(push_command(folder))
    assert whole.returncode == 0, whole.stderr
    # Each of them came once.
    assert len(at_hub.received) == len(shards)
    assert shards <= at_hub.repositories["local/tiny"].files.keys()


def test_what_an_earlier_export_left_is_taken_away(
    at_hub: Hub, make_run: Any, tmp_path: Path
) -> None:
    trained = make_run(tmp_path / "run", "", "ffn")
    assert run_export(f"checkpoint={trained}", "push_to=local/tiny", "new_tokens=4").returncode == 0
    files = at_hub.repositories["local/tiny"].files
    files |= {"model-00001-of-00002.safetensors": b"old", "slm_old.py": b"old", "mine.md": b"mine"}
    assert run_export(f"checkpoint={trained}", "push_to=local/tiny", "new_tokens=4").returncode == 0
    ours = {path.name for path in (trained / "export").iterdir()}
    assert files.keys() == ours | {"mine.md"}


def test_a_refused_token_is_said_in_one_line(
    at_hub: Hub, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "hf_" + "wrong" * 6
    monkeypatch.setenv("HF_TOKEN", wrong)
    trained = make_run(tmp_path / "run", "", "ffn")
    done = run_export(f"checkpoint={trained}", "push_to=local/tiny", "new_tokens=4")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "refuses: 401" in done.stderr
    assert "hf auth login" in done.stderr
    assert wrong not in done.stdout + done.stderr
    # The export itself is there, and another try does not make it again.
    assert (trained / "export" / "model.safetensors").is_file()
