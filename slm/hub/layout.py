"""Weights under the names that other projects give them.

Several of their tensors may be one of ours, which holds them below each other on axis 0
(`OperatorConfig.parts`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slm.architecture import Architecture
from slm.config import ConfigError
from slm.model import LanguageModel
from slm.operators import OperatorConfig

# What stands for the name of a part in the name of a weight.
PART = "{}"
# Names that several projects share, those of the layer left out.
ATTENTION_NAMES = {
    "norm.weight": "input_layernorm.weight",
    "operator.qkv_proj.weight": "self_attn.{}_proj.weight",
    "operator.o_proj.weight": "self_attn.o_proj.weight",
    "operator.q_norm.weight": "self_attn.q_norm.weight",
    "operator.k_norm.weight": "self_attn.k_norm.weight",
}
# What matrices may be computed in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mamba2_names(norm: str, mixer: str) -> Mapping[str, str]:
    """Those of Mamba2, as its authors have them, by the names of its two modules."""
    return {
        "norm.weight": f"{norm}.weight",
        "operator.in_proj.weight": f"{mixer}.in_proj.weight",
        "operator.convolution.weight": f"{mixer}.conv1d.weight",
        "operator.convolution.bias": f"{mixer}.conv1d.bias",
        "operator.A_log": f"{mixer}.A_log",
        "operator.D": f"{mixer}.D",
        "operator.dt_bias": f"{mixer}.dt_bias",
        "operator.norm.weight": f"{mixer}.norm.weight",
        "operator.out_proj.weight": f"{mixer}.out_proj.weight",
    }


def ffn_names(norm: str, network: str) -> Mapping[str, str]:
    """Those of a feed-forward network, by the names of its two modules."""
    return {
        "norm.weight": f"{norm}.weight",
        "operator.gate_up_proj.weight": f"{network}.{PART}_proj.weight",
        "operator.down_proj.weight": f"{network}.down_proj.weight",
    }


@dataclass(frozen=True)
class Layout:
    """Their names of a model's weights.

    model: of the model's own weights, by ours: embedding, norm, head, meta tokens.
    operators: by the name of an operator, theirs of its weights by ours. Where '{}' stands in one,
        theirs are as many as there are parts in ours. Ours begin at the layer: 'norm.weight' is
        the norm before the operator.
    """

    model: Mapping[str, str]
    operators: Mapping[str, Mapping[str, str]]

    def to_theirs(self, model: LanguageModel, prefixes: Sequence[str]) -> dict[str, Tensor]:
        """The weights of `model` under their names, none sharing its storage with another.

        prefixes: what their names begin with, for each operator.
        """
        weights = model.state_dict()
        found: dict[str, Tensor] = {}
        for ours, theirs, sizes in self._names(model.architecture, prefixes):
            if ours in weights and weights[ours].numel():
                # Parts of one storage could not be written as tensors of their own.
                pieces = weights[ours].split(sizes) if sizes else [weights[ours]]
                copies = [piece.clone() for piece in pieces] if sizes else pieces
                found |= dict(zip(theirs, copies, strict=True))
        return found

    def to_ours(
        self, weights: Mapping[str, Tensor], architecture: Architecture, prefixes: Sequence[str]
    ) -> LanguageModel:
        """The model that `weights`, under their names, are those of.

        Raises ConfigError with all that is missing, unknown or of another shape.
        """
        with torch.device("meta"):
            model = LanguageModel(architecture)
        expected = model.state_dict()
        names = {
            ours: (theirs, sizes)
            for ours, theirs, sizes in self._names(architecture, prefixes)
            if ours in expected and expected[ours].numel()
        }
        problems: list[str] = []
        for ours, (theirs, sizes) in names.items():
            rest = expected[ours].shape[1:]
            shapes = [torch.Size([size, *rest]) for size in sizes] or [expected[ours].shape]
            for name, shape in zip(theirs, shapes, strict=True):
                if name not in weights:
                    problems.append(f"{name}: missing")
                elif weights[name].shape != shape:
                    given = list(weights[name].shape)
                    problems.append(f"{name}: must be {list(shape)}, got {given}")
        unknown = weights.keys() - {name for theirs, _ in names.values() for name in theirs}
        problems += [f"{name}: unknown" for name in sorted(unknown)]
        problems += _dtype_problems(weights)
        if problems:
            raise ConfigError(problems)
        own = {
            ours: torch.cat([weights[name] for name in theirs]) if sizes else weights[theirs[0]]
            for ours, (theirs, sizes) in names.items()
        }
        if not architecture.meta_tokens:
            dtype = own["embedding.weight"].dtype
            own["meta_tokens"] = torch.empty(0, architecture.width, dtype=dtype)
        model.load_state_dict(own, assign=True)
        return model.eval()

    def _names(
        self, architecture: Architecture, prefixes: Sequence[str]
    ) -> Iterator[tuple[str, list[str], list[int]]]:
        """Our name of each weight, theirs, and their sizes on axis 0 where there are several."""
        for ours, theirs in self.model.items():
            yield ours, [theirs], []
        for number, (operator, prefix) in enumerate(
            zip(architecture.operators, prefixes, strict=True)
        ):
            for ours, theirs in self.operators[operator.name].items():
                parts = _parts(operator, architecture.width, ours) if PART in theirs else {}
                names = [theirs.replace(PART, part) for part in parts] or [theirs]
                yield f"layers.{number}.{ours}", [prefix + n for n in names], [*parts.values()]


def _dtype_problems(weights: Mapping[str, Tensor]) -> list[str]:
    """Matrices whose dtype nothing computes in, or in which the others are not."""
    matrices = {name: tensor.dtype for name, tensor in weights.items() if tensor.dim() > 1}
    first = next(iter(matrices.values()), torch.float32)
    return [
        f"{name}: must be {first if first in DTYPES else 'a float'} as the others, got {dtype}"
        for name, dtype in matrices.items()
        if dtype != first or dtype not in DTYPES
    ]


def _parts(operator: OperatorConfig, width: int, weight: str) -> dict[str, int]:
    """The parts of a weight of a layer."""
    return operator.parts(width)[weight.removeprefix("operator.")]


class Common:
    """Values that layouts have once for a model, and ours for each operator."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.problems: list[str] = []

    def operators(self, name: str) -> list[Any]:
        """The configs of all operators called `name`."""
        return [operator for operator in self.architecture.operators if operator.name == name]

    def value(self, name: str, field: str, default: Any = None) -> Any:
        """The value of a field of all operators called `name`; `default` if there are none.

        Where they differ, that is a problem.
        """
        values = list(dict.fromkeys(getattr(each, field) for each in self.operators(name)))
        if len(values) > 1:
            self.problems.append(f"{name}.{field}: must be the same everywhere, got {values}")
        return values[0] if values else default

    def ffn_hidden(self) -> int:
        """The hidden width of all FFNs, of which there must be one; else as `value`."""
        width = self.architecture.width
        hidden = sorted({each.hidden(width) for each in self.operators("ffn")})
        if len(hidden) > 1:
            self.problems.append(f"ffn: must be equally wide everywhere, got {hidden}")
        return hidden[0]

    def require(self, name: str, field: str, expected: Any) -> None:
        """It is a problem where a field of an operator called `name` is not as expected."""
        others = {getattr(each, field) for each in self.operators(name)} - {expected}
        self.problems += [f"{name}.{field}: must be {expected}, got {value}" for value in others]

    def require_names(self, names: Collection[str]) -> None:
        """It is a problem where there are other operators than those called `names`."""
        others = dict.fromkeys(each.name for each in self.architecture.operators)
        self.problems += [
            f"{name}: is not among {', '.join(names)}" for name in others if name not in names
        ]

    def check(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self.problems:
            raise ConfigError(self.problems)
