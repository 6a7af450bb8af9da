import random
from dataclasses import replace

import pytest
import torch

from search.proxy import ProxyConfig, ProxyTraining, load_weights
from slm.architecture import Architecture
from slm.config import ConfigError, read
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.training.config import OptimizerConfig

ARCHITECTURE = Architecture.parse(
    "width=16 vocab_size=300 | attention(head_dim=8) ffn(ratio=2.0) mamba2(head_dim=8,state_size=8)"
)
CONFIG = ProxyConfig(
    rung_tokens=(128, 320, 960),
    batch_size=4,
    sequence_tokens=8,
    validation_tokens=128,
    time_limit_s=60.0,
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
    precision="float32",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> PackedCorpus:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 7))) for _ in range(60)]
    documents = [" ".join(rng.choices(words, k=200)) for _ in range(40)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    data = DataConfig(source="text", files=(str(folder / "text.txt"),), cache_dir=folder)
    return prepare(data, TokenizerConfig(name="bpe", vocab_size=300))


def train(corpus, config=CONFIG, *, tokens=960, seed=0, start=None) -> ProxyTraining:
    training = ProxyTraining(ARCHITECTURE, corpus, config, seed)
    if start is not None:
        training.load(start)
    training.train(tokens)
    return training


@pytest.mark.parametrize("weight_norm", [False, True])
def test_climbing_rung_by_rung_is_one_training(corpus, tmp_path, weight_norm):
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=5, weight_decay=0.0, weight_norm=weight_norm)
    config = replace(CONFIG, optimizer=optimizer)
    whole = train(corpus, config)
    start = None
    for rung, tokens in enumerate(config.rung_tokens):
        part = train(corpus, config, tokens=tokens, start=start)
        assert part.tokens == tokens
        start = tmp_path / f"{rung}.safetensors"
        part.save(start)
    assert [tokens for tokens, _ in part.loss_curve] == [128, 320, 640, 960]
    assert part.validate() == whole.validate()
    for mine, other in zip(part.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    restored = load_weights(ARCHITECTURE, start)
    for mine, other in zip(restored.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_schedule_ends_at_the_last_rung(corpus):
    rates = [group["lr"] for group in train(corpus, tokens=128).optimizer.param_groups]
    # Four of thirty steps, within the warm-up.
    assert rates == pytest.approx([1e-2 * 5 / 5] * 2)
    rates = [group["lr"] for group in train(corpus).optimizer.param_groups]
    assert rates == pytest.approx([1e-2 * CONFIG.optimizer.min_lr_ratio] * 2)


def test_every_row_is_read_once_per_epoch_in_another_order(corpus):
    training = ProxyTraining(ARCHITECTURE, corpus, CONFIG, 0)
    num_rows = len(training._dataset)
    read_rows = [row for step in range(num_rows // 2) for row in training._rows(step)]
    first, second = read_rows[:num_rows], read_rows[num_rows : 2 * num_rows]
    assert sorted(first) == sorted(second) == list(range(num_rows))
    assert first != second
    assert training._rows(3) == read_rows[12:16]
    assert ProxyTraining(ARCHITECTURE, corpus, CONFIG, 1)._rows(0) != read_rows[:4]


def test_training_lowers_the_loss(corpus):
    begin = ProxyTraining(ARCHITECTURE, corpus, CONFIG, 0).validate()
    result = train(corpus).result()
    assert result.loss < begin - 0.3
    assert [tokens for tokens, _ in result.loss_curve] == [320, 640, 960]
    assert result.tokens == 960


@pytest.mark.parametrize("damage", ["missing", "truncated", "other", "weights only"])
def test_a_damaged_checkpoint_is_refused_by_name(corpus, tmp_path, damage):
    path = tmp_path / "0-0-1.safetensors"
    training = train(corpus, tokens=128)
    training.save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other":
        other = Architecture.parse("width=16 vocab_size=300 | ffn(ratio=2.0)")
        ProxyTraining(other, corpus, CONFIG, 0).save(path)
    else:
        from safetensors.torch import save_file

        save_file(training.model.state_dict(), path)
    with pytest.raises(ValueError, match=r"0-0-1\.safetensors: no training to go on with"):
        ProxyTraining(ARCHITECTURE, corpus, CONFIG, 0).load(path)


def test_a_child_begins_where_its_parent_is(corpus, tmp_path):
    parent = train(corpus)
    parent.save(tmp_path / "parent.safetensors")
    grown = Architecture.parse(f"{ARCHITECTURE} ffn(ratio=2.0)")
    inherited = (ARCHITECTURE, tmp_path / "parent.safetensors")
    child = ProxyTraining(grown, corpus, CONFIG, 0, inherited)
    assert child.validate() == pytest.approx(parent.validate(), abs=1e-3)
    assert child.tokens == 0
    child.train(128)
    assert child.validate() < ProxyTraining(grown, corpus, CONFIG, 0).validate() - 0.3
    with pytest.raises(ValueError, match=r"gone\.safetensors: no weights"):
        ProxyTraining(grown, corpus, CONFIG, 0, (ARCHITECTURE, tmp_path / "gone.safetensors"))


def test_a_loss_that_is_not_finite_is_said(corpus):
    training = ProxyTraining(ARCHITECTURE, corpus, CONFIG, 0)
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        training.train(320)
    with pytest.raises(FloatingPointError, match="the validation loss is nan"):
        training.validate()


@pytest.mark.parametrize(
    ("rungs", "problem"),
    [
        ([], "must not be empty"),
        ([31], "must be >= the 32 tokens of one step, got 31"),
        ([64, 64], r"must increase, got \[64, 64\]"),
    ],
)
def test_config_problems(rungs, problem):
    values = {
        "rung_tokens": rungs,
        "batch_size": 4,
        "sequence_tokens": 8,
        "validation_tokens": 128,
        "time_limit_s": 60,
        "optimizer": {},
    }
    with pytest.raises(ConfigError, match=f"proxy.rung_tokens: {problem}"):
        read(ProxyConfig, values, "proxy")
