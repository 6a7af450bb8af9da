"""One decoding step, compiled and, on CUDA, captured.

What is compiled as one is a *unit*: 'operator', a layer with its norm and its residual, which all
architectures share; or 'step', everything from a token to the likeliest next one. A search compiles
a few operators once and measures any architecture; what is delivered runs as one.

Letters: B rows, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.compilation import Argument, library, library_path
from slm.model import LanguageModel, Layer, ModelState, head_logits
from slm.operators import State
from slm.operators.attention import PLACES_BLOCK

CompileUnit = Literal["eager", "operator", "step"]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Piece:
    """A part of the step that may be compiled: `function(x, *tensors)`.

    name: tells the function from all others, along with the layouts of its arguments.
    weights: first of the tensors; what `state` holds, None for nothing, is the others.
    """

    name: str
    function: Callable[..., Tensors]
    weights: list[Tensor]
    state: State | None = None

    def tensors(self, num_tokens: int) -> list[Tensor]:
        """What the function needs until `num_tokens` tokens, meta tokens too, have been read."""
        return self.weights + ([] if self.state is None else self.state.upto(num_tokens).tensors())

    def arguments(self) -> list[Argument]:
        """Of the function, without x; what grows with the tokens read varies in size."""
        arguments = [Argument(weight) for weight in self.weights]
        if self.state is not None:
            least = copy.copy(self.state).upto(1).tensors()
            for whole, part in zip(self.state.tensors(), least, strict=True):
                axes = [axis for axis in range(part.dim()) if whole.shape[axis] != part.shape[axis]]
                arguments.append(Argument(part, tuple(axes)))
        return arguments


class CompiledStep:
    """Reads one token per row, updates the state in place and chooses the likeliest next token.

    Raises CompilationError if there is no compiler.
    """

    def __init__(
        self, model: LanguageModel, state: ModelState, batch_size: int, unit: CompileUnit
    ) -> None:
        self.model, self.unit = model, unit
        self.pieces = pieces(model, state, unit)
        self.libraries = [
            library(piece.name, piece.function, [Argument(x), *piece.arguments()])
            for piece, x in zip(self.pieces, _examples(model, batch_size, unit), strict=True)
        ]
        self.forget()

    def forget(self) -> None:
        """Look at the weights anew, and at what has been read."""
        self._room = 0

    def __call__(self, tokens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Read tokens [B] after `num_tokens` others, meta tokens too.

        Returns the likeliest next tokens [B] and the logits [B, V].
        """
        if num_tokens >= self._room:
            self._make_room(num_tokens + 1)
        x = tokens if self.unit == "step" else F.embedding(tokens, self.model.embedding.weight)
        results: list[Tensor] = []
        for run, arguments in zip(self.libraries, self._arguments, strict=True):
            arguments[0] = x
            results = run(arguments)
            x = results[0]
        return results[0], results[1]

    def _make_room(self, num_tokens: int) -> None:
        """Make ready for steps until so many tokens have been read, or a few more."""
        self._room = -(-num_tokens // PLACES_BLOCK) * PLACES_BLOCK
        # The first place is x's.
        self._arguments = [
            [self.model.norm.weight, *piece.tensors(self._room)] for piece in self.pieces
        ]


def is_compiled(
    model: LanguageModel, state: ModelState, batch_size: int, unit: CompileUnit
) -> bool:
    """Whether a `CompiledStep` would find all its libraries."""
    return all(
        library_path(piece.name, [Argument(x), *piece.arguments()]).exists()
        for piece, x in zip(
            pieces(model, state, unit), _examples(model, batch_size, unit), strict=True
        )
    )


def pieces(model: LanguageModel, state: ModelState, unit: CompileUnit) -> list[Piece]:
    """What is to be compiled: the layers and the head, or one piece of everything."""
    parts = [
        _layer_piece(layer, layer_state)
        for layer, layer_state in zip(model.layers, state.operators, strict=True)
    ]
    parts.append(_head_piece(model))
    return parts if unit == "operator" else [_step_piece(model, parts)]


def _examples(model: LanguageModel, batch_size: int, unit: CompileUnit) -> Iterator[Tensor]:
    """The first argument of each piece."""
    embedding = model.embedding.weight
    if unit == "step":
        yield torch.empty(batch_size, dtype=torch.int64, device=embedding.device)
        return
    for _ in range(len(model.layers) + 1):
        yield embedding.new_empty(batch_size, embedding.shape[1])


def _layer_piece(layer: Layer, state: State) -> Piece:
    config = layer.operator.config
    names, weights = zip(*layer.named_parameters(prefix="layer"), strict=True)
    module, template = _LayerStep(layer), copy.copy(state).upto(1)

    def step(x: Tensor, *tensors: Tensor) -> Tensors:
        weights = dict(zip(names, tensors, strict=False))
        current = _with_tensors(template, tensors[len(names) :])
        return (torch.func.functional_call(module, weights, (x, current)),)

    name = f"{config} norm_eps={layer.norm.eps}"
    return Piece(name, step, [weight.detach() for weight in weights], state)


class _LayerStep(nn.Module):
    """A layer's step as a module's forward, for `functional_call`."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: State) -> Tensor:
        return self.layer.step(x, state)


def _with_tensors(state: State, tensors: Tensors) -> State:
    """A state like `state` whose buffers are `tensors`."""
    changed = copy.copy(state)
    for old, new in zip(state.tensors(), tensors, strict=True):
        for name, value in vars(state).items():
            if value is old:
                setattr(changed, name, new)
    return changed


def _head_piece(model: LanguageModel) -> Piece:
    """The last norm, the logits and the likeliest token."""
    norm, row_norms = model.norm, model.row_norms()

    def head(x: Tensor, norm_weight: Tensor, weight: Tensor, *row_norms: Tensor) -> Tensors:
        hidden = F.rms_norm(x, norm_weight.shape, norm_weight, norm.eps)
        logits = head_logits(hidden, weight, row_norms[0] if row_norms else None)
        return logits.argmax(-1), logits

    weights = [norm.weight.detach(), model.head_weight.detach()]
    return Piece(
        f"head norm_eps={norm.eps}", head, weights + ([] if row_norms is None else [row_norms])
    )


def _step_piece(model: LanguageModel, parts: list[Piece]) -> Piece:
    """All parts one after the other, from the embedding on."""
    counts = [len(part.arguments()) for part in parts]

    def step(tokens: Tensor, embedding: Tensor, *tensors: Tensor) -> Tensors:
        results: Tensors = (F.embedding(tokens, embedding),)
        left = iter(tensors)
        for part, count in zip(parts, counts, strict=True):
            results = part.function(results[0], *islice(left, count))
        return results

    names = " ".join(part.name for part in parts)
    return _Chain(f"step {names}", step, [model.embedding.weight.detach()], parts=parts)


@dataclass(frozen=True)
class _Chain(Piece):
    """Pieces as one: its weights, then the tensors of each of `parts`."""

    parts: list[Piece] = field(default_factory=list)

    def tensors(self, num_tokens: int) -> list[Tensor]:
        return self.weights + [x for part in self.parts for x in part.tensors(num_tokens)]

    def arguments(self) -> list[Argument]:
        own = [Argument(weight) for weight in self.weights]
        return own + [argument for part in self.parts for argument in part.arguments()]
