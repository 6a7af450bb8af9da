"""Weight normalization puts the stream's vectors on the unit sphere, and touches nothing else."""

import pytest
import torch

from slm import weight_norm
from slm.architecture import Architecture
from slm.model import LanguageModel

EVERY_OPERATOR = (
    "width=32 vocab_size=50 meta_tokens=2 tie_embeddings=False | "
    "attention(head_dim=16,qk_norm=True) ffn(ratio=2.0) "
    "mamba2(head_dim=16,state_size=8) deltanet(head_dim=16)"
)
# The axis of the model's width: 1 where a matrix reads the residual stream, 0 where it writes.
PROJECTED = {
    "layers.0.operator.qkv_proj.weight": 1,
    "layers.0.operator.o_proj.weight": 0,
    "layers.1.operator.gate_up_proj.weight": 1,
    "layers.1.operator.down_proj.weight": 0,
    "layers.2.operator.in_proj.weight": 1,
    "layers.2.operator.out_proj.weight": 0,
    "layers.3.operator.qkv_proj.weight": 1,
    "layers.3.operator.o_proj.weight": 0,
}


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(Architecture.parse(EVERY_OPERATOR))


def norms(model: LanguageModel) -> list[torch.Tensor]:
    weights = dict(model.named_parameters())
    return [weights[name].norm(dim=axis) for name, axis in PROJECTED.items()]


def test_which_matrices_are_projected(model: LanguageModel) -> None:
    found = {name: axis for name, _, axis in weight_norm.matrices(model)}
    assert found == PROJECTED
    assert all(
        parameter.shape[axis] == model.architecture.width
        for _, parameter, axis in weight_norm.matrices(model)
    )


def test_projection_is_division_by_the_norm(model: LanguageModel) -> None:
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    weight_norm.project(model)
    for name, weight in model.named_parameters():
        if name not in PROJECTED:
            assert torch.equal(weight, before[name]), name
            continue
        expected = torch.nn.functional.normalize(before[name].double(), dim=PROJECTED[name])
        torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-6)
    for norm in norms(model):
        torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-6, rtol=0)

    once = {name: weight.clone() for name, weight in model.named_parameters()}
    weight_norm.project(model)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, once[name], atol=2e-7, rtol=0)


def test_a_row_of_zeros_stays(model: LanguageModel) -> None:
    weight = model.get_parameter("layers.0.operator.qkv_proj.weight")
    torch.nn.init.zeros_(weight)
    weight_norm.project(model)
    assert weight.count_nonzero() == 0


@pytest.mark.parametrize("has_compiler", [True, False])
def test_large_matrices_as_small_ones(has_compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_compiler:
        monkeypatch.setenv("CXX", "no-such-compiler")
    # Of 2.2 and 2.4 MB; neither width is a multiple of a vector's or a band's size.
    model = LanguageModel(
        Architecture.parse("width=344 vocab_size=50 | ffn(ratio=5.0,multiple_of=1)")
    )
    matrices = [(weight, axis) for _, weight, axis in weight_norm.matrices(model)]
    assert all(weight.nbytes >= weight_norm.COMPILED_BYTES for weight, _ in matrices)
    matrices[0][0].data[7] = 0
    expected = [torch.nn.functional.normalize(w.double(), dim=axis) for w, axis in matrices]
    weight_norm.project(model)
    for (weight, _), each in zip(matrices, expected, strict=True):
        torch.testing.assert_close(weight.double(), each, atol=1e-6, rtol=1e-6)


def test_the_norm_of_bf16_is_taken_in_fp32(model: LanguageModel) -> None:
    weight_norm.project(model.bfloat16())
    for norm in norms(model.float()):
        torch.testing.assert_close(norm, torch.ones_like(norm), atol=4e-3, rtol=0)


def test_each_step_ends_on_the_sphere(model: LanguageModel) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    handle = weight_norm.attach(optimizer, model)
    torch.testing.assert_close(norms(model)[0], torch.ones(96), atol=1e-6, rtol=0)
    tokens = torch.arange(10).unsqueeze(0)
    for _ in range(2):
        model(tokens).square().mean().backward()
        optimizer.step()
        for norm in norms(model):
            torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-5, rtol=0)
    handle.remove()
    optimizer.step()
    assert (norms(model)[0] - 1).abs().max() > 0.01
