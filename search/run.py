"""One search from start to end: data, device, table, target, candidates, frontier.

What is known lives in the study. Everything else in the run folder is written from it, so the same
command goes on wherever the last one ended.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latency.device import Device
from search import results
from search.config import SearchConfig
from search.evaluate import Evaluator
from search.evolution import propose
from search.loggers import Logger, open_logger
from search.progress import Progress, Stopwatch, format_count, format_duration, format_latency
from search.run_folder import RunFolder, write_json
from search.space import SearchSpace
from search.study import Claim, Record, StaleTrialError, Study
from search.worker import JobError, Worker
from slm.architecture import Architecture
from slm.config import ConfigError
from slm.kernels.backend import set_backend

if TYPE_CHECKING:
    from latency.table import LatencyTable
    from slm.data import PackedCorpus
# What the table predicts to be so much over the target is measured all the same: it may err.
SCREEN_MARGIN = 1.1
# What `Evaluator.measure` gives.
MEASURED = (
    *("latency_ms", "latency_low_ms", "latency_high_ms", "latency_raw_ms", "latency_is_quiet"),
    *("ttft_ms", "tpot_ms", "tokens_per_s"),
)


class Search:
    """A search in its run folder; make it, then `run` it.

    Raises ConfigError if the folder holds another search under the same name.
    """

    def __init__(self, config: SearchConfig, run_folder: Path) -> None:
        self.config = config
        self.folder = run_folder
        self.space = SearchSpace(config.space)
        set_backend(config.backend)
        self.device = Device.current(threads=config.latency_threads)
        identity = {**config.identity(), "device": self.device.key}
        self.study = Study.open(config.storage, run_folder, config.name, identity)
        self.files = RunFolder(run_folder, config, self.space, self.device, self.study)
        self.progress = Progress(config.num_candidates)
        # What has to be closed at the end: the worker and the logger.
        self.resources = ExitStack()
        self.stopwatch = Stopwatch()
        self.seconds_before = self.study.fact("seconds") or 0.0

    def run(self) -> dict[str, Any]:
        """Search until enough candidates are evaluated; the summary of `frontier.json`."""
        if self._is_finished():
            return self._tell_result()
        status = "interrupted"
        with self.resources:
            try:
                self._prepare()
                self._evaluate_candidates()
                self._question_frontier()
                others = any(record.state == "running" for record in self.study.records())
                status = "running" if others else "finished"
            except KeyboardInterrupt:
                self.progress.say("interrupted; the same command goes on from here")
                raise
            finally:
                if self.study.fact("setup") is not None:
                    self._publish(status)
                    self.files.write_report()
        return self._tell_result()

    # What the candidates are evaluated with

    @cached_property
    def corpus(self) -> PackedCorpus:
        """The packed corpus, prepared the first time."""
        from slm.data import prepare

        return prepare(self.config.data, self.config.tokenizer, progress=self.progress.say)

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
                progress=self.progress.say,
            )
            for meta_tokens in self.config.space.meta_tokens
        }

    @property
    def table(self) -> LatencyTable:
        """The table whose machine speed all times of the search are brought to."""
        return self.tables[self.config.space.meta_tokens[0]]

    def _predict_ms(self, architecture: Architecture) -> float:
        table = self.tables[architecture.meta_tokens]
        assert self.table.reference_ms is not None
        assert table.reference_ms is not None
        speed = self.table.reference_ms / table.reference_ms
        return table.predict(architecture).request_ms * speed

    def _screen_ms(self, architecture: Architecture) -> float:
        """What decides whether to measure; the reference has been measured already."""
        reference = self.study.fact("setup")["reference"]
        is_reference = architecture.digest == reference["digest"]
        return reference["latency_ms"] if is_reference else self._predict_ms(architecture)

    @cached_property
    def worker(self) -> Worker:
        """The process that measures and trains."""
        worker = Worker(
            Evaluator(
                runtime=self.config.runtime(),
                candidates_folder=self.folder / "candidates",
                corpus_folder=self.corpus.folder.resolve(),
                workload=self.config.workload,
                protocol=self.config.protocol,
                proxy=self.config.proxy,
                seed=self.config.seed,
                latency_threads=self.config.latency_threads,
                training_threads=self.config.training_threads,
            )
        )
        self.resources.callback(worker.close)
        return worker

    @cached_property
    def logger(self) -> Logger:
        """Where candidates are logged besides the run folder."""
        logger = open_logger(self.config, self.folder, self.study)
        self.resources.callback(logger.close)
        return logger

    @property
    def target_ms(self) -> float:
        """The latency that candidates must meet."""
        return self.study.fact("setup")["target_ms"]

    def _prepare(self) -> None:
        """Settle the facts that all candidates share."""
        self.progress.say(f"search '{self.config.name}' on {self.device.key}")
        (self.folder / "candidates").mkdir(exist_ok=True)
        self.progress.say(
            f"corpus: {len(self.corpus.train):,} tokens to train on, "
            f"vocabulary {self.corpus.vocab_size}"
        )
        if self.study.fact("setup") is None:
            self.study.settle("setup", self._setup())
        setup = self.study.fact("setup")
        self.progress.target_ms = setup["target_ms"]
        source = setup["reference"] if setup["target_source"] == "reference" else None
        name = f", that of the {source['name']} ({format_latency(source)})" if source else ""
        self.progress.say(f"target: {setup['target_ms']:.4g} ms per request{name}")
        self._publish("running")

    def _setup(self) -> dict[str, Any]:
        """Target and reference, and what else is found out once."""
        reference = self.space.reference(self.corpus.vocab_size)
        # Built before anything is timed against it.
        table_path = self.table.path(self.config.data.cache_dir)
        measurement = self._run_job("measure", str(reference), self.table.reference_ms)
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
            "started_at": _now(),
            "vocab_size": self.corpus.vocab_size,
            "train_tokens": len(self.corpus.train),
            "validation_tokens": len(self.corpus.validation),
            "bytes_per_token": self.corpus.validation.num_bytes / len(self.corpus.validation),
        }

    # The loop

    def _evaluate_candidates(self) -> None:
        while (claim := self._next_claim()) is not None:
            watch = Stopwatch()
            try:
                with claim:
                    self._evaluate(claim)
            except StaleTrialError as error:
                self.progress.say(f"{error}; going on with the next")
                continue
            number = claim.proposal.number
            if self.study.records()[number].state != "infeasible":
                self.progress.add_duration(watch.seconds)
            self._publish("running")
            self._tell_candidate(number)

    def _next_claim(self) -> Claim | None:
        """A candidate that lost its process, else a new one; None when the search is over."""
        while True:
            self.study.reap()
            if (claim := self.study.take_queued()) is not None:
                return claim
            records = self.study.records()
            if self._num_tried(records) >= self.config.num_candidates:
                return None
            self._check_feasibility(records)
            history = [record.candidate for record in records]
            proposal = propose(
                self.space, self.config.evolution, self.config.seed, self.target_ms, history
            )
            if proposal is None:
                self.progress.say("the space has no further architecture that can be reached")
                return None
            if (claim := self.study.propose(proposal)) is not None:
                return claim

    @staticmethod
    def _num_tried(records: list[Record]) -> int:
        return sum(record.state != "infeasible" for record in records)

    def _check_feasibility(self, records: list[Record]) -> None:
        """Give up if for long nothing has met the target."""
        recent = records[-self.config.max_infeasible :]
        if len(recent) == self.config.max_infeasible and not self._num_tried(recent):
            raise ConfigError(
                [
                    f"target_ms: {self.target_ms:.4g} is out of reach, the last {len(recent)} "
                    f"proposals missed it at every width; the last one: {recent[-1].error}"
                ]
            )

    def _evaluate(self, claim: Claim) -> None:
        """Choose the width, measure, train, record."""
        try:
            architecture, measurement = self._fit(claim)
            if architecture is None:
                return
            training = self._train(claim, architecture)
        except JobError as error:
            claim.fail(str(error))
            return
        curve = training.pop("loss_curve")
        write_json(
            self.folder / "candidates" / f"{architecture.digest}.json",
            {
                "number": claim.proposal.number,
                "architecture": str(architecture),
                "digest": architecture.digest,
                "genotype": claim.proposal.genotype.to_json(),
                **measurement,
                **training,
                "loss_curve": curve,
            },
        )
        loss = training.pop("loss")
        claim.note(training=training)
        claim.complete(loss, measurement["latency_ms"])

    def _fit(self, claim: Claim) -> tuple[Architecture | None, dict[str, float]]:
        """The widest realization that meets the target, and its latency; None if none does.

        The table screens, the measurement of the whole model decides.
        """
        genotype, target_ms = claim.proposal.genotype, self.target_ms
        fitting = self.space.fitting(
            genotype,
            self.corpus.vocab_size,
            self._screen_ms,
            target_ms * (1 + self.config.screen_margin),
        )
        for architecture in fitting:
            self.progress.live(f"#{claim.proposal.number} measuring at width {architecture.width}")
            measurement = self._measure(architecture)
            claim.note(architecture=str(architecture), measurement=measurement)
            if measurement["latency_ms"] <= target_ms:
                return architecture, measurement
        if fitting:
            claim.reject(f"measured {measurement['latency_ms']:.4g} ms at its narrowest")
        else:
            width = self.space.available_widths(genotype)[-1]
            narrowest = self.space.realize(genotype, width, self.corpus.vocab_size)
            problems = self.space.size_problems(narrowest)
            claim.reject(
                "; ".join(problems)
                or f"predicted {self._predict_ms(narrowest):.4g} ms at its narrowest"
            )
        return None, {}

    def _measure(self, architecture: Architecture) -> dict[str, float]:
        """Latency, predicted and measured; the reference has been measured already."""
        reference = self.study.fact("setup")["reference"]
        if architecture.digest == reference["digest"]:
            measured = {name: reference[name] for name in MEASURED}
        else:
            measured = self._run_job("measure", str(architecture), self.table.reference_ms)
        return {"predicted_ms": self._predict_ms(architecture), **measured}

    def _train(self, claim: Claim, architecture: Architecture) -> dict[str, Any]:
        number = claim.proposal.number

        def on_report(progress: dict[str, Any]) -> None:
            claim.beat()
            share, loss = progress["share"], progress["loss"]
            self.progress.live(f"#{number} training {share:4.0%}  loss {loss:.4f}")

        tokens = self.config.proxy.rung_tokens[0]
        return self._run_job("train", str(architecture), tokens, on_report=on_report)

    def _run_job(self, method: str, *arguments: Any, **options: Any) -> Any:
        limit_s = self.config.proxy.time_limit_s
        return self.worker.run(method, *arguments, time_limit_s=limit_s, **options)

    # The frontier

    def _question_frontier(self) -> None:
        """Cloze accuracy of the frontier's members that do not have it yet."""
        known = self.study.fact("accuracies") or {}
        members = [row for row in results.frontier(self.files.rows()) if row["digest"] not in known]
        if not members or not self.config.cloze_items:
            return
        self.progress.say(f"accuracy of {len(members)} candidates of the frontier")
        architectures = [row["architecture"] for row in members]
        try:
            found = self._run_job("accuracies", architectures, self.config.cloze_items)
        except JobError as error:
            self.progress.say(f"no accuracy: {error}")
            return
        self.study.update("accuracies", known | found)

    # For people

    def _publish(self, status: str) -> None:
        seconds = self.seconds_before + self.stopwatch.seconds
        self.files.publish(status, round(seconds, 1))

    def _tell_candidate(self, number: int) -> None:
        rows = self.files.rows()
        row, best = rows[number], results.chosen(rows)
        num_done = sum(row["state"] in ("scored", "failed") for row in rows)
        self.progress.candidate(row, best, num_done)
        self.logger.log(row, best)

    def _is_finished(self) -> bool:
        return (
            self.study.fact("status") == "finished"
            and self._num_tried(self.study.records()) >= self.config.num_candidates
            and (self.folder / "frontier.json").exists()
        )

    def _tell_result(self) -> dict[str, Any]:
        """Show the frontier and what to do with it."""
        setup, rows = self.study.fact("setup"), self.files.rows()
        summary = results.frontier_summary(rows, self.target_ms, setup["vocab_size"])
        seconds = self.study.fact("seconds")
        self.progress.say(
            f"{summary['num_scored']} candidates scored, {summary['num_failed']} failed, "
            f"{summary['num_infeasible']} too slow, in {format_duration(seconds)}"
        )
        for row in summary["members"]:
            mark = "*" if row["digest"] == summary["chosen"] else " "
            accuracy = "" if row["accuracy"] is None else f"  cloze {row['accuracy']:.1%}"
            self.progress.say(
                f"{mark} {row['digest']}  {format_latency(row):<18} loss {row['loss']:.4f}"
                f"{accuracy}  w={row['width']} {format_count(row['parameters'])}  {row['short']}"
            )
        if summary["chosen"] is not None:
            command = results.training_command(self.folder, summary["chosen"], self.config.plugins)
            self.progress.say(f"train it: {command}")
        if (self.folder / "report.html").exists():
            self.progress.say(f"look at it: {self.folder}/report.html")
        return summary


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
