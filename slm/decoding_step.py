"""One decoding step, compiled and, on CUDA, captured.

What is compiled as one is a *unit*: 'operator', a layer with its norm and its residual, which all
architectures share; or 'step', everything from a token to the likeliest next one. A search compiles
a few operators once and measures any architecture; what is delivered runs as one.

Letters: B rows, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.compilation import Argument, CompilationError, Library, library, library_path
from slm.model import LanguageModel, Layer, ModelState, head_logits
from slm.operators import State
from slm.operators.attention import PLACES_BLOCK

# Before a step is captured.
WARMUP_STEPS = 2
# More tokens than any state has places for.
EVERYTHING = 2**62

CompileUnit = Literal["eager", "operator", "step"]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Piece:
    """A part of the step that may be compiled: `function(x, *tensors)`.

    name: tells the function from all others, along with the layouts of its arguments.
    example: of x.
    weights: first of the tensors; what `state` holds, None for nothing, is the others.
    """

    name: str
    function: Callable[..., Tensors]
    example: Tensor
    weights: list[Tensor]
    state: State | None = None

    @property
    def library_path(self) -> Path:
        """Where it lies compiled, or will."""
        return library_path(self.name, self.arguments())

    def library(self) -> Library:
        """It, compiled."""
        return library(self.name, self.function, self.arguments())

    def tensors(self, num_tokens: int) -> list[Tensor]:
        """What the function needs until `num_tokens` tokens, meta tokens too, have been read."""
        return self.weights + ([] if self.state is None else self.state.upto(num_tokens).tensors())

    def arguments(self) -> list[Argument]:
        """Of the function; what grows with the tokens read varies in size."""
        arguments = [Argument(x) for x in (self.example, *self.weights)]
        if self.state is not None:
            least = copy.copy(self.state).upto(1).tensors()
            for whole, part in zip(self.state.tensors(), least, strict=True):
                axes = [axis for axis in range(part.dim()) if whole.shape[axis] != part.shape[axis]]
                arguments.append(Argument(part, tuple(axes)))
        return arguments


def init_state(model: LanguageModel, batch_size: int, max_tokens: int) -> ModelState:
    """A state of whole blocks of places, so that what is compiled for one length serves all.

    Two at least: what has always the same size is compiled for that.
    """
    num_meta = model.architecture.meta_tokens
    blocks = max(2, -(-(num_meta + max_tokens) // PLACES_BLOCK))
    return model.init_state(batch_size, blocks * PLACES_BLOCK - num_meta)


@torch.inference_mode()
def is_compiled(model: LanguageModel, max_tokens: int, batch_size: int, unit: CompileUnit) -> bool:
    """Whether a decoder of such rows would find everything compiled."""
    state = init_state(model, batch_size, max_tokens)
    return all(piece.library_path.exists() for piece in pieces(model, state, batch_size, unit))


class CompiledStep:
    """Reads one token per row, updates the state in place and chooses the likeliest next token.

    Raises CompilationError if there is no compiler.
    """

    def __init__(
        self, model: LanguageModel, state: ModelState, batch_size: int, unit: CompileUnit
    ) -> None:
        self.model, self.state, self.batch_size, self.unit = model, state, batch_size, unit
        if model.norm.weight.is_cuda:
            # Attention takes what it registers.
            importlib.import_module("slm.kernels.triton.decode_attention")
        self.pieces, self._stamp = pieces(model, state, batch_size, unit), self._weights()
        self.libraries = [piece.library() for piece in self.pieces]
        self._layouts = self._current_layouts()
        self._captured: CapturedStep | None = None
        self._pointers: list[int] = []
        self._room = 0

    def begin(self) -> None:
        """Before a request: look at the weights anew, forget what has been read.

        On CUDA a step is captured if it has to be, which changes the state. Raises ValueError if
        the weights have other shapes or another dtype than those that were compiled for.
        """
        self._room = 0
        stamp = self._weights()
        if stamp != self._stamp:
            self.pieces = pieces(self.model, self.state, self.batch_size, self.unit)
            if self._current_layouts() != self._layouts:
                raise ValueError("model: its dtype or its shapes changed; make another decoder")
            self._stamp = stamp
        if self.model.norm.weight.is_cuda:
            # All places: kernels read on the device how many are used.
            self._make_room(EVERYTHING)
            if self._captured is None:
                self._captured = CapturedStep(self._run, self.batch_size)

    def _current_layouts(self) -> list[str]:
        return [each.layout for piece in self.pieces for each in piece.arguments()]

    def _weights(self) -> list[int]:
        """Where they are, those that follow from others too."""
        row_norms = self.model.row_norms()
        found = [parameter.data_ptr() for parameter in self.model.parameters()]
        return found if row_norms is None else [*found, row_norms.data_ptr()]

    def __call__(self, tokens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Read tokens [B] after `num_tokens` others, meta tokens too.

        Returns the likeliest next tokens [B] and the logits [B, V].
        """
        if self._captured is not None:
            return self._captured(tokens)
        if num_tokens >= self._room:
            self._make_room(num_tokens + 1)
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
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
        pointers = [x.data_ptr() for arguments in self._arguments for x in arguments]
        if pointers != self._pointers:
            # A captured step knows tensors by where they are.
            self._captured, self._pointers = None, pointers


