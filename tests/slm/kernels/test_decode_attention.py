"""The decoding attention of CUDA, run by Triton's interpreter, and of CPUs, compiled.

Both against torch in fp64.
"""

import zipfile
from collections.abc import Iterator

import pytest
import torch
from attention_oracle import attention_of_places
from numerics import relative_rms
from torch import Tensor
from triton_interpreter import FIRST, Interpreter

from slm.compilation import Argument, library, library_path
from slm.kernels.attention import attention_step
from slm.kernels.decode_attention import decode_attention_cpu
from slm.runtime import thread_count

N = 150


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter(FIRST)
    yield interpreter
    interpreter.close()


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, shares: int) -> Tensor:
    """Runs where the interpreter is."""
    from slm.kernels.triton.decode_attention import attend_shares

    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    return attend_shares(q, k, v, lengths, shares)


@pytest.mark.parametrize("shares", [1, 2, 5])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 16), (6, 2, 24), (20, 1, 32)])
def test_it_equals_torch(
    interpreter: Interpreter, heads: int, groups: int, size: int, shares: int
) -> None:
    q = torch.randn(4, heads, size)
    # Places first in memory, as caches have them.
    k, v = torch.randn(2, N, 4, groups, size).transpose(1, 2)
    lengths = torch.tensor([1, 64, 97, N + 3])
    # A copy: what crosses to another process loses its strides.
    actual = interpreter.run(attend_places_first, q, k, v, lengths, shares)
    assert relative_rms(actual, attention_of_places(q, k, v, lengths)) < 1e-6


def attend_places_first(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, shares: int) -> Tensor:
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    return attend(q, k, v, lengths, shares)


# Query heads, key-value heads, head size and rows: sizes that are whole vectors and that are not,
# one row and more.
SHAPES = [(6, 2, 64, 1), (3, 1, 40, 3), (2, 2, 9, 2), (8, 1, 16, 1)]


def test_it_equals_torch_on_a_cpu(monkeypatch, tmp_path) -> None:
    """Of fp32 and bf16, by one thread and by more than there is work for; scores from wide to flat.

    The largest score may be anywhere, in the first places of a share or in the last.
    """
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path))
    cases = []
    for heads, groups, size, rows in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            q = (4 * torch.rand(rows, 1, 1) * torch.randn(rows, heads + 1, size)).to(dtype)
            q = q[:, :heads]  # as a part of what one matrix gives
            k, v = torch.randn(2, 1000, rows, groups, size).to(dtype).transpose(1, 2)
            cases.append([q, k, v])

    def attend_all(lengths: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        triples = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
        return tuple(attention_step(*triple, lengths[: len(triple[0])]) for triple in triples)

    flat = [x for case in cases for x in case]
    arguments = [Argument(x, (1,) if x.dim() == 4 else ()) for x in flat]
    many = torch.tensor([1000, 17, 1])
    for threads in (1, 3):
        with thread_count(threads), torch.inference_mode():
            run = library("attend", attend_all, [Argument(many), *arguments])
        for lengths in (many, torch.tensor([1, 2000, 64]), torch.tensor([333, 16, 999])):
            for (q, k, v), y in zip(cases, run([lengths, *flat]), strict=True):
                assert y.dtype == q.dtype
                wanted = attention_of_places(q, k, v, lengths[: len(q)])
                assert relative_rms(y, wanted) < (2e-6 if q.dtype == torch.float32 else 4e-3)
                # What stands for the kernel where nothing is compiled.
                plain = decode_attention_cpu(q.float(), k, v, lengths[: len(q)], threads)
                assert relative_rms(plain, wanted) < 2e-6


@pytest.mark.parametrize("rows", [1, 2])
def test_a_compiled_step_copies_no_cache(monkeypatch, tmp_path, rows: int) -> None:
    """Nothing that grows with the places is allocated, and new keys are where they belong."""
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path))
    keys, values = torch.randn(2, 500, rows, 2, 16).transpose(1, 2)
    q, new = torch.randn(rows, 4, 16), torch.randn(rows, 2, 16)

    def step(q: Tensor, new: Tensor, place: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        which = torch.arange(rows)
        k[which, place] = new
        v[which, place] = new
        place += 1
        return (attention_step(q, k, v, place),)

    place = torch.tensor([499, 20])[:rows]
    arguments = [Argument(x) for x in (q, new, place)]
    arguments += [Argument(x, (1,)) for x in (keys, values)]
    with torch.inference_mode():
        run = library("step", step, arguments)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    for row, at in enumerate(place.tolist()):
        wanted_keys[row, at], wanted_values[row, at] = new[row], new[row]
    (y,) = run([q, new, place, keys, values])
    assert torch.equal(keys, wanted_keys)
    assert torch.equal(values, wanted_values)
    assert relative_rms(y, attention_of_places(q, keys, values, place)) < 1e-6

    with zipfile.ZipFile(library_path("step", arguments)) as archive:
        wrapper = next(name for name in archive.namelist() if name.endswith("wrapper.cpp"))
        source = archive.read(wrapper).decode()
    body = source[source.rindex("::run_impl(") :]
    sizes = [line for line in body.splitlines() if "const int64_t int_array" in line]
    assert not [line for line in sizes if "1L, s" in line or "2L, s" in line]
