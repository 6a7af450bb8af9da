"""The one interface of all operators.

An operator is a token mixer or a feed-forward network; with a norm before it and the residual
around it, it is one layer of the model. Its *config* decides shapes and cost without building
anything; its *module* computes. What a mixer remembers exists in two forms:

- a *memory*: plain tensors that `scan` takes and returns, through which gradients flow;
- a *state*: static buffers of a fixed batch, which `step` updates in place while decoding.

Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

from slm.kernels.documents import Documents


@dataclass(frozen=True)
class Sequence:
    """How the tokens of a batch hang together.

    documents: where documents begin; None: each row is one.
    lengths: [B] int64, real tokens of each row, the rest being padding; None: all are real.
    """

    documents: Documents | None = None
    lengths: Tensor | None = None

    def is_real(self, num_tokens: int) -> Tensor | None:
        """[B, T] bool: false for padding; None when there is none."""
        if self.lengths is None:
            return None
        place = torch.arange(num_tokens, device=self.lengths.device)
        return place < self.lengths[:, None]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Sequence:
        """The same on another device."""
        documents, lengths = self.documents, self.lengths
        if documents is not None:
            documents = Documents(documents.begins.to(device, non_blocking=non_blocking))
        if lengths is not None:
            lengths = lengths.to(device, non_blocking=non_blocking)
        return Sequence(documents, lengths)


class State:
    """Static buffers [B, ...] of one operator for a fixed batch."""

    def tensors(self) -> list[Tensor]:
        """Every buffer; the first axis is the batch."""
        return []

    def read(self) -> Any:
        """What the state holds, as a memory."""
        return None

    def write(self, memory: Any, sequence: Sequence) -> None:
        """Take over, in place, the memory that `scan` returned."""

    def reset(self) -> None:
        """Forget everything, in place."""
        for tensor in self.tensors():
            tensor.zero_()

    def upto(self, num_tokens: int) -> Self:
        """This state for steps that read no more than `num_tokens` tokens in all.

        Such steps are compiled or captured and run without the host: they compute on the same
        shapes whatever has been read. A buffer that grows with the tokens is a view there, of
        what can be in use; everything else is shared.
        """
        return self

    def pretend(self, num_tokens: int) -> None:
        """As if `num_tokens` tokens had been read, to time what comes next; values are not kept.

        For a state whose steps cost the same whatever has been read there is nothing to do.
        """

    def reorder(self, index: Tensor) -> None:
        """Row b becomes row index[b], in place (beam search)."""
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, index.to(tensor.device)))


@dataclass(frozen=True)
class Recurrence:
    """The memory of a recurrent mixer.

    matrix: [B|1, H, K, V] fp32, the recurrent state.
    tail: [B|1, W − 1, C], the last inputs of its short convolution.
    """

    matrix: Tensor
    tail: Tensor


class RecurrentState(State):
    """The static form of a `Recurrence`."""

    def __init__(self, matrix: Tensor, tail: Tensor) -> None:
        self.matrix, self.tail = matrix, tail

    def tensors(self) -> list[Tensor]:
        """The recurrent state and the convolution's tail."""
        return [self.matrix, self.tail]

    def read(self) -> Recurrence:
        """What the state holds, as a memory."""
        return Recurrence(self.matrix, self.tail)

    def write(self, memory: Recurrence, sequence: Sequence) -> None:
        """Take over the recurrent state and the tail, in place."""
        self.matrix.copy_(memory.matrix.expand_as(self.matrix))
        self.tail.copy_(memory.tail.expand_as(self.tail))


