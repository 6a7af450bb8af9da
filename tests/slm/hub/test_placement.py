"""Where and in which precision an export's weights lie: dtypes, and devices by accelerate."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from slm.hub.configuration import SLMConfig
from slm.hub.modeling import SLMForCausalLM
from slm.kernels.documents import Documents
from slm.operators import OPERATORS, Sequence


def padded_batch() -> dict[str, Tensor]:
    tokens, mask = torch.randint(1, 200, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads(
    exported: object, dtype: torch.dtype, option: str, tmp_path: Path
) -> None:
    batch = padded_batch()
    exact = SLMForCausalLM.from_pretrained(exported.folder)
    model = SLMForCausalLM.from_pretrained(exported.folder, **{option: dtype})
    assert exact.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        expected = exact(**batch).logits[1]
        for use_cache in (True, False):
            logits = model(**batch, use_cache=use_cache).logits[1]
            assert (logits - expected).norm() < 0.1 * expected.norm()
    out = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 12)
    # Recurrent states stay exact.
    dtypes = {t.dtype for state in out.past_key_values.state.operators for t in state.tensors()}
    assert dtypes == {dtype, torch.float32, torch.int64}

    model.save_pretrained(tmp_path)
    assert SLMForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == dtype


def test_half_precision_trains(exported: object) -> None:
    model = SLMForCausalLM.from_pretrained(exported.folder, dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    tokens = torch.randint(1, 200, (2, 8))
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


MIXERS = [
    "attention(head_dim=8,window=5,pinned_tokens=2)",
    "mamba(state_size=4)",
    "mamba2(head_dim=16,state_size=8)",
    "linear_attention(head_dim=8)",
    "gla(head_dim=8)",
    "deltanet(head_dim=8)",
    "gated_deltanet(head_dim=8)",
    "rwkv7(head_dim=8)",
    "kda(head_dim=8)",
    "short_convolution",
]


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_layers_on_disk(exported: object, share: float, tmp_path: Path) -> None:
    """Weights that do not fit in memory are read from the export whenever they are needed."""
    batch = padded_batch()
    whole = SLMForCausalLM.from_pretrained(exported.folder)
    largest = max(map(weight_bytes, whole.model.layers))
    room = int(share * weight_bytes(whole)) + largest
    model = SLMForCausalLM.from_pretrained(
        exported.folder,
        device_map="auto",
        max_memory={"cpu": room},
        offload_folder=str(tmp_path),
    )
    places = model.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    # No layer is cut in pieces.
    assert all(name.count(".") < 3 for name in places)
    assert_same(model, whole, batch)


def test_everything_on_disk(exported: object, tmp_path: Path) -> None:
    whole = SLMForCausalLM.from_pretrained(exported.folder)
    model = SLMForCausalLM.from_pretrained(
        exported.folder, device_map={"": "disk"}, offload_folder=str(tmp_path)
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert_same(model, whole, padded_batch())


def test_every_operator_is_named() -> None:
    ours = {name for name, cls in OPERATORS.items() if cls.__module__.startswith("slm.")}
    assert {text.partition("(")[0] for text in MIXERS} == ours - {"ffn"}


def model_of(mixer: str) -> SLMForCausalLM:
    text = f"width=32 vocab_size=256 meta_tokens=2 tie_embeddings=False | {mixer} ffn"
    model = SLMForCausalLM(SLMConfig(text)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_operator_computes_in_half_precision(mixer: str) -> None:
    model, batch = model_of(mixer), padded_batch()
    with torch.no_grad():
        expected = model(**batch).logits[1]
        for dtype, error in ((torch.float16, 0.004), (torch.bfloat16, 0.03)):
            half = copy.deepcopy(model).to(dtype)
            for use_cache in (True, False):
                logits = half(**batch, use_cache=use_cache).logits[1]
                assert (logits - expected).norm() < error * expected.norm()
            assert half.generate(**batch, max_new_tokens=2, do_sample=False).shape == (2, 10)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_operator_reads_its_weights_from_disk(mixer: str, tmp_path: Path) -> None:
    whole = model_of(mixer)
    whole.save_pretrained(tmp_path)
    model = SLMForCausalLM.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    assert_same(model, whole, padded_batch())


def on_disk(model: SLMForCausalLM) -> set[str]:
    return {name for name, p in model.named_parameters() if p.device.type == "meta"}


def assert_same(model: SLMForCausalLM, whole: SLMForCausalLM, batch: dict[str, Tensor]) -> None:
    """Logits and generation are bit for bit those of the model that is in memory."""
    before = on_disk(model)
    assert before
    with torch.no_grad():
        for use_cache in (True, False):
            logits = model(**batch, use_cache=use_cache).logits
            assert torch.equal(logits, whole(**batch, use_cache=use_cache).logits)
    for arguments in ({}, {"num_beams": 2}, {"use_cache": False}):
        arguments = {"max_new_tokens": 4, "do_sample": False} | arguments
        out = model.generate(**batch, **arguments)
        assert torch.equal(out, whole.generate(**batch, **arguments))
    # What was fetched is not kept.
    assert on_disk(model) == before


def test_everything_in_memory_by_itself(exported: object) -> None:
    model = SLMForCausalLM.from_pretrained(exported.folder, device_map="auto")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.generate(max_new_tokens=2, do_sample=False).shape == (1, 3)


def test_what_is_told_of_a_batch_moves_with_it() -> None:
    begins = torch.tensor([[True, False, True]])
    moved = send_to_device(Sequence(Documents(begins), torch.tensor([3])), "meta")
    assert moved.lengths.device.type == moved.documents.begins.device.type == "meta"
    assert send_to_device(Sequence(), "meta") == Sequence()
