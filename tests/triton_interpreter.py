"""flash-linear-attention's Triton kernels on CPU tensors, in a process of their own.

Triton has an interpreter on numpy (TRITON_INTERPRET=1), which has to be chosen before triton is
imported; so the kernels run in a process of their own, `Interpreter`. As it comes, the interpreter
fails on every kernel of fla, for four reasons; `repair` removes them. It checks what kernels
compute, not how fast, and one program of the grid after the other, so no race shows.
"""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

# Ways of tiling a kernel: its first tuned configuration, or its last.
FIRST, LAST = 0, -1


class Interpreter:
    """A process in which fla runs on CPU tensors."""

    def __init__(self, config: int) -> None:
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(config,)
        )

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; it and its arguments have to be picklable."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _begin(config: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    repair(config)


def repair(config: int) -> None:
    """Make Triton's interpreter run fla's kernels; `config` is the tiling to take of each."""
    _fix_tiling(config)
    _make_loop_indices_tensors()
    _remove_gather()
    _compute_bfloat16_as_float32()


def _fix_tiling(config: int) -> None:
    """Tuning wants a GPU to time on: take one configuration instead."""
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, arguments, strict=False))
        # Pruning drops tilings that do not fit the arguments.
        candidates = self.prune_configs(options) if len(self.configs) > 1 else self.configs
        self.best_config = chosen = candidates[config]
        everything = chosen.all_kwargs()
        if chosen.pre_hook is not None:
            chosen.pre_hook({**self.nargs, **options, **everything})
        try:
            return self.fn.run(*arguments, **options, **everything)
        finally:
            self.nargs = None

    Autotuner.run = run


def _make_loop_indices_tensors() -> None:
    """`for i in range(…)` gives a scalar tensor in a compiled kernel, and `i.to(…)` is called."""
    from triton.runtime.interpreter import ASTTransformer

    def visit_for(self: Any, loop: ast.For) -> ast.For:
        self.generic_visit(loop)
        over = loop.iter
        if (
            isinstance(over, ast.Call)
            and getattr(over.func, "id", None) == "range"
            and isinstance(loop.target, ast.Name)
        ):
            name = loop.target.id
            source = f"{name} = interpreter_semantic.to_tensor({name}, False)"
            (assignment,) = ast.parse(source).body
            for node in ast.walk(assignment):
                ast.copy_location(node, loop.body[0])
            loop.body.insert(0, assignment)
        return loop

    ASTTransformer.visit_For = visit_for


def _remove_gather() -> None:
    """fla imports `gather` by name, and so the compiler's; where there is none, it does without."""
    language = importlib.import_module("triton.language")
    if hasattr(language, "gather"):
        del language.gather


def _compute_bfloat16_as_float32() -> None:
    """numpy has no bfloat16: the interpreter computes on its bits as if they were integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

    def is_bf16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def to_float32(handle: Any) -> Any:
        if not is_bf16(handle):
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def to_bfloat16(values: np.ndarray) -> Any:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        # To the nearest, ties to even.
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)

    dot, unary, binary = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.unary_op,
        InterpreterBuilder.binary_op,
    )
    cast, reduce = InterpreterBuilder.cast_impl, ReduceScanOpInterface.apply

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, to_float32(a), to_float32(b), *rest)

    def unary_op(self: Any, x: Any, operation: Any) -> Any:
        if not is_bf16(x):
            return unary(self, x, operation)
        return to_bfloat16(operation(to_float32(x).data))

    def binary_op(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if not (is_bf16(a) and is_bf16(b)):
            return binary(self, a, b, operation)
        result = operation(to_float32(a).data, to_float32(b).data)
        return TensorHandle(result, tl.int1) if result.dtype == bool else to_bfloat16(result)

    def cast_impl(self: Any, x: Any, target: Any) -> Any:
        if is_bf16(x) and target.scalar != tl.bfloat16:
            wide = to_float32(x)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        if target.scalar == tl.bfloat16 and not is_bf16(x):
            return to_bfloat16(x.data)
        return cast(self, x, target)

    def reduce_or_scan(self: Any, x: Any) -> Any:
        if isinstance(x, tuple) or x.dtype.scalar != tl.bfloat16:
            return reduce(self, x)
        wide = tl.tensor(to_float32(x.handle), tl.block_type(tl.float32, list(x.shape)))
        result = reduce(self, wide)
        shape = list(result.shape)
        narrow = tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16
        return tl.tensor(to_bfloat16(result.handle.data), narrow)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.get_bf16 = lambda self, value: to_bfloat16(np.array([value]))
    ReduceScanOpInterface.apply = reduce_or_scan
