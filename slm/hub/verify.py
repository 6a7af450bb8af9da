"""The self-check of an export: a stranger's process must get what the trained model gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from slm.data.tokenizer import load_tokenizer
from slm.model import LanguageModel

# The same fp32 operations on the same machine and number of threads should differ by nothing.
LOGIT_TOLERANCE = 1e-4
NUM_ROWS, NUM_TOKENS = 2, 48


@dataclass(frozen=True)
class Verification:
    """What the self-check found.

    max_abs_logit_difference: to the trained model's logits, on random tokens.
    cached_equals_uncached: greedy generation of a left-padded batch, with and without the cache.
    sample: text generated from `prompt`, the prompt included.
    """

    max_abs_logit_difference: float
    cached_equals_uncached: bool
    prompt: str
    sample: str
    seconds: float


def verify(model: LanguageModel, folder: Path, prompt: str, new_tokens: int) -> Verification:
    """Load the export in `folder` where this project cannot be imported; compare with `model`.

    Raises RuntimeError if it does not load, or does not give what `model` gives.
    """
    start = time.perf_counter()
    vocab_size = model.architecture.vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (NUM_ROWS, NUM_TOKENS), generator=generator)
    with tempfile.TemporaryDirectory() as scratch:
        logits_file, report_file = Path(scratch) / "logits", Path(scratch) / "report"
        request = {
            "folder": str(folder.resolve()),
            "tokens": tokens.tolist(),
            "prompt": prompt,
            "new_tokens": new_tokens,
            "threads": torch.get_num_threads(),
            "logits": str(logits_file),
            "report": str(report_file),
        }
        _reload(request, Path(scratch))
        report = json.loads(report_file.read_text(encoding="utf-8"))
        difference = _logit_difference(model, tokens, logits_file)

    expected = load_tokenizer(folder / "tokenizer.json").encode(prompt).ids
    if report["prompt_ids"] != expected:
        raise RuntimeError(f"export '{folder}': the tokenizer cuts {prompt!r} differently")
    if not difference <= LOGIT_TOLERANCE:
        raise RuntimeError(f"export '{folder}': its logits differ by {difference:.3g}")
    if not report["cached_equals_uncached"]:
        raise RuntimeError(f"export '{folder}': generates something else with a cache")
    return Verification(
        max_abs_logit_difference=difference,
        cached_equals_uncached=True,
        prompt=prompt,
        sample=report["sample"],
        seconds=time.perf_counter() - start,
    )


def _reload(request: dict[str, object], scratch: Path) -> None:
    """Run `reload.py` in a clean process: no paths of this one, no cached code, no network."""
    environment = os.environ | {
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("reload.py"))],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"export '{request['folder']}': does not load: {reason}")


def _logit_difference(model: LanguageModel, tokens: torch.Tensor, logits_file: Path) -> float:
    from safetensors.torch import load_file

    with torch.no_grad():
        return float((model(tokens) - load_file(logits_file)["logits"]).abs().max())
