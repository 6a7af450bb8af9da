"""Weight normalization puts the stream's vectors on the unit sphere, and touches nothing else."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from slm import weight_norm
from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.native import native_library

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


@pytest.fixture
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The one that libraries are built with."""
    monkeypatch.setenv("CXX", request.param)
    native_library.cache_clear()
    yield request.param
    native_library.cache_clear()


@pytest.mark.parametrize("compiler", ["g++", "no-such-compiler", "false"], indirect=True)
def test_large_matrices_as_small_ones(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that C++ projects; without a compiler, or with one that fails, torch does."""
    by_torch: list[int] = []
    scales = weight_norm._scales
    monkeypatch.setattr(
        weight_norm, "_scales", lambda weight, axis: by_torch.append(axis) or scales(weight, axis)
    )
    # Of 2.2 and 2.4 MB; no size is a multiple of what is done at once.
    model = LanguageModel(
        Architecture.parse("width=346 vocab_size=50 | ffn(ratio=4.9,multiple_of=1)")
    )
    matrices = [(weight, axis) for _, weight, axis in weight_norm.matrices(model)]
    assert all(weight.nbytes >= weight_norm.NATIVE_BYTES for weight, _ in matrices)
    matrices[0][0].data[7] = 0
    matrices[1][0].data[:, 9] = 0
    expected = [torch.nn.functional.normalize(w.double(), dim=axis) for w, axis in matrices]
    versions = [weight._version for weight, _ in matrices]
    weight_norm.project(model)
    for (weight, _), each in zip(matrices, expected, strict=True):
        torch.testing.assert_close(weight.double(), each, atol=1e-6, rtol=1e-6)
    assert by_torch == ([] if compiler == "g++" else [1, 0])
    # As any change in place is seen.
    assert all(weight._version > old for (weight, _), old in zip(matrices, versions, strict=True))
    assert ("weight_norm.cpp is not used" in caplog.text) == (compiler == "false")


@pytest.mark.parametrize("shape", [(1000, 4000), (3, 90000), (5000, 7), (1, 1)])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_matrix_on_any_number_of_threads(shape: tuple[int, int], num_threads: int) -> None:
    library = native_library(weight_norm.SOURCE)
    assert library is not None
    for axis, function in ((1, library.unit_rows), (0, library.unit_columns)):
        matrix = torch.randn(shape)
        expected = torch.nn.functional.normalize(matrix.double(), dim=axis)
        results = [matrix.clone(), matrix.clone()]
        for result in results:
            # What lies behind it stays as it is.
            weight = torch.cat([result.flatten(), torch.ones(64)])
            function(
                ctypes.c_void_p(weight.data_ptr()),
                *map(ctypes.c_long, shape),
                ctypes.c_float(weight_norm.SMALLEST_NORM),
                num_threads,
            )
            assert (weight[-64:] == 1).all()
            result.copy_(weight[:-64].view(shape))
        torch.testing.assert_close(results[0].double(), expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(*results)


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