class CapturedStep:
    """A step recorded as a CUDA graph: one launch per token, for as long as its tensors stay.

    run: the step, from tokens [B] to what it gives. Capturing changes the state.
    """

    def __init__(self, run: Callable[[Tensor], tuple[Tensor, Tensor]], batch_size: int) -> None:
        self._tokens = torch.zeros(batch_size, dtype=torch.int64, device="cuda")
        # What libraries set up when they are first called must not be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                run(self._tokens)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._greedy, self._logits = run(self._tokens)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What `run` gives; the logits are overwritten by the next step."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._greedy.clone(), self._logits


def pieces(
    model: LanguageModel, state: ModelState, batch_size: int, unit: CompileUnit
) -> list[Piece]:
    """What is to be compiled: the layers and the head, or one piece of everything."""
    embedding = model.embedding.weight
    x = embedding.new_empty(batch_size, embedding.shape[1])  # [B, D]
    parts = [
        _layer_piece(layer, layer_state, x)
        for layer, layer_state in zip(model.layers, state.operators, strict=True)
    ]
    parts.append(_head_piece(model, x))
    if unit == "operator":
        return parts
    tokens = torch.empty(batch_size, dtype=torch.int64, device=embedding.device)
    return [_step_piece(model, parts, tokens)]


def _layer_piece(layer: Layer, state: State, x: Tensor) -> Piece:
    config = layer.operator.config
    named = [*layer.named_parameters(prefix="layer"), *layer.named_buffers(prefix="layer")]
    names, weights = zip(*named, strict=True)
    module, template = _LayerStep(layer), copy.copy(state).upto(1)

    def step(x: Tensor, *tensors: Tensor) -> Tensors:
        weights = dict(zip(names, tensors, strict=False))
        current = _with_tensors(template, tensors[len(names) :])
        return (torch.func.functional_call(module, weights, (x, current)),)

    name = f"{config} norm_eps={layer.norm.eps}"
    return Piece(name, step, x, [weight.detach() for weight in weights], state)


class _LayerStep(nn.Module):
    """A layer's step as a module's forward, for `functional_call`."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: State) -> Tensor:
        return self.layer.step(x, state)


def _with_tensors(state: State, tensors: Tensors) -> State:
    """A state like `state` whose buffers are `tensors`.

    Raises CompilationError if it holds some of them elsewhere than in attributes of its own.
    """
    changed = copy.copy(state)
    for number, (old, new) in enumerate(zip(state.tensors(), tensors, strict=True)):
        names = [name for name, value in vars(state).items() if value is old]
        if not names:
            raise CompilationError(
                [f"{type(state).__name__}: tensor {number} of its tensors() is no attribute of it"]
            )
        for name in names:
            setattr(changed, name, new)
    return changed


def _head_piece(model: LanguageModel, x: Tensor) -> Piece:
    """The last norm, the logits and the likeliest token."""
    norm, row_norms = model.norm, model.row_norms()

    def head(x: Tensor, norm_weight: Tensor, weight: Tensor, *row_norms: Tensor) -> Tensors:
        hidden = F.rms_norm(x, norm_weight.shape, norm_weight, norm.eps)
        logits = head_logits(hidden, weight, row_norms[0] if row_norms else None)
        return logits.argmax(-1), logits

    weights = [norm.weight.detach(), model.head_weight.detach()]
    weights += [] if row_norms is None else [row_norms]
    return Piece(f"head norm_eps={norm.eps}", head, x, weights)


def _step_piece(model: LanguageModel, parts: list[Piece], tokens: Tensor) -> Piece:
    """All parts one after the other, from the embedding on."""
    counts = [len(part.arguments()) - 1 for part in parts]

    def step(tokens: Tensor, embedding: Tensor, *tensors: Tensor) -> Tensors:
        results: Tensors = (F.embedding(tokens, embedding),)
        left = iter(tensors)
        for part, count in zip(parts, counts, strict=True):
            results = part.function(results[0], *islice(left, count))
        return results

    names = " ".join(part.name for part in parts)
    return _Chain(f"step {names}", step, tokens, [model.embedding.weight.detach()], parts=parts)


@dataclass(frozen=True)
class _Chain(Piece):
    """Pieces as one: its weights, then the tensors of each of `parts`."""

    parts: list[Piece] = field(default_factory=list)

    def tensors(self, num_tokens: int) -> list[Tensor]:
        return self.weights + [x for part in self.parts for x in part.tensors(num_tokens)]

    def arguments(self) -> list[Argument]:
        own = [Argument(x) for x in (self.example, *self.weights)]
        # Each part's own first argument is what the part before it gives.
        return own + [argument for part in self.parts for argument in part.arguments()[1:]]
