"""What `python -m search.depth_width` is configured by: `configs/depth_width.yaml`, typed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic
from omegaconf import DictConfig
from pydantic import Field

from search.cell_study_config import CellStudyConfig, Positive
from slm.architecture import Architecture
from slm.config import ConfigError, read, schema
from slm.model_config import BlockConfig, ModelConfig

PositiveFloat = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Size:
    """A depth and a width of the grid; is_trained: or else only measured."""

    depth: int
    width: int
    is_trained: bool

    @property
    def name(self) -> str:
        """'8 × 128'."""
        return f"{self.depth} × {self.width}"


@schema
class GridConfig:
    """Depths and widths of one pattern of blocks.

    blocks, pattern: as in a model config; the pattern is repeated up to the depth.
    depths, widths: models of every combination are measured and trained.
    further_depths, further_widths: combinations with these are measured; how good they are is
        left to the law.
    min_parameters, max_parameters: combinations with fewer or more are left out.
    The rest is as in `Architecture`, the same for all models.
    """

    blocks: dict[str, BlockConfig]
    depths: tuple[Positive, ...]
    widths: tuple[Positive, ...]
    pattern: str = "A"
    further_depths: tuple[Positive, ...] = ()
    further_widths: tuple[Positive, ...] = ()
    min_parameters: Positive | None = None
    max_parameters: Positive | None = None
    meta_tokens: int = 0
    tie_embeddings: bool = True
    normalize_logits: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name in ("depths", "widths"):
            values, further = getattr(self, name), getattr(self, f"further_{name}")
            if not values:
                problems.append(f"{name}: must not be empty")
            for field, given in ((name, values), (f"further_{name}", further)):
                if len(set(given)) < len(given):
                    problems.append(f"{field}: each must be given once, got {list(given)}")
            problems += [
                f"further_{name}: {value} is among {name}" for value in further if value in values
            ]
        least, most = self.min_parameters, self.max_parameters
        if least is not None and most is not None and least > most:
            problems.append(f"max_parameters: must be >= min_parameters {least}, got {most}")
        if not problems:
            problems = self._problems_of_models()
        if problems:
            raise ConfigError(problems)

    def _problems_of_models(self) -> list[str]:
        """Why a model of the grid cannot be built; the same problem once."""
        found: dict[str, str] = {}
        depth = max(*self.depths, *self.further_depths, len(self.pattern))
        for name in ("widths", "further_widths"):
            for width in getattr(self, name):
                try:
                    self.model(depth, width)
                except ConfigError as error:
                    for problem in error.problems:
                        is_of_pattern = problem.startswith("pattern: ")
                        found.setdefault(
                            problem, problem if is_of_pattern else f"{name}: {width}: {problem}"
                        )
        return list(found.values())

    def model(self, depth: int, width: int) -> ModelConfig:
        """The model of a size. Raises ConfigError if there is none."""
        shared = ("blocks", "pattern", "meta_tokens", "tie_embeddings", "normalize_logits")
        values = {name: getattr(self, name) for name in shared}
        return read(ModelConfig, {"width": width, "depth": depth, **values})

    def sizes(self, vocab_size: int) -> dict[Size, Architecture]:
        """Every size within the limits of parameters, by depth and width, with its architecture.

        Raises ConfigError if none of those to be trained is.
        """
        found = {
            size: self.model(size.depth, size.width).architecture(vocab_size)
            for size in self._all()
        }
        kept = {size: each for size, each in found.items() if self._is_within(each.parameters())}
        if not any(size.is_trained for size in kept):
            counts = sorted(each.parameters() for size, each in found.items() if size.is_trained)
            raise ConfigError(
                [
                    f"grid: no model of depths and widths has between min_parameters "
                    f"{self.min_parameters} and max_parameters {self.max_parameters}: "
                    f"they have {counts[0]:,} to {counts[-1]:,}"
                ]
            )
        return kept

    def _all(self) -> Iterator[Size]:
        for depth in sorted((*self.depths, *self.further_depths)):
            for width in sorted((*self.widths, *self.further_widths)):
                yield Size(depth, width, depth in self.depths and width in self.widths)

    def _is_within(self, parameters: int) -> bool:
        least, most = self.min_parameters, self.max_parameters
        return (least is None or least <= parameters) and (most is None or parameters <= most)


@schema
class DepthWidthConfig(CellStudyConfig):
    """One study of depth and width.

    budgets_ms: latencies of one request of the workload within which the best size is asked for;
        None: a few between the fastest and the slowest model that was trained.
    """

    grid: GridConfig
    budgets_ms: tuple[PositiveFloat, ...] | None

    @pydantic.field_validator("budgets_ms")
    @classmethod
    def _check_budgets(cls, budgets_ms: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if budgets_ms is not None and not budgets_ms:
            raise ValueError("must not be empty")
        return budgets_ms

    @property
    def budgets_of_trainings(self) -> list[tuple[int, ...]]:
        """The token budgets of each training of a model.

        A loss after N tokens is that of a training whose schedule ends there. A constant learning
        rate is that of every budget at once; any other schedule takes a training per budget.
        """
        rungs = self.proxy.rung_tokens
        if self.proxy.optimizer.schedule == "constant":
            return [rungs]
        return [(tokens,) for tokens in rungs]

    def identity(self) -> dict[str, Any]:
        """See `CellStudyConfig.identity`; depths, widths and budgets may be changed, too.

        They decide which cells there are, not what is in them.
        """
        values = super().identity()
        del values["budgets_ms"]
        for name in ("depths", "widths", "further_depths", "further_widths"):
            del values["grid"][name]
        for name in ("min_parameters", "max_parameters"):
            del values["grid"][name]
        return values


def read_config(config: DictConfig) -> DepthWidthConfig:
    """Build and check a composed config; raises ConfigError with every problem."""
    return read(DepthWidthConfig, config)
