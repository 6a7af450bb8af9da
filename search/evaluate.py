"""What is done to a candidate: measure it, train it, question it.

An evaluator lives in the worker process, so everything that goes in and out is plain and small;
weights stay on disk. Architectures are given as their canonical text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latency.timer import Protocol
from search.history import Quality
from search.proxy import ProxyConfig
from search.task import TaskConfig
from search.worker import Report
from slm.runtime import Runtime

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from latency.device import Device
    from latency.profile import Profile
    from latency.reference import ReferenceTimes
    from latency.workload import Workload
    from search.proxy import ProxyTraining
    from slm.architecture import Architecture
    from slm.data import PackedCorpus
    from slm.data.cloze import ClozeItem
    from slm.data.continuation import ContinuationItem
    from slm.evaluation import Accuracy
    from slm.model import LanguageModel


# Sentences, or stretches of text, that are scored at a time.
ACCURACY_BATCH_SIZE = 64
# Of a training curve that is recorded.
MAX_CURVE_POINTS = 64


@dataclass(frozen=True)
class BaseEvaluator:
    """What the evaluators of a search and of an operator study have in common.

    runtime: of the study, for the worker process.
    corpus_folder: of the packed corpus.
    latency_threads, training_threads: CPU threads; None: torch's choice.
    """

    runtime: Runtime
    corpus_folder: Path
    protocol: Protocol
    proxy: ProxyConfig
    latency_threads: int | None
    training_threads: int | None

    def _set_up_measuring(self) -> Device:
        from latency.device import Device

        self.runtime.apply()
        return Device.current(threads=self.latency_threads)

    def _set_up_training(self) -> PackedCorpus:
        import torch

        from slm.data import PackedCorpus

        self.runtime.apply()
        if self.training_threads is not None:
            torch.set_num_threads(self.training_threads)
        return PackedCorpus.open(self.corpus_folder)

    def _measure(self, text: str, workload: Workload) -> Profile:
        """Latency of the whole model, freshly initialised, by the decoder that users call."""
        from latency.profile import profile

        device = self._set_up_measuring()
        return profile(_parse(text), workload, device, self.protocol)

    def _train(
        self,
        text: str,
        corpus: PackedCorpus,
        tokens: int,
        seed: int,
        report: Report,
        start: Path | None = None,
        parent: tuple[Architecture, Path] | None = None,
    ) -> ProxyTraining:
        """The proxy training, gone on with from the file `start`."""
        from search.proxy import ProxyTraining

        try:
            training = ProxyTraining(_parse(text), corpus, self.proxy, seed, parent)
        except ValueError as error:
            # Its parent went on to another rung meanwhile.
            report({"warning": f"{error}; beginning without its parent"})
            training = ProxyTraining(_parse(text), corpus, self.proxy, seed)
        if start is not None:
            try:
                training.load(start)
            except ValueError as error:
                report({"warning": f"{error}; training it from its first token"})
        training.train(tokens, report)
        return training

    def _result(self, training: ProxyTraining, corpus: PackedCorpus) -> dict[str, Any]:
        """What is known of a training."""
        from slm.evaluation import bits_per_byte

        result = training.result()
        bits = bits_per_byte(result.loss, corpus.validation)
        return {**asdict(result), "bits_per_byte": bits}


@dataclass(frozen=True)
class Evaluator(BaseEvaluator):
    """Evaluates the candidates of a search.

    candidates_folder: where checkpoints are kept. cache_dir: where latencies are.
    quality: what candidates are ranked by. accuracy_items: questions for each kind of accuracy.
    task: what `task_error` asks.
    devices_per_candidate: processes that train a candidate together.
    """

    candidates_folder: Path
    cache_dir: Path
    seed: int
    quality: Quality
    accuracy_items: int
    task: TaskConfig
    devices_per_candidate: int

    def measure(
        self, text: str, workload: Workload, reference_times: ReferenceTimes, report: Report
    ) -> dict[str, float | bool]:
        """Latencies of a candidate under a workload.

        reference_times: of what runs beside every measurement, when the latency table was made. All
        times but `latency_raw_ms` are brought to that machine speed.
        What was measured before on this device, as carefully, is not measured again.
        """
        from latency.records import Records

        device = self._set_up_measuring()
        records = Records(self.cache_dir, device)
        unit = self.protocol.compile_unit
        record = records.read(_parse(text), workload, unit)
        if record is None or record["protocol"] != asdict(self.protocol):
            record = self._measure(text, workload).to_dict()
            records.write(record)
        request = record["request_ms"]
        scale = reference_times.scale(
            request["median_ms"], record["request_per_reference"], record["footprint_bytes"]
        )
        return {
            "latency_ms": scale * request["median_ms"],
            "latency_low_ms": scale * request["low_ms"],
            "latency_high_ms": scale * request["high_ms"],
            "latency_raw_ms": request["median_ms"],
            "latency_is_quiet": request["quiet"],
            "ttft_ms": scale * record["ttft_ms"]["median_ms"],
            "tpot_ms": scale * record["tpot_ms"]["median_ms"],
            "tokens_per_s": record["tokens_per_s"]["median"] / scale,
        }

    def train(
        self,
        text: str,
        tokens: int,
        start: str | None,
        parent: tuple[str, str] | None,
        checkpoint: str,
        report: Report,
    ) -> dict[str, Any]:
        """Proxy training until so many tokens in all were read.

        start: checkpoint to go on from; None begins with the first token, and with the weights of
        `parent`, an architecture and its checkpoint, if there is one. checkpoint: to leave behind.
        Checkpoints are files of `candidates_folder`.
        """
        return self._by_ranks(
            "train_here",
            report,
            text=text,
            tokens=tokens,
            start=start,
            parent=parent,
            checkpoint=checkpoint,
        )

    def train_here(
        self,
        text: str,
        tokens: int,
        start: str | None,
        parent: tuple[str, str] | None,
        checkpoint: str,
        report: Report,
    ) -> dict[str, Any]:
        """What `train` does, by this process, or by the rank that it is; the first has a result."""
        corpus = self._set_up_training()
        folder = self.candidates_folder
        training = self._train(
            text,
            corpus,
            tokens,
            self.seed,
            report,
            None if start is None else folder / start,
            None if parent is None else (_parse(parent[0]), folder / parent[1]),
        )
        if not training.ranks.is_first:
            return {}
        result = self._result(training, corpus)
        training.save(folder / checkpoint)
        result["loss_curve"] = _thinned(result["loss_curve"])
        return {
            **result,
            **self._errors(training.model, [self.quality]),
            "checkpoint": checkpoint,
        }

    def audit(
        self,
        text: str,
        budgets: Sequence[int],
        start: str | None,
        seed: int,
        qualities: Sequence[Quality],
        report: Report,
    ) -> dict[str, Any]:
        """Train until so many tokens in all were read, for each of the budgets; leave nothing.

        start: checkpoint to go on from; None begins with the first token. The result holds, as
        `scores`, the search's quality after each budget; and all `qualities` after the last.
        """
        return self._by_ranks(
            "audit_here",
            report,
            text=text,
            budgets=budgets,
            start=start,
            seed=seed,
            qualities=qualities,
        )

    def audit_here(
        self,
        text: str,
        budgets: Sequence[int],
        start: str | None,
        seed: int,
        qualities: Sequence[Quality],
        report: Report,
    ) -> dict[str, Any]:
        """What `audit` does, as `train_here` does it."""
        corpus = self._set_up_training()
        origin = None if start is None else self.candidates_folder / start
        training = self._train(text, corpus, budgets[0], seed, report, origin)
        found: dict[str, float] = {}
        scores = []
        for tokens in budgets:
            training.train(tokens, report)
            # The others wait for it before their next step.
            if training.ranks.is_first:
                loss = training.validate()
                found = {"loss": loss, **self._errors(training.model, [self.quality])}
                scores.append(found[self.quality])
        if not training.ranks.is_first:
            return {}
        others = [name for name in qualities if name != self.quality]
        return {"scores": scores, **found, **self._errors(training.model, others)}

    def _by_ranks(self, method: str, report: Report, **arguments: Any) -> dict[str, Any]:
        """What a method gives, run by a rank for each of a candidate's devices, or here for one."""
        from search.launch import run_by_ranks

        if self.devices_per_candidate == 1:
            result: dict[str, Any] = getattr(self, method)(**arguments, report=report)
            return result
        return run_by_ranks(self, method, arguments, self.devices_per_candidate, report)

    def question(self, checkpoints: dict[str, str], report: Report) -> dict[str, dict[str, float]]:
        """Cloze errors, by digest, of architectures whose checkpoints are given."""
        from search.proxy import load_weights

        self._set_up_training()
        found = {}
        for text, checkpoint in checkpoints.items():
            architecture = _parse(text)
            model = load_weights(architecture, self.candidates_folder / checkpoint)
            found[architecture.digest] = self._errors(model, ["cloze_error"])
            report({"share": len(found) / len(checkpoints)})
        return found

    # Made once in the life of the process: it takes a pass over the training text.

    @cached_property
    def _cloze(self) -> list[ClozeItem]:
        from slm.data.cloze import build_cloze

        return build_cloze(self._corpus, self.accuracy_items, self.seed)

    @cached_property
    def _continuations(self) -> list[ContinuationItem]:
        from slm.data.continuation import build_continuations

        return build_continuations(self._corpus, self.accuracy_items, self.seed)

    @cached_property
    def _corpus(self) -> PackedCorpus:
        from slm.data import PackedCorpus

        return PackedCorpus.open(self.corpus_folder)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from slm.data.tokenizer import load_tokenizer

        return load_tokenizer(self._corpus.tokenizer_path)

    def _errors(self, model: LanguageModel, qualities: Iterable[Quality]) -> dict[str, float]:
        """Shares of wrong answers with their 95 % intervals and numbers of items.

        The loss, if it is among the qualities, is not found by questions.
        """
        from latency.lock import device_lock

        found: dict[str, float] = {}
        for name in qualities:
            if name == "loss":
                continue
            # Shared: no latency is measured beside it.
            with device_lock(exclusive=False):
                accuracy = self._accuracy(model, name)
            found |= {
                name: 1 - accuracy.accuracy,
                f"{name}_low": 1 - accuracy.high,
                f"{name}_high": 1 - accuracy.low,
                f"{name}_items": accuracy.n,
            }
        return found

    def _accuracy(self, model: LanguageModel, name: Quality) -> Accuracy:
        from slm.evaluation import cloze_accuracy, continuation_accuracy

        if name == "task_error":
            return self.task.accuracy(model, self._tokenizer, ACCURACY_BATCH_SIZE, self.seed)
        if name == "cloze_error":
            return cloze_accuracy(model, self._tokenizer, self._cloze, ACCURACY_BATCH_SIZE)
        return continuation_accuracy(model, self._continuations, ACCURACY_BATCH_SIZE)


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points evenly spread over a curve, the last among them."""
    step = -(-len(curve) // MAX_CURVE_POINTS)
    return curve[::-1][::step][::-1]


def _parse(text: str) -> Architecture:
    from slm.architecture import Architecture

    return Architecture.parse(text)
