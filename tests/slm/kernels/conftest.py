"""For tests of the kernels: poisoned memory, and where fla's kernels run."""

from collections.abc import Iterator

import pytest
import torch
from triton_interpreter import FIRST, Interpreter


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN."""
    # In deterministic mode torch fills what `torch.empty` and its like return.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """A process that runs fla's kernels, at the first of their tilings."""
    interpreter = Interpreter(FIRST)
    yield interpreter
    interpreter.close()
