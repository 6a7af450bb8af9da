"""`python -m slm.evaluate`: what it prints, what it leaves, and what it refuses."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import open_dict

from slm.architecture import Architecture
from slm.config import ConfigError, compose, read
from slm.data.config import TokenizerConfig
from slm.data.tokenizer import build_tokenizer, load_tokenizer
from slm.evaluate import EvaluateConfig, as_hydra_wants, evaluate
from slm.evaluation_results import Figure, Result, add_results
from slm.hub.formats import FormatConfig, special_tokens, write_model, write_tokenizer
from slm.hub.loading import load_model
from slm.model import LanguageModel
from slm.perplexity import perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a run whose model was not trained, and its export."""
    folder = tmp_path_factory.mktemp("evaluate")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 7))) for _ in range(60)]
    sentences = [" ".join(rng.choices(words, k=8)) + "." for _ in range(1200)]
    documents = [" ".join(sentences[i : i + 20]) for i in range(0, 1200, 20)]
    (folder / "mine.txt").write_text("\n<|endoftext|>\n".join(documents))
    (folder / "empty.txt").write_text("\n")
    tokenizer = build_tokenizer(TokenizerConfig(name="bpe", vocab_size=300), documents)
    (folder / "run" / "checkpoints").mkdir(parents=True)
    tokenizer.save(str(folder / "run" / "tokenizer.json"))
    torch.manual_seed(0)
    write_checkpoint(folder / "run", tokenizer.get_vocab_size())
    model, tokenizer_file = load_model(folder / "run")
    end_of_text = write_tokenizer(tokenizer_file, folder / "export")
    write_model(model, FormatConfig(), special_tokens(end_of_text), folder / "export")
    return folder


