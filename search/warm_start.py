"""Warm start: a child begins with its parent's weights, and computes nearly what the parent did.

Any two architectures will do. Their operators are aligned as sequences; where one has a
counterpart, it takes over what fits:

- A new operator writes nothing at first: its channels come in pairs that hold the same and are
  written with opposite signs. Each still has its full size and learns at once. An output projection
  of zeros would do so only without weight normalization, which brings it to full length, in
  whatever direction, in its first step.
- In the same way an operator grows within the same width, say in its ratio.
- A model that grows in width has its parent in the leading channels. The new channels of the
  residual stream are zero at first, the new ones of each operator read and write those alone, and
  what is known reads them faintly. So nothing changes until training fills them.
- What shrinks keeps its leading channels and heads; of a convolution, its last inputs.

Letters: O outputs, I inputs of a linear map.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.architecture import Architecture
from slm.model import INITIAL_STD, LanguageModel
from slm.operators import Operator, OperatorConfig

Parts = Mapping[str, Mapping[str, int]]

# How strongly what is known reads the new channels of the stream, as a share of fresh weights. Not
# zero, or those channels would get no gradient; little, for weight normalization shortens the rest.
FAINT = 0.1


@dataclass(frozen=True)
class Inheritance:
    """What a child has from its parent.

    sources: for each operator of the child, the number of the parent's it comes from, or None.
    taken, changed, new: numbers of the child's operators that are as in the parent, that have
        other fields than there, and that the parent has no counterpart of.
    share: of the child's parameters, how many began with a value of the parent's.
    """

    sources: tuple[int | None, ...]
    taken: tuple[int, ...]
    changed: tuple[int, ...]
    new: tuple[int, ...]
    share: float


def align(
    parent: Sequence[OperatorConfig], child: Sequence[OperatorConfig]
) -> tuple[int | None, ...]:
    """For each operator of the child the number of its counterpart in the parent, or None.

    Counterparts follow each other in the same order and are of the same kind. There are as many
    equal ones as possible (a longest common subsequence), then as many of other fields, then they
    stand as close in relative depth as possible.
    """
    # The best of what follows each place (i of the parent, j of the child), the end included.
    best = [[(0, 0, 0)] * (len(child) + 1) for _ in range(len(parent) + 1)]

    def matched(i: int, j: int) -> tuple[int, int, int] | None:
        """The best that begins by matching i with j; None if they are of different kinds."""
        if parent[i].name != child[j].name:
            return None
        equal, other, closeness = best[i + 1][j + 1]
        is_equal = parent[i] == child[j]
        # Of the centres of both, in units that make it whole.
        distance = abs((2 * i + 1) * len(child) - (2 * j + 1) * len(parent))
        return equal + is_equal, other + (not is_equal), closeness - distance

    for i, j in itertools.product(reversed(range(len(parent))), reversed(range(len(child)))):
        skipped = max(best[i + 1][j], best[i][j + 1])
        best[i][j] = max(matched(i, j) or skipped, skipped)

    sources: list[int | None] = []
    i = 0
    while len(sources) < len(child):
        j = len(sources)
        if i < len(parent) and matched(i, j) == best[i][j]:
            sources.append(i)
            i += 1
        elif i < len(parent) and best[i + 1][j] == best[i][j]:
            i += 1
        else:
            sources.append(None)
    return tuple(sources)


@torch.no_grad()
def inherit(
    model: LanguageModel, parent: Architecture, weights: Mapping[str, Tensor]
) -> Inheritance:
    """Give `model`, freshly initialised, what it can have of its parent's weights, in place.

    weights: the parent's, named as in its model; they stay as they are.

    Raises ValueError if they are of another model than the parent.
    """
    child = model.architecture
    embedding = weights["embedding.weight"]
    if embedding.shape != (parent.vocab_size, parent.width):
        raise ValueError(
            f"weights: the embedding is {list(embedding.shape)}, "
            f"of the parent it is {[parent.vocab_size, parent.width]}"
        )
    num_inherited = _take_vectors(model.embedding.weight, embedding)
    num_inherited += _take_vectors(model.meta_tokens, weights["meta_tokens"])
    num_inherited += _take_norm(model.norm, weights["norm.weight"])
    if not child.tie_embeddings:
        num_inherited += _take_vectors(model.head.weight, weights.get("head.weight", embedding))

    sources = align(parent.operators, child.operators)
    taken: list[int] = []
    changed: list[int] = []
    new: list[int] = []
    for number, (layer, source) in enumerate(zip(model.layers, sources, strict=True)):
        mine = child.operators[number]
        if source is None:
            new.append(number)
            _silence_new(layer.operator, mine.parts(child.width))
            continue
        its = parent.operators[source]
        (taken if mine == its else changed).append(number)
        known = _below(weights, f"layers.{source}.")
        num_inherited += _take_norm(layer.norm, known["norm.weight"])
        num_inherited += _take_operator(
            layer.operator,
            _below(known, "operator."),
            mine.parts(child.width),
            its.parts(parent.width),
            is_wider=child.width > parent.width,
        )
    share = num_inherited / sum(parameter.numel() for parameter in model.parameters())
    return Inheritance(sources, tuple(taken), tuple(changed), tuple(new), share)


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with the prefix, under what follows it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _take(fresh: Tensor, known: Tensor) -> int:
    """Copy the leading block that both have; the number of its values."""
    block = tuple(slice(min(sizes)) for sizes in zip(fresh.shape, known.shape, strict=True))
    fresh[block] = known[block].to(fresh)
    return fresh[block].numel()


def _take_vectors(fresh: Tensor, known: Tensor) -> int:
    """Take vectors of the residual stream [N, D]; zero in its new channels."""
    fresh[: len(known), known.shape[1] :] = 0.0
    return _take(fresh, known)


def _take_norm(norm: nn.RMSNorm, known: Tensor) -> int:
    """Take the weight of a norm over channels of which the new ones are zero.

    They lessen the mean square; the weight makes up for it. The norm's epsilon, which stays, is
    what keeps this from being exact.
    """
    num_taken = _take(norm.weight, known)
    if len(norm.weight) > len(known):
        norm.weight[: len(known)] *= (len(known) / len(norm.weight)) ** 0.5
    return num_taken


def _take_operator(
    operator: Operator,
    known: Mapping[str, Tensor],
    parts: Parts,
    known_parts: Parts,
    is_wider: bool,
) -> int:
    """Take what both have of each part of each tensor; the number of values taken.

    is_wider: the residual stream has grown.
    """
    num_taken = 0
    for path, module in operator.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            old = known.get(name)
            if old is None or old.ndim != parameter.ndim:
                continue
            if isinstance(module, nn.RMSNorm) and is_wider:
                num_taken += _take_norm(module, old)
                continue
            if isinstance(module, nn.Conv1d) and old.ndim == 3:
                # A kernel [C, 1, W] ends with the newest input.
                old = F.pad(old, (parameter.shape[-1] - old.shape[-1], 0))
            old_parts = _split(name, old, known_parts)
            for part, fresh in _split(name, parameter, parts).items():
                if part in old_parts:
                    num_taken += _take(fresh, old_parts[part])
                    _silence(operator, name, part, fresh, old_parts[part].shape, is_wider)
    return num_taken


def _split(name: str, tensor: Tensor, parts: Parts) -> dict[str, Tensor]:
    """The parts of a tensor by their names; a tensor that is one part has its own."""
    sizes = parts.get(name, {name: len(tensor)})
    return dict(zip(sizes, tensor.split(list(sizes.values())), strict=True))


def _silence(
    operator: Operator, name: str, part: str, fresh: Tensor, known: torch.Size, is_wider: bool
) -> None:
    """Keep what is new in a part [O, I] or [O, …] from changing what the operator writes.

    known: the shape of what was taken.
    """
    reads, writes = name in operator.reads, name in operator.writes
    below = fresh[known[0] :]
    if fresh.ndim == 2:
        beside = fresh[: known[0], known[1] :]
        if writes and not is_wider:
            _mirror(beside.T, -1.0)
        else:
            beside *= FAINT if reads else 0.0
        if writes or fresh.shape[1] > known[1]:
            below[:, : known[1]] = 0.0
    if part in operator.value_parts and not is_wider:
        _mirror(below, 1.0)


def _silence_new(operator: Operator, parts: Parts) -> None:
    """Let an operator write nothing: its channels come in pairs that cancel."""
    if not operator.value_parts:
        return
    for name, parameter in operator.named_parameters():
        for part, fresh in _split(name, parameter, parts).items():
            if part in operator.value_parts:
                _mirror(fresh, 1.0)
        if name in operator.writes:
            if not parameter.any():
                # As RWKV-7 begins; nothing would learn from zeros that equal channels write with.
                nn.init.normal_(parameter, std=INITIAL_STD)
            _mirror(parameter.T, -1.0)


def _mirror(channels: Tensor, sign: float) -> None:
    """Make every second channel [N, …] the one before it, times `sign`."""
    num_paired = len(channels) // 2 * 2
    channels[1:num_paired:2] = sign * channels[:num_paired:2]
    if sign < 0:
        channels[num_paired:] = 0.0
