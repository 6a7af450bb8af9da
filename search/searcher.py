"""One worker of a search: claims a candidate, measures it, trains it, records it, and so on.

Any number of them, on any machines that share the study's storage, work on one search. What they
have to agree on is in the study.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latency.device import Device
from search.config import SearchConfig
from search.devices import visible_devices
from search.evaluate import Evaluator
from search.evolution import next_step
from search.history import Promotion
from search.progress import WAITING
from search.space import SearchSpace
from search.study import Claim, StaleTrialError, Study
from search.worker import JobError, Worker
from slm.architecture import Architecture
from slm.config import ConfigError
from slm.kernels.backend import set_backend

if TYPE_CHECKING:
    from latency.table import LatencyTable
    from slm.data import PackedCorpus

# What `Evaluator.measure` gives.
MEASURED = (
    *("latency_ms", "latency_low_ms", "latency_high_ms", "latency_raw_ms", "latency_is_quiet"),
    *("ttft_ms", "tpot_ms", "tokens_per_s"),
)
# What higher rungs take over from the first.
KEPT = frozenset(("architecture", "memory_bytes", "predicted_ms", *MEASURED))
# While others work on the last candidates: between two looks at whether they lost one.
IDLE_SECONDS = 1.0


class Searcher:
    """Worker number `index` of the search in a run folder.

    say: takes lines, live: what it does at the moment; both for people. Raises ConfigError if the
    folder holds another search under the name.
    """

    def __init__(
        self,
        config: SearchConfig,
        run_folder: Path,
        index: int = 0,
        say: Callable[[str], None] = print,
        live: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.folder = run_folder
        self.index = index
        self.say, self.live = say, live
        self.space = SearchSpace(config.space)
        set_backend(config.backend)
        self.device = Device.current(threads=config.latency_threads)
        identity = {**config.identity(), "device": self.device.key}
        self.study = Study.open(
            config.storage,
            run_folder,
            config.name,
            identity,
            self.space,
            config.evolution.objectives,
        )
        # What has to be closed at the end.
        self.resources = ExitStack()

    # What candidates are evaluated with

    @cached_property
    def corpus(self) -> PackedCorpus:
        """The packed corpus, prepared the first time."""
        from slm.data import prepare

        return prepare(self.config.data, self.config.tokenizer, progress=self.say)

    @cached_property
    def tables(self) -> dict[int, LatencyTable]:
        """The space's latency table by number of meta tokens, measured the first time."""
        from latency.table import LatencyTable

        return {
            meta_tokens: LatencyTable.load_or_build(
                self.space.operators(),
                self.corpus.vocab_size,
                self.config.workload,
                self.device,
                meta_tokens=meta_tokens,
                normalize_logits=self.config.space.normalize_logits,
                cache_dir=self.config.data.cache_dir,
                protocol=self.config.protocol,
                progress=self.say,
            )
            for meta_tokens in self.config.space.meta_tokens
        }

    @property
    def table(self) -> LatencyTable:
        """The table whose machine speed all times of the search are brought to."""
        return self.tables[self.config.space.meta_tokens[0]]

    @cached_property
    def worker(self) -> Worker:
        """The process that measures and trains."""
        worker = Worker(
            Evaluator(
                runtime=self.config.runtime(),
                candidates_folder=self.candidates_folder,
                cache_dir=self.config.data.cache_dir.resolve(),
                corpus_folder=self.corpus.folder.resolve(),
                workload=self.config.workload,
                protocol=self.config.protocol,
                proxy=self.config.proxy,
                seed=self.config.seed,
                quality=self.config.evolution.quality,
                accuracy_items=self.config.accuracy_items,
                latency_threads=self.config.latency_threads,
                training_threads=self.config.threads_to_train,
            ),
            visible_devices(self.index),
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
        """The latency that candidates must meet."""
        target_ms: float = self.setup["target_ms"]
        return target_ms

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
        measurement = self.run_job("measure", str(reference), self.table.reference_ms)
        given_ms = self.config.target_ms
        return {
            "target_ms": measurement["latency_ms"] if given_ms is None else given_ms,
            "target_source": "reference" if given_ms is None else "given",
            "reference": {
                "name": self.config.space.reference.seed,
                "architecture": str(reference),
                "digest": reference.digest,
                "parameters": reference.parameters(),
                **measurement,
            },
            "table": str(table_path),
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
        while True:
            self.study.reap()
            if (claim := self.study.take_queued()) is not None:
                return claim
            self._check_feasibility()
            step = next_step(
                self.space,
                self.config.evolution,
                self.config.seed,
                self.target_ms,
                self.study.history,
                num_rungs=len(self.config.proxy.rung_tokens),
                num_candidates=self.config.num_candidates,
            )
            if step is None:
                if not self.study.num_running:
                    if self.study.history.num_tried < self.config.num_candidates:
                        self.say("the space has no further architecture that can be reached")
                    return None
                self.live(WAITING)
                time.sleep(IDLE_SECONDS)
                continue
            if isinstance(step, Promotion):
                claim = self.study.promote(step)
            else:
                claim = self.study.propose(step)
            # Otherwise another process was faster.
            if claim is not None:
                return claim

    def _check_feasibility(self) -> None:
        """Give up if for long nothing has met the target."""
        recent = self.study.records[-self.config.max_infeasible :]
        if len(recent) == self.config.max_infeasible and all(
            record.state == "infeasible" for record in recent
        ):
            raise ConfigError(
                [
                    f"target_ms: {self.target_ms:.4g} is out of reach, or the space's constraints "
                    f"are: the last {len(recent)} proposals met neither at any width; the last "
                    f"one: {recent[-1].error}"
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
        claim.complete(values, result, result["latency_ms"] - self.target_ms)
        if start is not None:
            (self.candidates_folder / start).unlink(missing_ok=True)

    def _fit(self, claim: Claim) -> tuple[Architecture | None, dict[str, Any]]:
        """The widest realization that meets the target, and what is known of it; None if none does.

        The table screens, the measurement of the whole model decides.
        """
        genotype, target_ms = claim.proposal.genotype, self.target_ms
        fitting = self.space.fitting(
            genotype,
            self.corpus.vocab_size,
            self._screen_ms,
            target_ms * (1 + self.config.screen_margin),
        )
        result: dict[str, Any] = {}
        for architecture in fitting:
            self.live(f"#{claim.proposal.number} measuring at width {architecture.width}")
            result = {
                "architecture": str(architecture),
                "memory_bytes": self._memory_bytes(architecture),
                "predicted_ms": self._predict_ms(architecture),
                **self._measure(claim, architecture),
            }
            if result["latency_ms"] <= target_ms:
                return architecture, result
        if fitting:
            result["misses"] = "latency"
            claim.reject(f"measured {result['latency_ms']:.4g} ms at its narrowest", result)
        else:
            width = self.space.available_widths(genotype)[-1]
            narrowest = self.space.realize(genotype, width, self.corpus.vocab_size)
            problems = self.space.size_problems(narrowest)
            result["misses"] = "size" if problems else "latency"
            claim.reject(
                "; ".join(problems)
                or f"predicted {self._predict_ms(narrowest):.4g} ms at its narrowest",
                result,
            )
        return None, result

    def _predict_ms(self, architecture: Architecture) -> float:
        table = self.tables[architecture.meta_tokens]
        assert self.table.reference_ms is not None
        assert table.reference_ms is not None
        speed = self.table.reference_ms / table.reference_ms
        return table.predict(architecture).request_ms * speed

    def _screen_ms(self, architecture: Architecture) -> float:
        """What decides whether to measure; the reference has been measured already."""
        reference = self.setup["reference"]
        is_reference = architecture.digest == reference["digest"]
        return reference["latency_ms"] if is_reference else self._predict_ms(architecture)

    def _measure(self, claim: Claim, architecture: Architecture) -> dict[str, Any]:
        """Latency; the reference has been measured already."""
        reference = self.setup["reference"]
        if architecture.digest == reference["digest"]:
            return {name: reference[name] for name in MEASURED}
        measured: dict[str, Any] = self.run_job(
            "measure", str(architecture), self.table.reference_ms, on_wait=claim.beat
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
