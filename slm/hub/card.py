"""The model card: what an exported model is, how it was trained and how to load it."""

from __future__ import annotations

import csv
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from slm.architecture import Architecture
from slm.evaluation_results import EVALUATION_FILE, known_results

CARD_FILE = "README.md"
RESULT_FILE, METRICS_FILE = "result.json", "metrics.csv"
LATENCY_FILE = "latency.json"
FACT_FILES = (RESULT_FILE, METRICS_FILE, LATENCY_FILE, EVALUATION_FILE)
TAG = "slm-frontier"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: {license}
tags:
- {tag}
- hybrid
---

# {name}

A language model of {parameters:,} parameters, {origin} slm-frontier.

## Architecture

| | |
|---|---|
{facts}

```
{drawing}
```

As text, from which slm-frontier builds it:

```
{text}
```

{sections}## Use

{use}
The tokenizer puts the end-of-text token before every text, as in training. The model predicts
text; it does not follow instructions, and may repeat what is wrong or harmful in its data.

## Licence

{license}
"""
PYTHON = """\
{needs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{path}"
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = AutoModelForCausalLM.from_pretrained(path{trust})
prompt = tokenizer({prompt!r}, return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=64, do_sample=True)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```
"""
NEMOTRON_FLASH = """\
Config and weights are in the layout of NVIDIA's Nemotron-Flash: the code in NVIDIA's repositories
loads them, and so does slm-frontier, `python -m slm.generate checkpoint={path}`.
"""
TRAINING_FIGURES = {
    "tokens": ("Tokens seen", "{:,}"),
    "validation_loss": ("Validation loss, nats per token", "{:.4f}"),
    "bits_per_byte": ("Validation bits per byte", "{:.4f}"),
    "seconds": ("Training time, s", "{:,.0f}"),
}
# What of a run's config the card shows: what it was trained on, and how.
TRAINING_CONFIG = ("data.", "tokenizer.", "optimizer.", "trainer.batch_tokens", "trainer.precision")
# Rows of the table of the training's course, at most.
CURVE_ROWS = 10


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says about its model.

    result: `result.json`. curve: steps and validation losses. latency: what `python -m latency`
    measured. evaluation: what `python -m slm.evaluate` found, by task.
    """

    result: dict[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    latency: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, architecture: Architecture, weights: Sequence[Path]) -> Self:
        """What lies in a folder about the model of these weights, and not about another one."""
        latency = read_json(folder / LATENCY_FILE)
        if latency.get("architecture") != str(architecture):
            latency = {}
        return cls(
            result=read_json(folder / RESULT_FILE),
            curve=_read_curve(folder / METRICS_FILE),
            latency=latency,
            evaluation=known_results(folder / EVALUATION_FILE, weights),
        )


def model_card(
    architecture: Architecture,
    facts: RunFacts,
    *,
    name: str,
    path: str,
    prompt: str,
    license: str,
    format: str,
    origin: str = "designed and trained with",
) -> str:
    """The card, in Markdown.

    path: where to load the model from. format: as in `slm.hub.formats.FormatConfig`.
    origin: what this project has to do with the model.
    """
    sections = (
        _section("Latency", _latency, facts.latency),
        _section("Training", _training, facts),
        _section("Evaluation", _evaluation, facts.evaluation),
    )
    return CARD.format(
        tag=TAG,
        name=name,
        origin=origin,
        license=license,
        parameters=architecture.parameters(),
        facts=_rows(_architecture_facts(architecture)),
        drawing=draw(architecture),
        text="\n".join(textwrap.wrap(str(architecture), 100, break_long_words=False)),
        sections="".join(sections),
        use=_use(path, prompt, format),
    )


def draw(architecture: Architecture) -> str:
    """The layers as lines of text, first to last; what repeats itself is drawn once."""
    kind = "tied to the head" if architecture.tie_embeddings else "not tied"
    lines = [f"tokens → embedding {architecture.vocab_size:,} × {architecture.width}, {kind}"]
    if architecture.meta_tokens:
        lines.append(f"after {architecture.meta_tokens} learned meta tokens")
    for block, count in _repetitions([str(operator) for operator in architecture.operators]):
        bar = "│" if count == 1 else "┃"
        lines += [f"{bar}  + {operator}" for operator in block]
        if count > 1:
            lines[-1] += f"   ×{count}, from {block[0]} on" if len(block) > 1 else f"   ×{count}"
    norm = ", each over the norm of its row" if architecture.normalize_logits else ""
    lines.append(f"norm → head → {architecture.vocab_size:,} logits{norm}")
    return "\n".join(lines)


def _repetitions(names: list[str]) -> Iterator[tuple[list[str], int]]:
    """`names`, cut into blocks that follow each other so many times; the longest runs first."""
    begin = 0
    while begin < len(names):
        runs = [
            (size * count, -size)
            for size in range(1, (len(names) - begin) // 2 + 1)
            if (count := _count(names, begin, size)) > 1
        ]
        length, size = max(runs, default=(1, -1))
        yield names[begin : begin - size], length // -size
        begin += length


def _count(names: list[str], begin: int, size: int) -> int:
    """How often the `size` names from `begin` on follow each other."""
    block, count = names[begin : begin + size], 1
    while names[begin + count * size : begin + (count + 1) * size] == block:
        count += 1
    return count


def _use(path: str, prompt: str, format: str) -> str:
    if format == "nemotron_flash":
        return NEMOTRON_FLASH.format(path=path)
    is_own = format == "slm"
    return PYTHON.format(
        needs="Needs torch and transformers; the code of the model lies beside the weights."
        if is_own
        else "A class of transformers itself: servers that know it need no further code.",
        path=path,
        trust=", trust_remote_code=True" if is_own else "",
        prompt=prompt,
    )


def _architecture_facts(architecture: Architecture) -> dict[str, str]:
    counts = Counter(operator.name for operator in architecture.operators)
    return {
        "Parameters": f"{architecture.parameters():,}",
        "Width": str(architecture.width),
        "Vocabulary": f"{architecture.vocab_size:,}",
        "Operators": ", ".join(f"{count} × {name}" for name, count in counts.items()),
        "Meta tokens": str(architecture.meta_tokens),
        "Embedding": "tied to the head" if architecture.tie_embeddings else "not tied to the head",
        "FLOPs per token, context 1,024": f"{architecture.flops_per_token(1024):,.0f}",
        "Bytes of state after 1,024 tokens, fp32": f"{architecture.state_bytes(1024):,}",
    }


def _latency(record: dict[str, Any]) -> str:
    """What `python -m latency` measured, with its device, workload and intervals."""
    if not record:
        return ""
    device, workload = record["device"], record["workload"]
    facts = {
        "Device": f"{device['model']}, {device['limit']}",
        "Workload": "batch {batch_size}, {prompt_tokens:,} prompt tokens, {new_tokens:,} new ones, "
        "{dtype}".format(**workload),
        "Compiled as": record["compile_unit"],
    }
    labels = {"request_ms": "Request", "ttft_ms": "First token", "tpot_ms": "Each further token"}
    for key, label in labels.items():
        times = record[key]
        remark = "" if times["converged"] else ", not converged"
        facts[label] = (
            f"{times['median_ms']:.3f} ms "
            f"[{times['low_ms']:.3f}, {times['high_ms']:.3f}]{remark}, n = {times['n']}"
        )
    note = "Medians with their 95 % intervals, by slm-frontier's decoder."
    return f"{_table(facts)}\n\n{note}"


def _training(facts: RunFacts) -> str:
    figures = {
        label: form.format(facts.result[key])
        for key, (label, form) in TRAINING_FIGURES.items()
        if isinstance(facts.result.get(key), int | float)
    }
    config = facts.result.get("config", {})
    shown = {
        f"`{key}`": f"`{value}`"
        for key, value in config.items()
        if key.startswith(TRAINING_CONFIG) and value not in (None, [], {}, "")
    }
    parts = [_table(figures)] if figures else []
    if len(facts.curve) > 1:
        curve = {f"{step:,}": f"{loss:.4f}" for step, loss in _thinned(facts.curve)}
        parts.append(_table(curve, "Step", "Validation loss"))
    if shown:
        parts.append(f"Data and recipe:\n\n{_table(shown)}")
    return "\n\n".join(parts)


def _thinned(curve: tuple[tuple[int, float], ...]) -> Iterable[tuple[int, float]]:
    """Points spread evenly, the first and the last among them."""
    last = len(curve) - 1
    rows = min(CURVE_ROWS, len(curve))
    return [curve[round(row * last / (rows - 1))] for row in range(rows)]


def _evaluation(tasks: dict[str, Any]) -> str:
    """A row per task, as `python -m slm.evaluate` has written them."""
    rows = [
        f"| {name} | {task['metric']} | {task['value']:.4f} | {_interval(task)} | {task['n']:,} |"
        for name, task in tasks.items()
    ]
    head = "| Task | Metric | Value | 95 % interval | Items |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows) if rows else ""


def _interval(task: dict[str, Any]) -> str:
    if task["low"] is None:
        return ""
    return f"{task['low']:.4f} – {task['high']:.4f}"


def _section(title: str, write: Callable[[Any], str], facts: Any) -> str:
    """A section; nothing where there are no facts, or where others have written them."""
    try:
        body = write(facts)
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""
    return f"## {title}\n\n{body}\n\n" if body else ""


def _table(facts: dict[str, str], *heads: str) -> str:
    head = " | ".join(heads) or " | "
    return f"| {head} |\n|---|---|\n{_rows(facts)}"


def _rows(facts: dict[str, str]) -> str:
    return "\n".join(f"| {label} | {value} |" for label, value in facts.items())


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_curve(file: Path) -> tuple[tuple[int, float], ...]:
    """Steps and validation losses of a run; empty if there are none."""
    if not file.is_file():
        return ()
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("validation_loss")]
    try:
        return tuple((int(row["step"]), float(row["validation_loss"])) for row in rows)
    except (KeyError, TypeError, ValueError):
        return ()
