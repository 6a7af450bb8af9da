"""Fine-tuning an export with what people use for it: transformers' Trainer, and PEFT."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from slm.hub.modeling import SLMForCausalLM

TEXTS = ["to be or not to be", "that is the question", "to be", "or not to be, that"]
LEARNING_RATE = 0.1


@pytest.fixture
def model(exported: object) -> SLMForCausalLM:
    return SLMForCausalLM.from_pretrained(exported.folder)


@pytest.fixture
def tokenizer(exported: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(exported.folder)


def rows(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    # The end of text before each is the token of the padding as well, so that it has no loss, and
    # nothing is predicted from padding.
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def gradients_row_by_row(model: SLMForCausalLM, texts: list[list[int]]) -> dict[str, Tensor]:
    """Of the mean over all tokens that are predicted, without any padding."""
    count = sum(len(text) - 1 for text in texts)
    for text in texts:
        tokens = torch.tensor([text])
        loss = model(tokens, labels=tokens).loss * (len(text) - 1) / count
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_trainer_takes_a_step_that_padding_and_accumulation_do_not_change(
    model: SLMForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    side: str,
    is_checkpointed: bool,
    tmp_path: Path,
) -> None:
    texts = rows(tokenizer)
    tokenizer.padding_side = side
    expected = gradients_row_by_row(model, texts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=is_checkpointed,
        max_steps=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": text} for text in texts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        step = (before[name] - parameter) / LEARNING_RATE
        torch.testing.assert_close(step, expected[name], rtol=1e-3, atol=1e-4, msg=name)

    # Both calls take all texts as one batch.
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    predicted = torch.from_numpy(trainer.predict(trainer.train_dataset).predictions)
    losses, width = [], predicted.shape[1]
    for row, text in enumerate(texts):
        begin = 0 if side == "right" else width - len(text)
        tokens = torch.tensor([text])
        with torch.no_grad():
            alone = model(tokens, labels=tokens)
        losses += [alone.loss] * (len(text) - 1)
        torch.testing.assert_close(
            predicted[row, begin : begin + len(text)], alone.logits[0], rtol=1e-4, atol=1e-4
        )
    assert evaluated == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)

    trainer.save_model(str(tmp_path / "saved"))
    again = SLMForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = torch.tensor(texts[:1])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def linear_maps(model: nn.Module) -> Iterator[str]:
    return (name for name, m in model.named_modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj", "gate_up_proj", "in_proj"]])
def test_lora(
    exported: object,
    model: SLMForCausalLM,
    targets: str | list[str],
    is_checkpointed: bool,
    tmp_path: Path,
) -> None:
    names = list(linear_maps(model))
    wanted = [n for n in names if targets == "all-linear" or n.rpartition(".")[2] in targets]
    tokens = torch.randint(1, 200, (2, 12))
    with torch.no_grad():
        plain = model(tokens).logits
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    adapted = get_peft_model(model, config)
    adapted.train()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(wanted) > 0
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        original = name.replace(".base_layer", "")
        if original in frozen:
            assert torch.equal(parameter, frozen[original]), name

    adapted.eval()
    model.gradient_checkpointing_disable()
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    base = SLMForCausalLM.from_pretrained(exported.folder)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        logits = adapted(input_ids=tokens).logits
        assert not torch.allclose(logits, plain, atol=1e-3)
        torch.testing.assert_close(again(input_ids=tokens).logits, logits)
    arguments = {"input_ids": tokens, "max_new_tokens": 5, "do_sample": False}
    generated = again.generate(**arguments)
    assert torch.equal(generated, again.generate(use_cache=False, **arguments))
    merged = again.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-3, atol=1e-3)


def test_lora_leaves_a_head_of_its_own_alone() -> None:
    from slm.hub.configuration import SLMConfig

    config = SLMConfig("width=32 vocab_size=64 tie_embeddings=False | attention(head_dim=8) ffn")
    model = SLMForCausalLM(config)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4
    assert not any("head" in name for name in trained)
