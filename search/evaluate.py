"""What is done to a candidate: measure it, train it, question it.

`Evaluator` lives in the worker process, so everything that goes in and out is plain and small;
weights stay on disk.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.worker import Report

if TYPE_CHECKING:
    from latency.timer import Protocol
    from latency.workload import Workload
    from search.proxy import ProxyConfig
    from slm.architecture import Architecture
    from slm.model import LanguageModel
    from slm.runtime import Runtime


CLOZE_BATCH_SIZE = 64


@dataclass(frozen=True)
class Evaluator:
    """Evaluates architectures, given as their canonical text.

    candidates_folder: where weights are kept, `<digest>.safetensors`.
    corpus_folder: of the packed corpus.
    runtime: of the search, for the worker process.
    latency_threads, training_threads: CPU threads; None: torch's choice.
    """

    runtime: Runtime
    candidates_folder: Path
    corpus_folder: Path
    workload: Workload
    protocol: Protocol
    proxy: ProxyConfig
    seed: int
    latency_threads: int | None
    training_threads: int | None

    def measure(
        self, text: str, table_reference_ms: float, report: Report
    ) -> dict[str, float | bool]:
        """Latency of the whole model, freshly initialised, by the decoder that users call.

        table_reference_ms: how long the request that runs beside every measurement took when the
        latency table was made. All times but `latency_raw_ms` are brought to that machine speed,
        so that candidates measured an hour apart compare.
        """
        from latency.device import Device
        from latency.profile import profile

        self.runtime.apply()
        device = Device.current(threads=self.latency_threads)
        result = profile(_parse(text), self.workload, device, self.protocol)
        request = result.request_ms
        scale = result.request_per_reference * table_reference_ms / request.median_ms
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
        from search.proxy import train_proxy
        from slm.data import PackedCorpus
        from slm.evaluation import bits_per_byte

        self._set_up_training()
        architecture = _parse(text)
        corpus = PackedCorpus.open(self.corpus_folder)
        model, result = train_proxy(
            architecture, corpus, self.proxy, tokens=tokens, seed=self.seed, report=report
        )
        save_weights(model, self.weights_path(architecture))
        bits = bits_per_byte(result.loss, corpus.validation)
        return {**asdict(result), "bits_per_byte": bits}

    def accuracies(
        self, texts: list[str], num_items: int, report: Report
    ) -> dict[str, dict[str, Any]]:
        """Cloze accuracy, by digest, of candidates that were trained before."""
        from slm.data import PackedCorpus
        from slm.data.cloze import build_cloze
        from slm.data.tokenizer import load_tokenizer
        from slm.evaluation import cloze_accuracy

        self._set_up_training()
        corpus = PackedCorpus.open(self.corpus_folder)
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

    def _set_up_training(self) -> None:
        import torch

        self.runtime.apply()
        if self.training_threads is not None:
            torch.set_num_threads(self.training_threads)


def save_weights(model: LanguageModel, path: Path) -> None:
    """Write a model's weights, whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, temporary, metadata={"architecture": str(model.architecture)})
    os.replace(temporary, path)


def load_weights(architecture: Architecture, path: Path) -> LanguageModel:
    """A model with the weights of `save_weights`, on the GPU if there is one."""
    import torch
    from safetensors.torch import load_file

    from slm.model import LanguageModel

    model = LanguageModel(architecture)
    model.load_state_dict(load_file(path))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _parse(text: str) -> Architecture:
    from slm.architecture import Architecture

    return Architecture.parse(text)
