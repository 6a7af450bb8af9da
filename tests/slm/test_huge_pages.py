import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from slm.architecture import Architecture
from slm.generation import Decoder
from slm.huge_pages import HUGE_PAGE_BYTES, LINE_BYTES, huge_memory, move_to_huge_pages
from slm.model import LanguageModel

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def model() -> LanguageModel:
    """Some 4.5 MB; embedding and head are one."""
    text = "width=192 vocab_size=3000 meta_tokens=3 | attention(head_dim=32) mamba2 ffn"
    return LanguageModel(Architecture.parse(text))


def pointers(model) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def huge_kib() -> int:
    """Of this process."""
    (found,) = re.findall(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found)


def test_weights_lie_side_by_side_and_are_what_they_were(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    move_to_huge_pages(model)
    assert [id(each) for each in model.parameters()] == [id(each) for each in parameters]
    assert model.head_weight is model.embedding.weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    first = parameters[0].data_ptr()
    assert first % HUGE_PAGE_BYTES == 0
    end = first
    for parameter in parameters:
        assert parameter.data_ptr() % LINE_BYTES == 0
        assert 0 <= parameter.data_ptr() - end < LINE_BYTES
        end = parameter.data_ptr() + parameter.nbytes


@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this system has no huge pages"
)
def test_the_pages_are_huge():
    before = huge_kib()
    held = torch.frombuffer(huge_memory(8 * HUGE_PAGE_BYTES), dtype=torch.float32).fill_(1.0)
    # As many as the system had.
    assert huge_kib() - before > 4 * HUGE_PAGE_BYTES // 1024
    del held
    assert huge_kib() - before < 4 * HUGE_PAGE_BYTES // 1024


def test_they_are_moved_again_only_if_they_have_been_elsewhere(model):
    move_to_huge_pages(model)
    before = pointers(model)
    move_to_huge_pages(model)
    assert pointers(model) == before
    model.bfloat16()
    move_to_huge_pages(model)
    assert pointers(model)[0] % HUGE_PAGE_BYTES == 0
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_a_model_that_was_moved_trains_and_is_saved(model, tmp_path):
    move_to_huge_pages(model)
    before = pointers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = model.norm.weight.detach().clone()
    model(torch.arange(9)[None]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.norm.weight, old)
    assert pointers(model) == before
    values = model.state_dict()
    unique = {name: value for name, value in values.items() if "head" not in name}
    safetensors.torch.save_file(unique, tmp_path / "model.safetensors")
    torch.save(model.norm.state_dict(), tmp_path / "norm.pt")
    # A weight is saved without what lies beside it.
    assert (tmp_path / "norm.pt").stat().st_size < 10_000
    for name, value in safetensors.torch.load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, values[name])


def test_what_is_made_in_inference_mode_stays_where_it_is():
    with torch.inference_mode():
        model = LanguageModel(Architecture.parse("width=16 vocab_size=32 | ffn"))
    before = pointers(model)
    move_to_huge_pages(model)
    assert pointers(model) == before


def test_decoders_that_compile_nothing_leave_a_model_alone(model):
    before = pointers(model)
    Decoder(model, 8)
    assert pointers(model) == before
