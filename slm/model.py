"""The language model: embed -> meta tokens -> operators -> norm -> head.

Letters: B rows, T tokens, M meta tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.architecture import Architecture
from slm.kernels.cross_entropy import linear_cross_entropy
from slm.kernels.documents import Documents
from slm.operators import OPERATORS, OperatorConfig, Sequence, State
from slm.operators.parts import RMSNorm

INITIAL_STD = 0.02


@torch.no_grad()
def initialize(module: nn.Linear | nn.Embedding) -> None:
    """Weights normal(0, 0.02), as Nemotron-Flash has it, and biases zero."""
    nn.init.normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def head_logits(hidden: Tensor, weight: Tensor, row_norms: Tensor | None) -> Tensor:
    """Logits [..., V] in fp32 of hidden [..., D] by the head [V, D], divided by `row_norms`."""
    logits = F.linear(hidden, weight)
    return (logits if row_norms is None else logits / row_norms).float()


class Layer(nn.Module):
    """One operator with the norm before it and the residual around it."""

    def __init__(self, config: OperatorConfig, width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=norm_eps)
        self.operator = OPERATORS[config.name](config, width)

    def forward(self, x: Tensor, sequence: Sequence, start: Any) -> tuple[Tensor, Any]:
        """From x [B, T, D]: x + operator(norm(x)), and the operator's memory."""
        y, memory = self.operator.scan(self.norm(x), sequence, start)
        return x + y, memory

    def append(self, x: Tensor, sequence: Sequence, state: State) -> Tensor:
        """As `forward`, going on from `state` and updating it in place."""
        return x + self.operator(self.norm(x), sequence, state)

    def step(self, x: Tensor, state: State) -> Tensor:
        """One token x [B, D]; updates `state` in place."""
        return x + self.operator.step(self.norm(x), state)

    def init_state(self, batch_size: int, max_tokens: int) -> State:
        """Empty buffers of the operator for `batch_size` rows of up to `max_tokens` tokens."""
        return self.operator.init_state(batch_size, max_tokens)


class ModelState:
    """The static state of a batch: one state per operator, meta tokens already absorbed."""

    def __init__(self, operators: list[State], meta: list[Any]) -> None:
        self.operators = operators
        self._meta = meta
        self.reset()

    def reset(self) -> None:
        """Back to the state after the meta tokens, in place."""
        for state, memory in zip(self.operators, self._meta, strict=True):
            state.reset()
            if memory is not None:
                state.write(memory, Sequence())

    def upto(self, num_tokens: int) -> ModelState:
        """The same for steps that read no more than `num_tokens` tokens in all, meta tokens too.

        See `slm.operators.base.State.upto`.
        """
        view = copy.copy(self)
        view.operators = [state.upto(num_tokens) for state in self.operators]
        return view

    def pretend(self, num_tokens: int) -> None:
        """As if `num_tokens` tokens had been read, meta tokens too, to time what comes next."""
        for state in self.operators:
            state.pretend(num_tokens)

    def reorder(self, index: Tensor) -> None:
        """Row b becomes row index[b], in place (beam search)."""
        for state in self.operators:
            state.reorder(index)


