"""What the model writes: a few texts that it goes on with at each validation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from slm.data.packing import PackedCorpus
from slm.data.tokenizer import load_tokenizer
from slm.generation import Decoder
from slm.model import LanguageModel
from slm.training.files import write_atomically
from slm.training.loggers import log_texts
from slm.training.metrics import Metrics
from slm.training.module import TrainingModule

if TYPE_CHECKING:
    from slm.training.callbacks import Validation

SAMPLES_FILE = "samples.jsonl"
# Tokens of a held-out document that the model is given, after the end of text.
PROMPT_TOKENS = 16
TEMPERATURE = 0.8
TOP_P = 0.95
# Of a line that is shown.
SHOWN_CHARACTERS = 160


class Samples(Callback):
    """After each validation the model goes on with the first tokens of held-out documents.

    `path` gets one line of JSON per text: {"step": …, "prompt": …, "text": …}. Every time it is the
    same documents and the same draws, from a generator of its own: training is not disturbed.
    Of a model that has diverged nothing is drawn.

    num_texts: how many; num_tokens: most tokens of each, fewer if the model ends the text; 0: none.
    """

    def __init__(
        self,
        path: Path,
        corpus: PackedCorpus,
        num_texts: int,
        num_tokens: int,
        validation: Validation,
        metrics: Metrics,
    ) -> None:
        self.path = path
        self.corpus = corpus
        self.num_texts = num_texts
        self.num_tokens = num_tokens
        self.validation = validation
        self.metrics = metrics

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what was written after the step that training goes on from."""
        self.step = self.validation.step
        if not trainer.is_global_zero or not self.path.exists():
            return
        # A file knows lines as they were written; `splitlines` ends them at rarer characters, too.
        with self.path.open(encoding="utf-8") as file:
            kept = [line for line in file if json.loads(line)["step"] <= trainer.global_step]
        write_atomically(self.path, "".join(kept))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write, if there was a validation."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, if there was a validation at the very end."""
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.step == self.validation.step:
            return
        self.step = self.validation.step
        if not self.num_tokens or not math.isfinite(self.validation.loss):
            return
        assert isinstance(pl_module, TrainingModule)
        with self.metrics.paused():
            model = whole(pl_module.model)
            if model is None or not trainer.is_global_zero:
                return
            rows = self.texts(model)
        lines = [json.dumps({"step": self.step, **row}, ensure_ascii=False) for row in rows]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        shown = f"step {self.step}: {rows[0]['prompt']!r} → {rows[0]['text']!r}"
        if len(shown) > SHOWN_CHARACTERS:
            shown = f"{shown[: SHOWN_CHARACTERS - 1]}…"
        self.metrics.progress.say(shown)
        for logger in trainer.loggers:
            log_texts(logger, "samples", rows, self.step)

    def texts(self, model: LanguageModel) -> list[dict[str, str]]:
        """Prompts, and how the model goes on with each; the model is as it was afterwards."""
        tokenizer = load_tokenizer(self.corpus.tokenizer_path)
        device = model.norm.weight.device
        prompts = self.prompts()
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        tokens = torch.full((len(prompts), max(map(len, prompts))), self.corpus.end_of_text)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        was_training = model.training
        decoder = Decoder(model, tokens.shape[1] + self.num_tokens, batch_size=len(prompts))
        drawn = decoder.generate(
            tokens.to(device),
            self.num_tokens,
            lengths=lengths,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            stop_tokens=[self.corpus.end_of_text],
        )
        written = torch.stack(list(drawn), dim=1).tolist()  # [B, T]
        model.train(was_training)
        # The end of text is a special token, which is left out.
        return [
            {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(text)}
            for prompt, text in zip(prompts, written, strict=True)
        ]

    def prompts(self) -> list[list[int]]:
        """The first tokens of documents spread evenly over the validation split."""
        split = self.corpus.validation
        indices = [
            number * split.num_documents // self.num_texts for number in range(self.num_texts)
        ]
        return [
            [self.corpus.end_of_text, *split.document(index)[:PROMPT_TOKENS].tolist()]
            for index in indices
        ]


def whole(model: LanguageModel) -> LanguageModel | None:
    """The model; if its weights lie in shards, for the first process a copy that has all of them.

    Every process has to ask; the others get None.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    # Not by its weights: after a forward pass some are whole for a while.
    if not isinstance(model, FSDPModule):
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    device = model.norm.weight.device
    weights = get_model_state_dict(model, options=options)
    if not weights:
        return None
    with torch.device("meta"):
        copied = LanguageModel(model.architecture)
    copied.load_state_dict(weights, assign=True)
    return copied.to(device)
