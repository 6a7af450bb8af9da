"""One worker of a search: claims a candidate, measures it, trains it, records it, and so on.

Any number of them, on any machines that share the study's storage, work on one search. What they
have to agree on is in the study.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latency.device import Device
from search.config import SearchConfig
from search.devices import visible_devices
from search.evaluate import Evaluator
from search.evolution import next_step
from search.history import Promotion
from search.machines import refuse_second_machine
from search.progress import WAITING
from search.space import SearchSpace
from search.study import Claim, StaleTrialError, Study
from search.target import Target
from search.worker import JobError, Worker, WorkerProcess
from slm.architecture import Architecture
from slm.config import ConfigError
from slm.kernels.backend import set_backend

if TYPE_CHECKING:
    from latency.table import LatencyTable
    from latency.workload import Workload
    from search.genotype import Genotype
    from slm.data import PackedCorpus

# What `Evaluator.measure` gives.
MEASURED = (
    *("latency_ms", "latency_low_ms", "latency_high_ms", "latency_raw_ms", "latency_is_quiet"),
    *("ttft_ms", "tpot_ms", "tokens_per_s"),
)
# What higher rungs take over from the first.
KEPT = frozenset(("architecture", "memory_bytes", "predicted_ms", *MEASURED, "limits"))
# While others work on the last candidates: between two looks at whether they lost one.
IDLE_SECONDS = 1.0


class Searcher:
    """Worker number `index` of the search in a run folder.

    say: takes lines, live: what it does at the moment; both for people. early: of the process that
    measures and trains, if it was started already. Raises ConfigError if the folder holds another
    search under the name.
    """

    def __init__(
        self,
        config: SearchConfig,
        run_folder: Path,
        index: int = 0,
        say: Callable[[str], None] = print,
        live: Callable[[str], None] = lambda _: None,
        early: WorkerProcess | None = None,
    ) -> None:
        self.config = config
        self.folder = run_folder
        self.index = index
        self.say, self.live = say, live
        self.early = early
        self.space = SearchSpace(config.space)
        set_backend(config.backend)
        self.device = Device.current(threads=config.latency_threads)
        # Before there is a study, which would hold what is wrong.
        config.task.load()
        identity = {**config.identity(), "device": self.device.key}
        self.study = Study.open(
            config.storage,
            run_folder,
            config.name,
            identity,
            self.space,
            config.evolution.objectives,
        )
        refuse_second_machine(self.study, config.storage)
        # What has to be closed at the end.
        self.resources = ExitStack()

    # What candidates are evaluated with

    @cached_property
    def corpus(self) -> PackedCorpus:
        """The packed corpus, prepared the first time."""
        from slm.data import prepare

        return prepare(self.config.data, self.config.tokenizer, progress=self.say)

    @cached_property
    def tables(self) -> dict[tuple[Workload, int], LatencyTable]:
        """The space's latency tables by workload and meta tokens, measured the first time."""
        from latency.table import LatencyTable

        limits = self.config.limits.values()
        workloads = [self.config.workload, *(limit.workload for limit in limits)]
        return {
            (workload, meta_tokens): LatencyTable.load_or_build(
                self.space.operators(),
                self.corpus.vocab_size,
                workload,
                self.device,
                meta_tokens=meta_tokens,
                normalize_logits=self.config.space.normalize_logits,
                cache_dir=self.config.data.cache_dir,
                protocol=self.config.protocol,
                progress=self.say,
            )
            for workload in dict.fromkeys(workloads)
            for meta_tokens in self.config.space.meta_tokens
        }

    @property
    def table(self) -> LatencyTable:
        """The table whose machine speed all times of the search are brought to."""
        return self.tables[self.config.workload, self.config.space.meta_tokens[0]]

    @cached_property
    def worker(self) -> Worker:
        """The process that measures and trains."""
        worker = Worker(
            Evaluator(
                runtime=self.config.runtime(),
                candidates_folder=self.candidates_folder,
                cache_dir=self.config.data.cache_dir.resolve(),
                corpus_folder=self.corpus.folder.resolve(),
                protocol=self.config.protocol,
                proxy=self.config.proxy,
                seed=self.config.seed,
                quality=self.config.evolution.quality,
                accuracy_items=self.config.accuracy_items,
                task=self.config.task,
                latency_threads=self.config.latency_threads,
                training_threads=self.config.threads_to_train,
                devices_per_candidate=self.config.devices_per_candidate,
            ),
            visible_devices(self.index, self.config.devices_per_candidate),
            self.early,
        )
        self.resources.callback(worker.close)
        return worker

    @property
    def candidates_folder(self) -> Path:
        """Where checkpoints are kept."""
        return self.folder / "candidates"

    @cached_property
    def setup(self) -> dict[str, Any]:
        """What `prepare` has settled."""
        setup: dict[str, Any] = self.study.fact("setup")
        return setup

    @property
    def target_ms(self) -> float:
        """The latency under the search's workload that candidates must meet."""
        target_ms: float = self.setup["target_ms"]
        return target_ms

    @cached_property
    def targets(self) -> list[Target]:
        """Every latency that candidates must meet, the search's own first."""
        setup, config = self.setup, self.config
        own = Target(None, config.workload, setup["target_ms"], setup["reference"])
        targets = [own]
        for name, limit in config.limits.items():
            known = setup["limits"][name]
            targets.append(Target(name, limit.workload, known["target_ms"], known["reference"]))
        return targets

    def prepare(self) -> None:
        """Settle the facts that all candidates share."""
        self.candidates_folder.mkdir(exist_ok=True)
        if self.study.fact("setup") is None:
            self.study.settle("setup", self._setup())

    def _setup(self) -> dict[str, Any]:
        """Target and reference, and what else is found out once."""
        reference = self.space.reference(self.corpus.vocab_size)
        # Built before anything is timed against it.
        table_path = self.table.path(self.config.data.cache_dir)
        config = self.config
        measurement = self._measure_reference(config.workload)
        limits = {}
        for name, limit in config.limits.items():
            measured = self._measure_reference(limit.workload)
            limits[name] = {**_target(limit.target_ms, measured), "reference": measured}
        return {
            **_target(config.target_ms, measurement),
            "reference": {
                "name": config.space.reference.seed,
                "architecture": str(reference),
                "digest": reference.digest,
                "parameters": reference.parameters(),
                **measurement,
            },
            "limits": limits,
            "table": str(table_path),
            "device": self.device.describe(),
            "machine": {
                "hostname": platform.node(),
                "platform": platform.platform(),
                "cpu_count": os.cpu_count(),
            },
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "vocab_size": self.corpus.vocab_size,
            "train_tokens": len(self.corpus.train),
            "validation_tokens": len(self.corpus.validation),
            "bytes_per_token": self.corpus.validation.num_bytes / len(self.corpus.validation),
        }

    # The loop

    def run(self, on_done: Callable[[int], None]) -> None:
        """Evaluate candidates until the search is over. on_done: is told the number of each."""
        while (claim := self._next_claim()) is not None:
            try:
                with claim:
                    self._evaluate(claim)
            except StaleTrialError as error:
                self.say(f"{error}; going on with the next")
                continue
            on_done(claim.proposal.number)

    def remove_leftovers(self) -> None:
        """Remove the checkpoints of claims that were lost; nobody may be at work any more."""
        known = {record.result.get("checkpoint") for record in self.study.records}
        for path in self.candidates_folder.glob("*.safetensors"):
            if path.name not in known:
                path.unlink(missing_ok=True)

    def run_job(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Have the worker process do something. Raises JobError."""
        return self.worker.run(
            method, *arguments, time_limit_s=self.config.proxy.time_limit_s, **options
        )

    def _next_claim(self) -> Claim | None:
        """A candidate that lost its owner, else one to train further, else a new one.

        None when the search is over; while others are at work it is not, since they may lose what
        they work on, or make something worth training further.
        """
        # Changes of the study that are known to have left nothing to do.
        num_changes = -1
        while True:
            self.study.reap()
            if not self.study.num_running or len(self.study.changes) > num_changes:
                with self.study.turn():
                    step, claim = self._choose()
                if claim is not None:
                    return claim
                if step is not None:
                    # Another process was faster.
                    continue
                if not self.study.num_running:
                    if self.study.history.num_tried < self.config.num_candidates:
                        self.say("the space has no further architecture that can be reached")
                    return None
                num_changes = len(self.study.changes)
            self.live(WAITING)
            time.sleep(IDLE_SECONDS)

    def _choose(self) -> tuple[object, Claim | None]:
        """What comes next, None if nothing does, and the claim of it, None if that failed."""
        if (claim := self.study.take_queued()) is not None:
            return claim, claim
        self._check_feasibility()
        step = next_step(
            self.space,
            self.config.evolution,
            self.config.seed,
            self.target_ms,
            self.study.history,
            rung_tokens=self.config.proxy.rung_tokens,
            num_candidates=self.config.num_candidates,
        )
        if step is None:
            return None, None
        if isinstance(step, Promotion):
            return step, self.study.promote(step)
        return step, self.study.propose(step)

    def _check_feasibility(self) -> None:
        """Give up if for long nothing has met the targets."""
        recent = self.study.records[-self.config.max_infeasible :]
        if len(recent) == self.config.max_infeasible and all(
            record.state == "infeasible" for record in recent
        ):
            raise ConfigError(
                [
                    f"target_ms: {self.target_ms:.4g} is out of reach, or the limits or the "
                    f"space's constraints are: the last {len(recent)} proposals did not meet all "
                    f"at any width; the last one: {recent[-1].error}"
                ]
            )

    def _evaluate(self, claim: Claim) -> None:
        """Choose the width and measure, unless that was done on a lower rung; train; record."""
        number, rung = claim.proposal.number, claim.rung
        results = self.study.records[number].results
        result: dict[str, Any] = {}
        try:
            if rung == 0:
                architecture, result = self._fit(claim)
                if architecture is None:
                    return
            else:
                result = {k: v for k, v in results[0].items() if k in KEPT}
            start = results[-1]["checkpoint"] if results else None
            result |= self._train(claim, result["architecture"], start)
        except JobError as error:
            claim.fail(str(error), result)
            return
        values = [float(result[name]) for name in self.config.evolution.objectives]
        excess_ms = [
            _latencies(result, target)["latency_ms"] - target.ms for target in self.targets
        ]
        claim.complete(values, result, excess_ms)
        if start is not None:
            (self.candidates_folder / start).unlink(missing_ok=True)

    def _fit(self, claim: Claim) -> tuple[Architecture | None, dict[str, Any]]:
        """The widest realization that meets every target, and what is known of it; None if none.

        The tables screen, the measurements of the whole model decide.
        """
        genotype = claim.proposal.genotype
        result: dict[str, Any] = {}
        problem = None
        for architecture in self.space.fitting(genotype, self.corpus.vocab_size, self._may_fit):
            self.live(f"#{claim.proposal.number} measuring at width {architecture.width}")
            result = {
                "architecture": str(architecture),
                "memory_bytes": self._memory_bytes(architecture),
            }
            problem = self._measure_targets(claim, architecture, result)
            if problem is None:
                return architecture, result
        if problem is None:
            result["misses"], problem = self._screened_out(genotype)
        else:
            result["misses"] = "latency"
        claim.reject(problem, result)
        return None, result

    def _may_fit(self, architecture: Architecture) -> bool:
        """Whether it may meet every target, as the tables predict: worth measuring."""
        margin = 1 + self.config.screen_margin
        return all(self._screen_ms(architecture, t) <= t.ms * margin for t in self.targets)

    def _screened_out(self, genotype: Genotype) -> tuple[Literal["size", "latency"], str]:
        """Why no width of a genotype was worth measuring: what its narrowest misses, and how."""
        width = self.space.available_widths(genotype)[-1]
        narrowest = self.space.realize(genotype, width, self.corpus.vocab_size)
        if problems := self.space.size_problems(narrowest):
            return "size", "; ".join(problems)
        predicted = [(target, self._screen_ms(narrowest, target)) for target in self.targets]
        return "latency", "; ".join(
            target.problem("predicted", ms, narrowest) for target, ms in predicted if ms > target.ms
        )

    def _measure_targets(
        self, claim: Claim, architecture: Architecture, result: dict[str, Any]
    ) -> str | None:
        """Measure under one workload after the other, until a target is missed: why, if one is.

        What was predicted and measured is put into `result`.
        """
        for target in self.targets:
            known = _latencies(result, target)
            known["predicted_ms"] = self._predict_ms(architecture, target.workload)
            known |= self._measure(claim, architecture, target)
            if known["latency_ms"] > target.ms:
                return target.problem("measured", known["latency_ms"], architecture)
        return None

    def _predict_ms(self, architecture: Architecture, workload: Workload) -> float:
        table = self.tables[workload, architecture.meta_tokens]
        from latency.roofline import footprint_bytes

        assert self.table.reference_times is not None
        assert table.reference_times is not None
        footprint = footprint_bytes(architecture, workload)
        speed = self.table.reference_times.at(footprint) / table.reference_times.at(footprint)
        return table.predict(architecture).request_ms * speed

    def _screen_ms(self, architecture: Architecture, target: Target) -> float:
        """What decides whether to measure; the reference has been measured already."""
        if self._is_reference(architecture):
            latency_ms: float = target.reference["latency_ms"]
            return latency_ms
        return self._predict_ms(architecture, target.workload)

    def _is_reference(self, architecture: Architecture) -> bool:
        is_reference: bool = architecture.digest == self.setup["reference"]["digest"]
        return is_reference

    def _measure(self, claim: Claim, architecture: Architecture, target: Target) -> dict[str, Any]:
        """Latency under the target's workload; the reference has been measured already."""
        if self._is_reference(architecture):
            return {name: target.reference[name] for name in MEASURED}
        measured: dict[str, Any] = self.run_job(
            "measure",
            str(architecture),
            target.workload,
            self.table.reference_times,
            on_wait=claim.beat,
        )
        return measured

    def _measure_reference(self, workload: Workload) -> dict[str, Any]:
        """Latency of the space's reference under a workload."""
        reference = self.space.reference(self.corpus.vocab_size)
        measured: dict[str, Any] = self.run_job(
            "measure", str(reference), workload, self.table.reference_times
        )
        return measured

    def _memory_bytes(self, architecture: Architecture) -> int:
        """Weights, and the state of the whole batch at the end of a request."""
        workload = self.config.workload
        itemsize = workload.torch_dtype.itemsize
        context = architecture.meta_tokens + workload.max_tokens
        state_bytes = architecture.state_bytes(context, itemsize)
        return itemsize * architecture.parameters() + workload.batch_size * state_bytes

    def _train(self, claim: Claim, architecture: str, start: str | None) -> dict[str, Any]:
        number, parent = claim.proposal.number, None
        if self.config.proxy.warm_start and claim.proposal.parent is not None:
            inherited = self.study.records[claim.proposal.parent].result
            parent = inherited["architecture"], inherited["checkpoint"]

        def on_report(progress: dict[str, Any]) -> None:
            if "warning" in progress:
                self.say(f"#{number} {progress['warning']}")
                return
            share, loss = progress["share"], progress["loss"]
            self.live(f"#{number} rung {claim.rung} training {share:4.0%}  loss {loss:.4f}")

        trained: dict[str, Any] = self.run_job(
            "train",
            architecture,
            self.config.proxy.rung_tokens[claim.rung],
            start,
            parent,
            f"{claim.name}.safetensors",
            on_report=on_report,
            on_wait=claim.beat,
        )
        return trained


def _target(given_ms: float | None, reference: Mapping[str, Any]) -> dict[str, Any]:
    """A target as the setup has it: what was given, or else what the reference takes."""
    if given_ms is None:
        return {"target_ms": reference["latency_ms"], "target_source": "reference"}
    return {"target_ms": given_ms, "target_source": "given"}


def _latencies(result: dict[str, Any], target: Target) -> dict[str, Any]:
    """The part of a result that holds what was predicted and measured under a target's workload."""
    if target.limit is None:
        return result
    latencies: dict[str, Any] = result.setdefault("limits", {}).setdefault(target.limit, {})
    return latencies
