"""fla's kernels on a CUDA device against the torch forms there."""

import pytest
import torch
from numerics import relative_rms
from recurrences import RECURRENCES, make_inputs, with_gradients

from slm.kernels.documents import Documents

pytestmark = pytest.mark.gpu

WITH_KERNEL = [name for name, each in RECURRENCES.items() if each.fla is not None]


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("has_documents", [True, False])
def test_kernels(name: str, dtype: torch.dtype, tolerance: float, has_documents: bool) -> None:
    recurrence = RECURRENCES[name]
    sizes = {"batch_size": 2, "num_heads": 2, "key_size": 64, "value_size": 64}
    inputs = [x.cuda() for x in make_inputs(recurrence, 150, dtype, **sizes)]
    begins = torch.zeros(2, 150, dtype=torch.bool, device="cuda")
    begins[:, 0] = begins[0, [1, 70]] = begins[1, 64] = True
    documents = Documents(begins) if has_documents else None
    assert recurrence.fla is not None
    weights = tuple(torch.randn_like(x) for x in recurrence.chunk(*inputs, documents=documents))
    actual = with_gradients(recurrence.fla, inputs, weights, documents=documents)
    wide = [x.float() for x in inputs]
    expected = with_gradients(recurrence.chunk, wide, weights, documents=documents)
    names = ["output", "final state", *(f"gradient of {each}" for each in recurrence.names)]
    for what, theirs, ours in zip(names, actual, expected, strict=True):
        assert relative_rms(theirs, ours) < tolerance, what
