"""Hydra configs of the group `model`, for architectures that were found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slm.architecture import Architecture
from slm.training.files import write_atomically


def training_command(run_folder: Path, digest: str, plugins: Sequence[str]) -> str:
    """What a person types to train a member of the frontier."""
    command = f"python train.py --config-dir {run_folder}/frontier model={digest}"
    return f"{command} 'plugins=[{','.join(plugins)}]'" if plugins else command


def model_yaml(
    architecture: Architecture,
    pattern: str,
    depth: int,
    blocks: Mapping[str, Sequence[str]],
    comments: Sequence[str],
) -> str:
    """The config of an architecture.

    blocks: texts of each block's operators, by its letter. comments: lines to begin with.
    """
    lines = [
        *(f"# {comment}" for comment in comments),
        f"width: {architecture.width}",
        f"depth: {depth}",
        f"pattern: {pattern}",
        "blocks:",
    ]
    for letter, operators in blocks.items():
        lines += [f"  {letter}:", "    operators:"]
        lines += [f"      - {operator}" for operator in operators]
    lines += [
        f"meta_tokens: {architecture.meta_tokens}",
        f"tie_embeddings: {str(architecture.tie_embeddings).lower()}",
        f"normalize_logits: {str(architecture.normalize_logits).lower()}",
        f"vocab_size: {architecture.vocab_size}",
    ]
    return "\n".join(lines) + "\n"


def write_models(run_folder: Path, texts: Mapping[str, str]) -> None:
    """Write the configs, by digest, into `frontier/model`, and remove those of others."""
    folder = run_folder / "frontier" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for digest, text in texts.items():
        write_atomically(folder / f"{digest}.yaml", text)
    for path in folder.glob("*.yaml"):
        if path.stem not in texts:
            path.unlink()
