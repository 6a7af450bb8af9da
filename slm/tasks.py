"""Tasks of lm-evaluation-harness made from held-out text, which need no network.

A task is a YAML file, which lm-eval finds by `include_path`, and a JSONL file with a row for each
question: the text before it, four choices, the number of the right one, and the document that it is
from. `cloze` and `continuation` ask what `slm.data.cloze` and `slm.data.continuation` ask.

Of a continuation lm-eval also scores the spaces between it and the context, the same ones in all
four choices: log-likelihoods differ from those of `slm.evaluation` by what these cost, the answers
do not. A question whose text comes out as other tokens than it was cut from is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from slm.config import ConfigError
from slm.data.cloze import build_cloze
from slm.data.continuation import build_continuations
from slm.data.packing import PackedCorpus
from slm.data.tokenizer import load_tokenizer
from slm.training.files import write_atomically

# Part of the digest: raised when the same text gives other questions than before.
FORMAT_VERSION = 1

Row = dict[str, Any]


def write_tasks(
    corpus: PackedCorpus, names: Iterable[str], cache_dir: Path, num_items: int, seed: int
) -> Path:
    """The folder with the tasks of these names, at most `num_items` questions each.

    Questions that are there already are not made again. Raises ConfigError if the corpus's
    held-out text has none.
    """
    identity = json.dumps([FORMAT_VERSION, corpus.digest, num_items, seed])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = cache_dir.resolve() / f"tasks-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        questions = folder / f"{name}.jsonl"
        if not questions.is_file():
            rows = list(TASKS[name](corpus, num_items, seed))
            if not rows:
                raise ConfigError([f"tasks: '{name}': the held-out text has no question to ask"])
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(questions, "".join(lines))
        # It names the other file by its place, which may have changed.
        write_atomically(folder / f"{name}.yaml", _description(name, questions))
    return folder


def _description(name: str, questions: Path) -> str:
    """What lm-eval reads of a task."""
    return yaml.safe_dump(
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(questions)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": FORMAT_VERSION},
        },
        sort_keys=False,
    )


def _cloze(corpus: PackedCorpus, num_items: int, seed: int) -> Iterator[Row]:
    for item in build_cloze(corpus, num_items, seed):
        yield _row("", item.sentences, item.answer, item.document)


def _continuation(corpus: PackedCorpus, num_items: int, seed: int) -> Iterator[Row]:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    for item in build_continuations(corpus, num_items, seed):
        # Where a context ends in spaces, lm-eval wants them at the beginning of the choices.
        context = tokenizer.decode(item.context).rstrip()
        passages = [[*item.context, *each] for each in item.continuations]
        texts = tokenizer.decode_batch(passages)
        if [each.ids for each in tokenizer.encode_batch_fast(texts)] == passages:
            choices = [text.removeprefix(context) for text in texts]
            yield _row(context, choices, item.answer, item.document)


def _row(context: str, choices: Sequence[str], answer: int, document: int) -> Row:
    return {"context": context, "choices": choices, "answer": answer, "document": document}


TASKS: dict[str, Callable[[PackedCorpus, int, int], Iterator[Row]]] = {
    "cloze": _cloze,
    "continuation": _continuation,
}