@dataclass(frozen=True)
class OperatorConfig:
    """Everything about an operator that decides shapes, apart from the width of the model.

    name: what it is called in a model's text. short_name: a letter or two in tables of results;
        empty: the name itself.
    """

    name: ClassVar[str]
    short_name: ClassVar[str] = ""

    @classmethod
    @cache
    def field_types(cls) -> dict[str, Any]:
        """The type of each field, by name."""
        types = get_type_hints(cls)
        return {field.name: types[field.name] for field in fields(cls)}

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        raise NotImplementedError

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """Of tensors of the module that hold several parts below each other: names and sizes.

        The sizes are those on axis 0. Whoever takes weights over into other sizes cuts each part
        by itself; a tensor that is not named here is cut as one.
        """
        return {}

    def parameters(self, width: int) -> int:
        """Exact number of parameters of the module, without the norm before it."""
        raise NotImplementedError

    def flops_per_token(self, width: int, context: int) -> float:
        """Forward FLOPs of one token that sees `context` tokens, itself included."""
        raise NotImplementedError

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """Bytes of one sequence's state after `context` tokens."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Canonical text, 'attention(head_dim=32)': fields at their default are left out."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({','.join(changed)})" if changed else self.name


class Operator(nn.Module):
    """The module of an operator.

    reads, writes: names of the matrices that read from, or write to, the residual stream; the
        former hold the width on their last axis, the latter on their first.
    value_parts: names of the tensors, or of their parts (`OperatorConfig.parts`), whose axis 0 goes
        over the channels that `writes` read, or over those of one head. Channels of a head that are
        equal in all of these hold equal values.
    undecayed: names of the parameters with two axes that weight decay leaves alone, such as the
        rates at which states decay. Of all others those with two axes decay.
    """

    config_class: ClassVar[type[OperatorConfig]]
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    value_parts: ClassVar[tuple[str, ...]] = ()
    undecayed: ClassVar[tuple[str, ...]] = ()

    def reset_parameters(self) -> None:
        """Initialise what shall begin otherwise than the model has it.

        That is normal(0, 0.02) for the weights of linear maps and zero for their biases; this runs
        after it. Other modules (norms, convolutions) keep what torch gives them.
        """

    def scan(self, x: Tensor, sequence: Sequence, start: Any) -> tuple[Tensor, Any]:
        """Mix x [B, T, D], every document beginning with the memory `start` (None: nothing).

        Returns y [B, T, D] and the memory after each row's last real token. Differentiable.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: Any) -> Tensor:
        """One token x [B, D] per row: y [B, D]; updates `state` in place."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_tokens: int) -> State:
        """Empty buffers for `batch_size` rows of up to `max_tokens` tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor, sequence: Sequence, state: State | None = None) -> Tensor:
        """Mix x [B, T, D]; goes on from `state`, if given, and updates it in place."""
        y, memory = self.scan(x, sequence, None if state is None else state.read())
        if state is not None:
            state.write(memory, sequence)
        return y


OPERATORS: dict[str, type[Operator]] = {}

# What an operator has to have, in its config and in its module.
CONFIG_PARTS = ("name", "problems", "parameters", "flops_per_token", "state_bytes")
MODULE_PARTS = ("scan", "step", "init_state")

OperatorType = TypeVar("OperatorType", bound=type[Operator])


def register(config_class: type[OperatorConfig]) -> Callable[[OperatorType], OperatorType]:
    """Class decorator: make an operator known by its config's name.

    Raises ValueError if either class lacks something, or another operator has the name.
    """

    def add(module_class: OperatorType) -> OperatorType:
        missing = _missing(config_class, OperatorConfig, CONFIG_PARTS)
        missing += _missing(module_class, Operator, MODULE_PARTS)
        if missing:
            raise ValueError(f"an operator needs {', '.join(missing)}")
        name = config_class.name
        known = OPERATORS.get(name)
        if known is not None and _place(known) != _place(module_class):
            raise ValueError(f"operator name {name!r} is taken by {'.'.join(_place(known))}")
        module_class.config_class = config_class
        OPERATORS[name] = module_class
        return module_class

    return add


def _missing(cls: type, interface: type, parts: tuple[str, ...]) -> list[str]:
    """'Class.part' of each part of an interface that a class leaves to it."""
    return [
        f"{cls.__name__}.{part}"
        for part in parts
        if getattr(cls, part, None) in (None, getattr(interface, part, None))
    ]


def _place(cls: type) -> tuple[str, str]:
    """Where a class is defined."""
    return cls.__module__, cls.__qualname__


def parse_operator(text: str) -> OperatorConfig:
    """The config that `text` stands for: 'ffn' or 'attention(head_dim=32,window=512)'.

    Raises ValueError naming the operator or the field that is wrong.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise ValueError(f"operator {text!r}: expected 'name' or 'name(field=value,…)'")
    name, arguments = match[1], match[2] or ""
    if name not in OPERATORS:
        known = ", ".join(sorted(OPERATORS))
        raise ValueError(
            f"operator {name!r} is unknown; known: {known}; one of your own comes with plugins=[…]"
        )
    config_class = OPERATORS[name].config_class
    allowed = config_class.field_types()
    values: dict[str, Any] = {}
    for argument in filter(None, (part.strip() for part in arguments.split(","))):
        key, _, value = (part.strip() for part in argument.partition("="))
        if key not in allowed:
            raise ValueError(f"{name}: unknown field {key!r}; known: {', '.join(allowed)}")
        try:
            values[key] = _read(value, allowed[key])
        except (ValueError, SyntaxError, TypeError):
            expected = getattr(allowed[key], "__name__", str(allowed[key]))
            raise ValueError(f"{name}.{key}: expected {expected}, got {value!r}") from None
    return config_class(**values)


def _read(text: str, expected: Any) -> Any:
    """The value that a text stands for; a string may come without its quotes."""
    if expected is str and text.isidentifier():
        return text
    return _coerce(ast.literal_eval(text), expected)


def _coerce(value: Any, expected: Any) -> Any:
    """The value, if it is of the expected type or of one of a union's; an int serves as a float."""
    allowed = get_args(expected) or (expected,)
    if type(value) is int and int not in allowed and float in allowed:
        value = float(value)
    if type(value) not in allowed:
        raise TypeError(expected)
    return value
