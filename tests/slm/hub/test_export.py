"""The export command: what it writes, that strangers can load it, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from slm.config import ConfigError, read
from slm.hub.export import ExportConfig, export
from slm.hub.formats import FormatConfig, special_tokens, write_model, write_tokenizer
from slm.hub.loading import load_model
from slm.hub.verify import Verification, VerificationError, verify
from slm.operators import OPERATORS
from slm.training.checkpoint import load_checkpoint

MakeRun = Callable[..., Path]
RunExport = Callable[..., subprocess.CompletedProcess[str]]

# What a person types who has torch and transformers only.
STRANGER = """
import json
import torch
folder, copy = sys.argv[2:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
text = "to be — or not?\\n  Ça va."
batch = tokenizer([text, "to be"], return_tensors="pt", padding=True)
logits = lambda model: model(batch["input_ids"]).logits.tolist()
with torch.no_grad():
    first = logits(model)
    model.save_pretrained(copy)
    again = logits(AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True))
print(json.dumps({
    "config": config.to_dict(),
    "text": tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True),
    "mask": batch["attention_mask"].tolist(),
    "tokens": batch["input_ids"].tolist(),
    "module": type(model).__module__,
    "logits": first,
    "copied_logits": again,
    "generated": model.generate(**batch, max_new_tokens=5, do_sample=False).tolist(),
}, default=str))
"""


def test_strangers_get_the_trained_model(exported: object, stranger: str, tmp_path: Path) -> None:
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "code"), "HF_HUB_OFFLINE": "1"}
    tokenizer = exported.folder / "tokenizer.json"
    folders = map(str, (tokenizer, exported.folder, tmp_path / "copy"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", stranger + STRANGER, *folders],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    model, tokenizer_file = load_checkpoint(exported.run)
    tokens = torch.tensor(seen["tokens"])
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(seen["logits"]), model(tokens))
    assert seen["copied_logits"] == seen["logits"]
    assert seen["module"].startswith("transformers_modules.")

    text = "to be — or not?\n  Ça va."
    assert seen["text"] == text
    # The end of text stands before every text, and padding to the left.
    assert seen["tokens"][0] == Tokenizer.from_file(str(tokenizer_file)).encode(text).ids
    assert seen["mask"][1][0] == 0
    assert seen["mask"][1][-1] == 1
    assert seen["config"]["architecture"] == str(model.architecture)
    assert seen["config"]["eos_token_id"] == 0
    assert len(seen["generated"][0]) == len(seen["tokens"][0]) + 5


def test_self_check_is_recorded(exported: object) -> None:
    report = json.loads((exported.run / "export.json").read_text())
    assert report["path"] == str(exported.folder)
    assert report["max_abs_logit_difference"] < 1e-5
    assert report["cached_equals_uncached"] is True
    assert report["sample"].startswith(report["prompt"])
    assert report["seconds"] > 0
    assert "largest difference of a logit" in exported.output


def test_self_check_finds_other_weights(exported: object) -> None:
    model, _ = load_checkpoint(exported.run)
    with torch.no_grad():
        model.layers[2].norm.weight[3] += 0.5
    with pytest.raises(VerificationError, match="its logits differ by"):
        verify(model, exported.folder, FormatConfig(prompt="to be", new_tokens=2))


def test_model_card(exported: object) -> None:
    card = (exported.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    model, _ = load_checkpoint(exported.run)
    assert f"| Parameters | {model.architecture.parameters():,} |" in card
    assert "| Tokens seen | 12,345 |" in card
    assert "| Validation bits per byte | 1.7500 |" in card
    assert "trust_remote_code=True" in card
    assert "license: apache-2.0" in card


def test_nothing_is_done_twice(exported: object, capsys: pytest.CaptureFixture[str]) -> None:
    config = ExportConfig(checkpoint=exported.run, new_tokens=8)
    before = (exported.folder / "model.safetensors").stat().st_ino
    report = export(config)
    assert "up to date" in capsys.readouterr().out
    assert (exported.folder / "model.safetensors").stat().st_ino == before
    assert report == json.loads((exported.run / "export.json").read_text())


def test_export_is_loaded_without_its_code(exported: object) -> None:
    model, tokenizer_file = load_model(exported.folder)
    trained, _ = load_model(exported.run)
    tokens = torch.randint(200, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens), trained(tokens))
    assert tokenizer_file == exported.folder / "tokenizer.json"


def test_damaged_export_is_made_again_and_failure_keeps_the_old(
    exported: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = exported.folder / "slm_model.py"
    before, files = code.read_bytes(), sorted(exported.run.rglob("*"))

    def fail(*arguments: object) -> None:
        raise RuntimeError("does not load")

    monkeypatch.setattr("slm.hub.export.verify", fail)
    config = ExportConfig(checkpoint=exported.run, new_tokens=8)
    try:
        code.write_bytes(b"broken = True")
        with pytest.raises(RuntimeError, match="does not load"):
            export(config)
        assert code.read_bytes() == b"broken = True"
        assert sorted(exported.run.rglob("*")) == files
    finally:
        code.write_bytes(before)
    export(config)


def test_changed_checkpoint_replaces_the_export(
    exported: object, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", operators="ffn", fields="tie_embeddings=False")
    found = Verification(0.0, True, "to be", "to be", 0.1)
    monkeypatch.setattr("slm.hub.export.verify", lambda *arguments: found)
    config = ExportConfig(checkpoint=run)
    export(config)
    shutil.copyfile(exported.run / "checkpoints/last.ckpt", run / "checkpoints/last.ckpt")
    export(config)
    model, _ = load_model(config.folder)
    assert str(model.architecture) == str(load_checkpoint(exported.run)[0].architecture)


PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from slm.operators import Operator, OperatorConfig, State, register

@dataclass(frozen=True)
class ScaleConfig(OperatorConfig):
    name: ClassVar[str] = "scale_of_mine"
    factor: float = 2.0

    def problems(self, width):
        return []

    def parameters(self, width):
        return width

    def flops_per_token(self, width, context):
        return float(width)

    def state_bytes(self, width, context, bytes_per_value):
        return 0

@register(ScaleConfig)
class Scale(Operator):
    def __init__(self, config, width):
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), config.factor))

    def scan(self, x, sequence, start):
        return x * self.scale, None

    def step(self, x, state):
        return x * self.scale

    def init_state(self, batch_size, max_tokens):
        return State()
"""