def write_checkpoint(run: Path, vocab_size: int) -> None:
    operators = "attention(head_dim=8) ffn(ratio=2.0) deltanet(head_dim=8)"
    model = LanguageModel(Architecture.parse(f"width=16 vocab_size={vocab_size} | {operators}"))
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"architecture": str(model.architecture)},
    }
    torch.save(content, run / "checkpoints" / "last.ckpt")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    text = ["data=text", "data.files=[mine.txt]", "tokenizer.vocab_size=300", "device=cpu"]
    return subprocess.run(
        [sys.executable, "-m", "slm.evaluate", *text, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def config(folder: Path, *overrides: str) -> EvaluateConfig:
    text = ["data=text", f"data.files=[{folder}/mine.txt]", f"data.cache_dir={folder}/cache"]
    arguments = [*text, "tokenizer.vocab_size=300", "device=cpu", *overrides]
    node = compose("evaluate", [as_hydra_wants(each) for each in arguments])[0]
    with open_dict(node):
        del node["hydra"]
    return read(EvaluateConfig, node)


def test_held_out_text_is_scored(folder: Path) -> None:
    done = command(folder, "model=run", "context_tokens=32", "limit=3", "out=text.json")
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" in done.stdout
    written = json.loads((folder / "text.json").read_text())
    (result,) = written["tasks"].values()
    assert list(written["tasks"]) == ["mine.txt (validation)"]
    assert (result["metric"], result["n"], result["seed"]) == ("bits_per_byte", 3, 0)
    assert result["low"] < result["value"] < result["high"]
    assert f"{result['value']:.4f}" in done.stdout
    assert result["settings"]["stride_tokens"] == 16
    assert {"torch", "transformers"} <= set(result["versions"])


def test_all_of_a_text_and_either_form_of_a_model(folder: Path) -> None:
    """Which windows, and which documents, is told apart by the figures."""
    model, tokenizer_file = load_model(folder / "run")
    documents = (folder / "mine.txt").read_text().split("<|endoftext|>\n")
    expected = perplexity(model, load_tokenizer(tokenizer_file), documents, 7, 24, 12)
    for name in ("run", "export"):
        settings = config(folder, f"model={folder}/{name}", "split=all", "context_tokens=24")
        (result,) = evaluate(settings).values()
        figure = result.metrics["bits_per_byte"]
        assert (figure.value, figure.low) == pytest.approx(expected.bits_per_byte[:2], rel=1e-5)
        assert result.n == len(documents) == 60
        assert (folder / name / "evaluation.json").is_file()
        (folder / name / "evaluation.json").unlink()


def test_tasks_by_either_harness_go_into_one_file(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    for harness, tasks in (("decoder", "cloze,continuation"), ("hf", "continuation")):
        done = command(
            folder, "model=export", f"tasks={tasks}", f"harness={harness}", "task_items=20"
        )
        assert done.returncode == 0, done.stderr
        path = folder / "export" / "evaluation.json"
        written = json.loads(path.read_text())["tasks"]
        assert {name: result["settings"]["harness"] for name, result in written.items()} == {
            "cloze": "decoder",
            "continuation": harness,
        }
        if harness == "decoder":
            first = written
    for name in ("cloze", "continuation"):
        for key in ("metric", "value", "stderr", "low", "high", "n"):
            assert written[name][key] == first[name][key]
    assert 0 < written["cloze"]["low"] < written["cloze"]["high"] < 1
    assert "lm_eval" in written["cloze"]["versions"]
    assert written["cloze"]["settings"]["text"] == "mine.txt"
    path.unlink()


def test_results_of_other_weights_do_not_stay(tmp_path: Path) -> None:
    weights, path = tmp_path / "weights", tmp_path / "found" / "results.json"
    result = Result({"acc": Figure(0.5, 0.1, 0.3, 0.7)}, n=25, settings={}, seed=0)
    weights.write_text("first")
    add_results(path, tmp_path, [weights], {"a": result})
    add_results(path, tmp_path, [weights], {"b": result})
    assert list(json.loads(path.read_text())["tasks"]) == ["a", "b"]
    weights.write_text("second")
    add_results(path, tmp_path, [weights], {"c": result})
    assert list(json.loads(path.read_text())["tasks"]) == ["c"]
    assert json.loads(path.read_text())["tasks"]["c"]["metrics"]["acc"]["high"] == 0.7
    # Nothing else comes into the folder, which may be an export.
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    before = sorted(path.name for path in folder.rglob("*"))
    done = command(
        folder,
        *("model=nothing", "tasks=cloze", "harness=hf", "task_folder=none", "out=mine.txt"),
        "stride_tokens=2000",
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 4
    for line, part in zip(
        lines,
        (
            "model: 'nothing': there is no model",
            "stride_tokens: must be <= context_tokens=1024, got 2000",
            "out: 'mine.txt' exists and holds no results",
            "task_folder: 'none': there is no such folder",
        ),
        strict=True,
    ):
        assert line.startswith(f"error: {part}")
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["harness=hf", "tasks=cloze"], "harness: 'hf' runs an export, and '.*run' is none"),
        (["harness=hf"], "harness: 'hf' runs tasks, and there are none"),
        (["context_tokens=null", "stride_tokens=4"], "stride_tokens: must be <="),
    ],
)
def test_what_does_not_go_together(folder: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(folder, f"model={folder}/run", *arguments)


def test_results_of_other_checkpoints_go_elsewhere(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    last = run / "checkpoints" / "last.ckpt"
    shutil.copy(last, last.with_name("step_5.ckpt"))
    assert config(folder, f"model={run}").result_file == run / "evaluation.json"
    early = config(folder, f"model={last.with_name('step_5.ckpt')}")
    assert early.result_file == run / "evaluation-step_5.json"
    out = tmp_path / "shared.json"
    add_results(out, run, [last], {})
    assert config(folder, f"model={run}", f"out={out}").result_file == out
    last.write_bytes(last.read_bytes() + b"more")
    with pytest.raises(ConfigError, match="holds results of other weights"):
        config(folder, f"model={run}", f"out={out}")


def test_text_and_models_that_hold_nothing(folder: Path, tmp_path: Path) -> None:
    empty = [f"data.files=[{folder}/empty.txt]", "split=all"]
    with pytest.raises(ConfigError, match=r"empty\.txt' is empty"):
        evaluate(config(folder, f"model={folder}/run", *empty))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("x")
    with pytest.raises(ConfigError, match="truncated or no checkpoint"):
        evaluate(config(folder, f"model={tmp_path}"))
    assert not (folder / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("model=runs/train", "checkpoint=runs/train"),
        ("tasks=piqa,arc_easy", "tasks=[piqa,arc_easy]"),
        ("tasks=[piqa]", "tasks=[piqa]"),
        ("data=text", "data=text"),
        ("--cfg", "--cfg"),
    ],
)
def test_spelling(typed: str, wanted: str) -> None:
    assert as_hydra_wants(typed) == wanted
