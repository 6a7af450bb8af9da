"""The model card: what an exported model is, how it was trained and how to load it."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

from slm.architecture import Architecture

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: {license}
tags:
- slm-frontier
- hybrid
---

# {name}

A language model of {parameters:,} parameters, designed and trained with slm-frontier.

## Architecture

| | |
|---|---|
{architecture}

```
{text}
```

{training}## Use

Needs torch and transformers; the code of the model lies beside the weights.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{path}"
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
prompt = tokenizer({prompt!r}, return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=64, do_sample=True)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

The tokenizer puts the end-of-text token before every text, as in training. The model predicts
text; it does not follow instructions, and may repeat what is wrong or harmful in its data.

## Licence

{license}
"""
TRAINING_FIGURES = {
    "tokens": ("Tokens seen", "{:,}"),
    "validation_loss": ("Validation loss, nats per token", "{:.4f}"),
    "bits_per_byte": ("Validation bits per byte", "{:.4f}"),
    "seconds": ("Training time, s", "{:,.0f}"),
}


def model_card(
    architecture: Architecture,
    result: dict[str, Any],
    name: str,
    path: str,
    prompt: str,
    license: str,
) -> str:
    """The card, in Markdown.

    result: figures of the training run, of which those known here are shown; may be empty.
    path: where to load the model from.
    """
    return CARD.format(
        name=name,
        path=path,
        prompt=prompt,
        license=license,
        parameters=architecture.parameters(),
        architecture=_rows(_architecture_facts(architecture)),
        text="\n".join(textwrap.wrap(str(architecture), 100, break_long_words=False)),
        training=_training(result),
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
    }


def _training(result: dict[str, Any]) -> str:
    facts = {
        label: form.format(result[key])
        for key, (label, form) in TRAINING_FIGURES.items()
        if isinstance(result.get(key), int | float)
    }
    return f"## Training\n\n| | |\n|---|---|\n{_rows(facts)}\n\n" if facts else ""


def _rows(facts: dict[str, str]) -> str:
    return "\n".join(f"| {label} | {value} |" for label, value in facts.items())
