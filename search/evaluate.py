"""What is done to a candidate: measure it, train it, question it.

An evaluator lives in the worker process, so everything that goes in and out is plain and small;
weights stay on disk. Architectures are given as their canonical text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.worker import Report

if TYPE_CHECKING:
    from latency.device import Device
    from latency.profile import Profile
    from latency.timer import Protocol
    from latency.workload import Workload
    from search.proxy import ProxyConfig, ProxyTraining
    from slm.architecture import Architecture
    from slm.data import PackedCorpus
    from slm.runtime import Runtime


CLOZE_BATCH_SIZE = 64


@dataclass(frozen=True)
class BaseEvaluator:
    """What the evaluators of a search and of an operator study have in common.

    runtime: of the study, for the worker process.
    corpus_folder: of the packed corpus.
    latency_threads, training_threads: CPU threads; None: torch's choice.
    """

    runtime: Runtime
    corpus_folder: Path
    workload: Workload
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

    def _measure(self, text: str, reference_ms: float) -> tuple[Profile, float]:
        """Latency of the whole model, freshly initialised, by the decoder that users call.

        Also the factor that brings its times to the machine speed at which the request that runs
        beside every measurement took `reference_ms`, so that models measured an hour apart compare.
        """
        from latency.profile import profile

        device = self._set_up_measuring()
        result = profile(_parse(text), self.workload, device, self.protocol)
        return result, result.request_per_reference * reference_ms / result.request_ms.median_ms

    def _train(
        self, text: str, corpus: PackedCorpus, tokens: int, seed: int, report: Report
    ) -> tuple[ProxyTraining, dict[str, Any]]:
        """The proxy training, and what is known of it."""
        from search.proxy import ProxyTraining
        from slm.evaluation import bits_per_byte

        training = ProxyTraining(_parse(text), corpus, self.proxy, seed)
        training.train(tokens, report)
        result = training.result()
        bits = bits_per_byte(result.loss, corpus.validation)
        return training, {**asdict(result), "bits_per_byte": bits}


@dataclass(frozen=True)
class Evaluator(BaseEvaluator):
    """Evaluates the candidates of a search.

    candidates_folder: where weights are kept, `<digest>.safetensors`.
    """

    candidates_folder: Path
    seed: int

    def measure(
        self, text: str, table_reference_ms: float, report: Report
    ) -> dict[str, float | bool]:
        """Latencies of a candidate.

        table_reference_ms: how long the request that runs beside every measurement took when the
        latency table was made. All times but `latency_raw_ms` are brought to that machine speed.
        """
        result, scale = self._measure(text, table_reference_ms)
        request = result.request_ms
        return {
            "latency_ms": scale * request.median_ms,
            "latency_low_ms": scale * request.low_ms,
            "latency_high_ms": scale * request.high_ms,
            "latency_raw_ms": request.median_ms,
            "latency_is_quiet": request.quiet,
            "ttft_ms": scale * result.ttft_ms.median_ms,
            "tpot_ms": scale * result.tpot_ms.median_ms,
            "tokens_per_s": result.tokens_per_s[0] / scale,
        }

    def train(self, text: str, tokens: int, report: Report) -> dict[str, Any]:
        """Proxy training; keeps the weights."""
        corpus = self._set_up_training()
        training, result = self._train(text, corpus, tokens, self.seed, report)
        training.save(self.weights_path(_parse(text)))
        return result

    def accuracies(
        self, texts: list[str], num_items: int, report: Report
    ) -> dict[str, dict[str, Any]]:
        """Cloze accuracy, by digest, of candidates that were trained before."""
        from search.proxy import load_weights
        from slm.data.cloze import build_cloze
        from slm.data.tokenizer import load_tokenizer
        from slm.evaluation import cloze_accuracy

        corpus = self._set_up_training()
        tokenizer = load_tokenizer(corpus.tokenizer_path)
        items = build_cloze(corpus, num_items, self.seed)
        found = {}
        for architecture in map(_parse, texts):
            model = load_weights(architecture, self.weights_path(architecture))
            result = cloze_accuracy(model, tokenizer, items, CLOZE_BATCH_SIZE)
            found[architecture.digest] = asdict(result)
            report({"share": len(found) / len(texts)})
        return found

    def weights_path(self, architecture: Architecture) -> Path:
        """Where an architecture's proxy weights are kept."""
        return self.candidates_folder / f"{architecture.digest}.safetensors"


def _parse(text: str) -> Architecture:
    from slm.architecture import Architecture

    return Architecture.parse(text)
