"""What makes the cells of a study, in its worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from search.cells import Cell
from search.evaluate import BaseEvaluator
from search.worker import Report

if TYPE_CHECKING:
    from latency.reference import ReferenceTimes
    from latency.workload import Workload
    from search.proxy import ProxyTraining
    from slm.data import PackedCorpus


@dataclass(frozen=True)
class CellEvaluator(BaseEvaluator):
    """Makes the cells of a study.

    workload: what is timed.
    """

    workload: Workload

    def yardstick(self, report: Report) -> Cell:
        """How long the references that run beside every measurement take now."""
        from latency.reference import measure_references

        return measure_references(self._set_up_measuring(), self.protocol).to_dict()

    def measure(self, text: str, reference_times: ReferenceTimes, report: Report) -> Cell:
        """Latencies of a model, brought to the machine speed of the references' times."""
        result = self._measure(text, self.workload)
        scale = result.scale(reference_times)
        cell: Cell = {
            "architecture": text,
            "is_quiet": result.request_ms.quiet,
            "has_converged": result.request_ms.converged,
            "raw_ms": result.request_ms.median_ms,
            "state_bytes": result.state_bytes,
        }
        for name, time in (
            ("latency", result.request_ms),
            ("ttft", result.ttft_ms),
            ("tpot", result.tpot_ms),
        ):
            cell[f"{name}_ms"] = scale * time.median_ms
            cell[f"{name}_low_ms"] = scale * time.low_ms
            cell[f"{name}_high_ms"] = scale * time.high_ms
        return cell

    def train(self, text: str, seed: int, budgets: Sequence[int], report: Report) -> Cell:
        """One proxy training with a seed, validated after each of the budgets, in tokens.

        The schedule ends with the last of them. `rungs` holds the loss after each.
        """
        corpus = self._set_up_training()
        evaluator = replace(self, proxy=replace(self.proxy, rung_tokens=tuple(budgets)))
        training = evaluator._train(text, corpus, budgets[0], seed, report)
        rungs = []
        for tokens in budgets[1:]:
            rungs.append({"tokens": training.tokens, "loss": training.validate()})
            training.train(tokens, report)
        result = self._result(training, corpus)
        rungs.append({"tokens": training.tokens, "loss": result["loss"]})
        findings = self._findings(training, corpus)
        return {"architecture": text, "seed": seed, **result, "rungs": rungs, **findings}

    def _findings(self, training: ProxyTraining, corpus: PackedCorpus) -> Cell:
        """What else is found of a model that has been trained."""
        return {}
