"""Texts that the model writes at validations: they repeat, and leave no trace in training."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slm.data import PackedCorpus, prepare
from slm.data.tokenizer import load_tokenizer
from slm.model import LanguageModel
from slm.training.callbacks import Validation
from slm.training.config import TrainConfig
from slm.training.fit import fit
from slm.training.module import TrainingModule
from slm.training.samples import PROMPT_TOKENS, Samples

ConfigMaker = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def corpus(make_config: ConfigMaker) -> PackedCorpus:
    config = make_config()
    return prepare(config.data, config.tokenizer)


@pytest.fixture
def model(make_config: ConfigMaker, corpus: PackedCorpus) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(make_config().model.architecture(corpus.vocab_size)).train()


def samples_of(corpus: PackedCorpus, num_texts: int, num_tokens: int) -> Samples:
    unused: Any = None
    return Samples(Path("unused"), corpus, num_texts, num_tokens, unused, unused)


def written(run_dir: Path) -> list[dict[str, Any]]:
    with (run_dir / "samples.jsonl").open() as file:
        return [json.loads(line) for line in file]


def test_prompts_are_beginnings_of_held_out_documents(corpus: PackedCorpus) -> None:
    first, last = samples_of(corpus, 2, 4).prompts()
    split = corpus.validation
    for prompt, index in ((first, 0), (last, split.num_documents // 2)):
        assert prompt[0] == corpus.end_of_text
        assert prompt[1:] == split.document(index)[:PROMPT_TOKENS].tolist()
        assert 1 < len(prompt) <= PROMPT_TOKENS + 1


def test_the_model_goes_on_as_the_whole_pass_would(
    corpus: PackedCorpus, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedily, by the logits of the whole text so far, after prompts of several lengths."""
    monkeypatch.setattr("slm.training.samples.TEMPERATURE", 0.0)
    monkeypatch.setattr("slm.training.samples.PROMPT_TOKENS", 40)
    samples = samples_of(corpus, 4, 5)
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    prompts = samples.prompts()
    assert len({len(prompt) for prompt in prompts}) > 1
    for prompt, row in zip(prompts, samples.texts(model), strict=True):
        assert row["prompt"] == tokenizer.decode(prompt)
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(5):
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert row["text"] == tokenizer.decode(tokens[len(prompt) :])


def test_drawing_repeats_and_leaves_no_trace(corpus: PackedCorpus, model: LanguageModel) -> None:
    samples = samples_of(corpus, 2, 8)
    before = torch.get_rng_state()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    texts = samples.texts(model)
    torch.rand(1)
    torch.manual_seed(5)
    assert samples.texts(model) == texts
    assert texts[0]["text"] != texts[1]["text"]
    torch.set_rng_state(before)
    samples.texts(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_a_run_writes_at_each_validation_and_trains_as_without(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_config(), tmp_path / "with")
    shown = capsys.readouterr().err
    lines = written(tmp_path / "with")
    assert [line["step"] for line in lines] == [3, 3, 6, 6, 8, 8]
    # The same documents every time, gone on with by other weights.
    assert [line["prompt"] for line in lines[:2]] == [line["prompt"] for line in lines[2:4]]
    assert lines[0]["text"] != lines[4]["text"]
    for line in (lines[0], lines[2], lines[4]):
        assert f"step {line['step']}: {line['prompt']!r}"[:100] in shown

    fit(make_config(trainer={"sample_tokens": 0}), tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("with", "without")
    ]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


def test_a_resumed_run_writes_what_the_uninterrupted_one_does(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped after the validation at step 6, and goes on from step 4."""
    fit(make_config(), tmp_path / "whole")
    original = TrainingModule.training_step

    def training_step(self: TrainingModule, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.trainer.global_step == 7:
            raise RuntimeError("out of memory")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", training_step)
        with pytest.raises(RuntimeError):
            fit(make_config(), tmp_path / "stopped")
    assert [line["step"] for line in written(tmp_path / "stopped")] == [3, 3, 6, 6]
    fit(make_config(), tmp_path / "stopped")
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")
    fit(make_config(resume="never"), tmp_path / "stopped")
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")


def test_texts_may_hold_any_character(corpus: PackedCorpus, tmp_path: Path) -> None:
    """A model that has learnt nothing writes what other programs take for ends of lines."""
    rows = [{"step": step, "prompt": "a\n", "text": "\u2028\x85\x0b\r\n"} for step in (3, 6)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    validation: Any = SimpleNamespace(step=3)
    trainer: Any = SimpleNamespace(global_step=4, is_global_zero=True)
    metrics: Any = None
    Samples(path, corpus, 2, 4, validation, metrics).on_train_start(trainer, trainer)
    assert written(tmp_path) == rows[:1]


def test_a_model_that_has_diverged_is_not_asked(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Validation._validate

    def validate(self: Validation, *arguments: Any) -> None:
        original(self, *arguments)
        self.loss = float("nan")

    monkeypatch.setattr(Validation, "_validate", validate)
    fit(make_config(trainer={"max_steps": 3}), tmp_path)
    assert not (tmp_path / "samples.jsonl").exists()