def test_operator_of_ones_own_is_carried_along(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_operators.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_operators  # noqa: F401

    try:
        run = make_run(tmp_path / "run", operators="scale_of_mine(factor=1.5) ffn")
        model, tokenizer_file = load_checkpoint(run)
        folder = tmp_path / "export"
        folder.mkdir()
        config = FormatConfig(prompt="to be", new_tokens=2)
        end_of_text = write_tokenizer(tokenizer_file, folder)
        write_model(model, config, special_tokens(end_of_text), folder)
        assert (folder / "my_operators.py").is_file()
        assert verify(model, folder, config).max_abs_logit_difference < 1e-5
    finally:
        del OPERATORS["scale_of_mine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"not a checkpoint", "is truncated or no checkpoint"),
        ("cut", "is truncated or no checkpoint"),
        ({"weights": 1}, "does not hold a model"),
    ],
)
def test_bad_checkpoints_are_refused_in_one_line(
    exported: object, tmp_path: Path, content: object, message: str
) -> None:
    file = tmp_path / "checkpoints" / "bad.ckpt"
    file.parent.mkdir()
    if content == "cut":
        whole = (exported.run / "checkpoints" / "last.ckpt").read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ConfigError, match=message) as caught:
        export(read(ExportConfig, {"checkpoint": str(file)}))
    assert len(caught.value.problems) == 1
    assert str(file) in caught.value.problems[0]
    assert not (tmp_path / "export").exists()


def test_the_card_of_an_earlier_checkpoint_has_no_figures_of_the_last(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", "", "ffn")
    last = run / "checkpoints" / "last.ckpt"
    shutil.copy(last, last.with_name("previous.ckpt"))
    for name, has_figures in (("last.ckpt", True), ("previous.ckpt", False)):
        config = ExportConfig(checkpoint=last.with_name(name), new_tokens=2)
        export(config)
        assert ("12,345" in (config.folder / "README.md").read_text()) is has_figures


def test_a_head_that_holds_its_norms_may_be_rounded(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "normalize_logits=True", "attention(head_dim=8) ffn")
    config = ExportConfig(checkpoint=run, format="native", dtype="bfloat16", new_tokens=2)
    assert 0 < export(config)["max_abs_logit_difference"] < 0.1


def test_a_chat_template_goes_along(make_run: MakeRun, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    run = make_run(tmp_path / "run", "", "ffn")
    config = ExportConfig(checkpoint=run, chat_template=template, new_tokens=2)
    export(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.folder)
    said = [{"role": "user", "content": "to be?"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "user: to be?\n"
    # Another template is another export.
    template.write_text("{{ messages[0].content }}")
    export(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.folder)
    assert tokenizer.apply_chat_template(said, tokenize=False) == "to be?"


def test_command_gathers_its_problems(run_export: RunExport, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    done = run_export(
        f"checkpoint={tmp_path}/no.ckpt", f"out={tmp_path}/mine", "push_to=nobody", "new_tokens=0"
    )
    assert done.returncode == 2
    assert "new_tokens" in done.stderr
    done = run_export(f"checkpoint={tmp_path}/no.ckpt", f"out={tmp_path}/mine", "push_to=nobody")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: checkpoint: '{tmp_path}/no.ckpt': no such file",
        "error: push_to: must be 'user/name', got 'nobody'",
        f"error: out: '{tmp_path}/mine' exists and is not an export",
    ]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"


def test_upload_says_in_one_line_that_the_hub_is_away(tmp_path: Path) -> None:
    code = "from pathlib import Path; from slm.hub.push import push; push(Path('.'), 'a/b', True)"
    token = "hf_" + "secret" * 5
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": token}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "slm.config.ConfigError: push_to: http://127.0.0.1:9 cannot be reached: "
    )
    assert token not in done.stdout + done.stderr