class LanguageModel(nn.Module):
    """A hybrid language model; every document starts from the state after the meta tokens.

    So packed training equals separate documents, and training equals decoding.
    """

    layer_class: ClassVar[type[Layer]] = Layer

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        # Of the head: the matrix, what tells whether it has changed, and the norms of its rows.
        self._norms: tuple[Tensor, tuple[Any, ...], Tensor] | None = None
        width, vocab_size = architecture.width, architecture.vocab_size
        self.architecture = architecture
        self.embedding = nn.Embedding(vocab_size, width)
        self.meta_tokens = nn.Parameter(torch.empty(architecture.meta_tokens, width))
        layers = [
            self.layer_class(config, width, architecture.norm_eps)
            for config in architecture.operators
        ]
        # A ModuleList; the cast gives its items their type.
        self.layers = cast("list[Layer]", nn.ModuleList(layers))
        self.norm = RMSNorm(width, eps=architecture.norm_eps)
        if not architecture.tie_embeddings:
            self.head = nn.Linear(width, vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise linear maps, embedding and meta tokens, then what operators have otherwise."""
        nn.init.normal_(self.meta_tokens, std=1.0)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                initialize(module)
        for layer in self.layers:
            layer.operator.reset_parameters()

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in fp32 of tokens [B, T]; with targets, their mean cross-entropy.

        documents: [B, T] int64, changes where a new document begins; None: one per row.
        lengths: [B] int64, real tokens of each row; what follows them is padding.
        targets: [B, T] int64; the loss is in nats, and logits are never whole in memory.
        """
        hidden = self.hidden(tokens, documents, lengths)
        if targets is None:
            return self.logits(hidden)
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.head_weight, self.row_norms(), targets.flatten()
        )

    def hidden(
        self, tokens: Tensor, documents: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """The residual stream [B, T, D] after the last norm."""
        packed = None if documents is None else Documents.in_rows(documents)
        return self.scan(self.embedding(tokens), Sequence(packed, lengths))

    def scan(self, x: Tensor, sequence: Sequence, streams: list[Tensor] | None = None) -> Tensor:
        """The residual stream [B, T, D] after the last norm, of embedded tokens x [B, T, D].

        streams: takes the residual stream [B, T, D] as each layer leaves it.
        """
        meta, memory = self.meta_tokens.unsqueeze(0), None
        for layer in self.layers:
            if self.architecture.meta_tokens:
                meta, memory = layer(meta, Sequence(), None)
            x, _ = layer(x, sequence, memory)
            if streams is not None:
                streams.append(x)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in fp32 of hidden [..., D]."""
        return head_logits(hidden, self.head_weight, self.row_norms())

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, D]."""
        return self.embedding.weight if self.architecture.tie_embeddings else self.head.weight

    def row_norms(self) -> Tensor | None:
        """Norm of each row of the head [V] if logits are divided by it, else None.

        Remembered in evaluation as long as it holds: computing it reads the whole head, as much as
        the logits of one token themselves.
        """
        if not self.architecture.normalize_logits:
            return None
        weight = self.head_weight
        if self.training or torch.is_grad_enabled() or weight.is_inference():
            # What follows may change the head where its version does not tell: fused optimizers,
            # shards that are gathered anew, and inference tensors do.
            self._norms = None
            return weight.norm(dim=-1)
        stamp = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        known = self._norms
        if known is None or known[0] is not weight or known[1] != stamp:
            # Also under inference_mode an ordinary tensor, which every mode can use later.
            with torch.inference_mode(False), torch.no_grad():
                self._norms = known = (weight, stamp, weight.norm(dim=-1))
        return known[2]

    def train(self, mode: bool = True) -> LanguageModel:
        """As of every module; what is remembered outside training is forgotten."""
        self._norms = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        # Moving or casting parameters does not count as a change of theirs.
        self._norms = None
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def init_state(self, batch_size: int, max_tokens: int) -> ModelState:
        """A static state for rows of up to `max_tokens` tokens, meta tokens not counted."""
        num_meta = self.architecture.meta_tokens
        meta, memories = self.meta_tokens.unsqueeze(0), []
        for layer in self.layers:
            memory = None
            if num_meta:
                meta, memory = layer(meta, Sequence(), None)
            memories.append(memory)
        states = [layer.init_state(batch_size, num_meta + max_tokens) for layer in self.layers]
        return ModelState(states, memories)

    @torch.no_grad()
    def append(self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None) -> Tensor:
        """Append tokens [B, T] to `state`, in place; the residual stream [B, T, D] after the norm.

        lengths: [B] int64, real tokens of each row; what follows them is padding.
        """
        return self.extend(self.embedding(tokens), state, lengths)

    @torch.no_grad()
    def extend(
        self,
        x: Tensor,
        state: ModelState,
        lengths: Tensor | None = None,
        streams: list[Tensor] | None = None,
    ) -> Tensor:
        """As `append`, of embedded tokens x [B, T, D].

        streams: takes the residual stream, of the shape of x, as each layer leaves it.
        """
        sequence = Sequence(None, lengths)
        for layer, operator_state in zip(self.layers, state.operators, strict=True):
            x = layer.append(x, sequence, operator_state)
            if streams is not None:
                streams.append(x)
        return self.norm(x)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None) -> Tensor:
        """As `append`; logits [B, V] of each row's last real token."""
        hidden = self.append(tokens, state, lengths)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.logits(hidden[:, -1] if lengths is None else hidden[rows, lengths - 1])

    @torch.no_grad()
    def extend_one(
        self, x: Tensor, state: ModelState, streams: list[Tensor] | None = None
    ) -> Tensor:
        """Append one embedded token x [B, D] per row to `state`, in place; else as `extend`."""
        for layer, operator_state in zip(self.layers, state.operators, strict=True):
            x = layer.step(x, operator_state)
            if streams is not None:
                streams.append(x)
        return self.norm(x)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Append one token [B] per row to `state`, in place; logits [B, V]."""
        return self.logits(self.extend_one(self.embedding(tokens), state))
