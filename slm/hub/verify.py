"""The self-check of an export: whoever loads it must get what the trained model gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm.config import ConfigError
from slm.data.tokenizer import load_tokenizer
from slm.hub.formats import FormatConfig
from slm.hub.loading import load_folder
from slm.model import LanguageModel
from slm.training.checkpoint import TOKENIZER_FILE

# Of the largest logit. Operations in fp32 on the same machine and number of threads: the same ones
# should differ by nothing, those of other classes by their order.
TOLERANCE = 1e-4
# Where a head that holds its norms was rounded to the weights' dtype: some units in the last place.
ROUNDED_TOLERANCE = 2**-6
NUM_ROWS, NUM_TOKENS = 2, 48


class VerificationError(RuntimeError):
    """An export does not load, or does not give what its model gives."""


@dataclass(frozen=True)
class Verification:
    """What the self-check found.

    max_abs_logit_difference: to the trained model's logits, on random tokens, both in fp32.
    cached_equals_uncached: greedy generation of a left-padded batch, with and without the cache;
        None where that is not ours to promise.
    sample: text generated from `prompt`, the prompt included; None where nothing here generates.
    """

    max_abs_logit_difference: float
    cached_equals_uncached: bool | None
    prompt: str
    sample: str | None
    seconds: float


def verify(model: LanguageModel, folder: Path, config: FormatConfig) -> Verification:
    """Load the export in `folder` as others would; compare with `model`.

    transformers loads it in a process where this project cannot be imported. NVIDIA's layout,
    which needs NVIDIA's code, is read back here. `model` is in fp32 afterwards. Raises
    VerificationError if the export does not load, or does not give what `model` gives.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_ROWS, NUM_TOKENS)
    tokens = torch.randint(model.architecture.vocab_size, shape, generator=generator)
    report: dict[str, Any] = {}
    if config.format == "nemotron_flash":
        logits = _logits(load_folder(folder)[0], tokens)
    else:
        logits, report = _reload(folder, config, tokens)
    is_rounded = (
        config.format == "native"
        and model.architecture.normalize_logits
        and model.norm.weight.dtype != torch.float32
    )
    expected = _logits(model, tokens)
    difference = float((expected - logits).abs().max())
    tolerance = ROUNDED_TOLERANCE if is_rounded else TOLERANCE
    if not difference <= tolerance * float(expected.abs().max()):
        raise VerificationError(f"export '{folder}': its logits differ by {difference:.3g}")
    if report.get("cached_equals_uncached") is False:
        raise VerificationError(f"export '{folder}': generates something else with a cache")
    return Verification(
        max_abs_logit_difference=difference,
        cached_equals_uncached=report.get("cached_equals_uncached"),
        prompt=config.prompt,
        sample=report.get("sample"),
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits in fp32 of a model, whose weights, if they are in less, become fp32 on the way."""
    return model.float()(tokens)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Raise ConfigError for what cannot be read or written, or does not pass its check."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, VerificationError) as error:
        raise ConfigError([" ".join(str(error).split())]) from error


def _reload(folder: Path, config: FormatConfig, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Logits and report of `reload.py`, run in a clean process.

    It has no cached code and no network, and keeps itself from importing this project.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        logits_file, report_file = Path(scratch) / "logits", Path(scratch) / "report"
        request = {
            "folder": str(folder.resolve()),
            "is_own": config.format == "slm",
            "tokens": tokens.tolist(),
            "prompt": config.prompt,
            "new_tokens": config.new_tokens,
            "threads": torch.get_num_threads(),
            "logits": str(logits_file),
            "report": str(report_file),
        }
        environment = os.environ | {
            "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).with_name("reload.py"))],
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise VerificationError(f"export '{folder}': does not load: {reason}")
        report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
        logits = load_file(logits_file)["logits"]
    _check_tokenizer(folder, config.prompt, report["prompt_ids"])
    return logits, report


def _check_tokenizer(folder: Path, prompt: str, ids: list[int] | None) -> None:
    """Raise VerificationError if transformers cuts the prompt otherwise than training did."""
    if ids is not None and ids != load_tokenizer(folder / TOKENIZER_FILE).encode(prompt).ids:
        raise VerificationError(f"export '{folder}': the tokenizer cuts {prompt!r} differently")
