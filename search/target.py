"""Latencies that candidates must meet: that of the search's workload, and limits under others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from latency.workload import Workload
from slm.architecture import Architecture
from slm.config import schema


@schema
class LatencyLimit:
    """A further workload whose latency candidates must meet; it is no objective.

    target_ms: latency of one request; None: that of the space's reference.
    """

    workload: Workload
    target_ms: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class Target:
    """A latency that candidates must meet.

    limit: names the limit; None: the search's own target, whose latency is an objective too.
    ms: of one request of the workload. reference: what was measured of the space's reference.
    """

    limit: str | None
    workload: Workload
    ms: float
    reference: Mapping[str, Any]

    @property
    def field(self) -> str:
        """Where it stands in the config."""
        return "target_ms" if self.limit is None else f"limits.{self.limit}.target_ms"

    def problem(self, how: str, ms: float, architecture: Architecture) -> str:
        """Why an architecture misses it. how: 'predicted' or 'measured'."""
        return (
            f"{self.field}: must be <= {self.ms:.4g} under {self.workload}, "
            f"{how} {ms:.4g} at width {architecture.width}"
        )
