"""A run folder with a model that was not trained, and what is exported from it."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from programs import run_program

from slm.architecture import Architecture
from slm.data.config import TokenizerConfig
from slm.data.tokenizer import build_tokenizer
from slm.hub.configuration import SLMConfig
from slm.hub.modeling import SLMForCausalLM
from slm.model import LanguageModel

OPERATORS = (
    "attention(head_dim=8,query_groups=2,qk_norm=True) ffn mamba2(head_dim=16,state_size=8) ffn "
    "attention(head_dim=8,window=5) deltanet(head_dim=8) ffn"
)


def build_model(
    fields: str = "", operators: str = OPERATORS, vocab_size: int = 64, width: int = 32
) -> LanguageModel:
    """A model of all operators with weights large enough that tokens matter."""
    torch.manual_seed(0)
    architecture = Architecture.parse(
        f"width={width} vocab_size={vocab_size} {fields} | {operators}"
    )
    model = LanguageModel(architecture).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model


def write_run(folder: Path, fields: str = "meta_tokens=3", operators: str = OPERATORS) -> Path:
    """A run's folder as training leaves it."""
    (folder / "checkpoints").mkdir(parents=True)
    config = TokenizerConfig(name="bpe", vocab_size=300)
    tokenizer = build_tokenizer(config, ["to be or not to be, that is the question\n"] * 20)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = build_model(fields, operators, tokenizer.get_vocab_size())
    checkpoint = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"architecture": str(model.architecture)},
    }
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    (folder / "result.json").write_text(json.dumps({"tokens": 12345, "bits_per_byte": 1.75}))
    return folder


@pytest.fixture(scope="session")
def run_export() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_command


@dataclass(frozen=True)
class Exported:
    """A run and the first export of it, made by the command."""

    run: Path
    output: str

    @property
    def folder(self) -> Path:
        return self.run / "export"


@pytest.fixture(scope="session")
def stranger() -> str:
    """What comes before the code of a stranger, who has torch and transformers only."""
    return Path(__file__).with_name("stranger.py").read_text()


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture
def wrap() -> Callable[..., SLMForCausalLM]:
    """Makes the transformers class around a model of all operators."""

    def make(fields: str = "meta_tokens=3") -> SLMForCausalLM:
        model = build_model(fields)
        config = SLMConfig(str(model.architecture), bos_token_id=0, pad_token_id=0)
        shell = SLMForCausalLM(config).eval()
        shell.model.load_state_dict(model.state_dict())
        return shell

    return make


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command that people run."""
    return run_program("-m", "slm.hub.export", *arguments, folder=Path.cwd())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    run = write_run(tmp_path_factory.mktemp("hub") / "run")
    done = run_command(f"checkpoint={run}", "new_tokens=8")
    assert done.returncode == 0, done.stderr
    return Exported(run, done.stdout)
