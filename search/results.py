"""What a search has found, as plain values: candidates, frontier, model configs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.frontier import hypervolume_history, non_dominated
from search.genotype import Genotype
from search.history import QUALITIES, Quality
from search.model_yaml import model_yaml, training_command
from search.noise import SeedNoise, is_difference
from search.space import SearchSpace
from search.study import Record
from slm.architecture import Architecture

Row = dict[str, Any]
ERRORS = tuple(quality for quality in QUALITIES if quality != "loss")
# An error is followed by its 95 % interval, and by the number of questions.
ERROR_SUFFIXES = ("", "_low", "_high", "_items")
# The hypervolume's worst point: the score of a model that knows nothing, and this many targets.
WORST_LATENCY_TARGETS = 1.1


def candidate_row(record: Record, space: SearchSpace, target_ms: float, context: int) -> Row:
    """A candidate as a flat row of `candidates.json`; `mark` fills in what others decide.

    context: tokens of the workload, meta tokens not counted; what FLOPs and state are given for.
    """
    proposal, result = record.proposal, record.result
    row: Row = {
        "number": proposal.number,
        "state": record.state,
        "origin": proposal.origin,
        "seed_name": proposal.seed_name,
        "parent": proposal.parent,
        "factor": proposal.factor,
        "genotype": proposal.genotype.to_json(),
        "operators": list(proposal.genotype.operators),
        "short": space.short_form(proposal.genotype),
        **dict.fromkeys(("width", "architecture", "digest", "parameters", "flops_per_token")),
        "depth": len(proposal.genotype.pattern),
        **dict.fromkeys(("state_bytes", "memory_bytes", "predicted_ms", "latency_ms")),
        **dict.fromkeys(("latency_low_ms", "latency_high_ms", "latency_is_quiet")),
        **dict.fromkeys(("ttft_ms", "tpot_ms", "tokens_per_s")),
        # The same under the workload of each limit, by its name.
        "limits": {},
        "meets_target": False,
        # Of what no width makes feasible: latency or size.
        "misses": None,
        "rung": record.rung,
        "score": record.scores[-1] if record.scores else None,
        **dict.fromkeys(("loss", "bits_per_byte", "train_loss", "tokens", "seconds")),
        **dict.fromkeys(("tokens_per_second", "checkpoint")),
        # One entry per rung.
        "rungs": [
            {**{name: each[name] for name in ("tokens", "loss", "finished_at")}, "score": score}
            for each, score in zip(record.results, record.scores, strict=True)
        ],
        "loss_curve": [],
        "on_frontier": False,
        "best_so_far": False,
        **dict.fromkeys(f"{error}{suffix}" for error in ERRORS for suffix in ERROR_SUFFIXES),
        "attempts": record.attempts,
        "error": record.error,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
    }
    row |= result
    if row["architecture"] is not None:
        row |= _architecture_fields(row["architecture"], context)
    if row["latency_ms"] is not None:
        # A limit may have been missed.
        row["meets_target"] = row["latency_ms"] <= target_ms and record.state != "infeasible"
    return row


def mark(rows: Sequence[Row], errors: Mapping[str, Mapping[str, float]]) -> None:
    """Say which rows are on the frontier and which were the best in their time.

    errors: in the cloze, by digest, as far as members of the frontier were asked.
    """
    scored = [row for row in rows if is_scored(row)]
    best = math.inf
    on_frontier = non_dominated([(row["score"], row["latency_ms"]) for row in scored])
    for row, is_member in zip(scored, on_frontier, strict=True):
        row["on_frontier"] = is_member
        row["best_so_far"] = row["meets_target"] and row["score"] < best
        best = row["score"] if row["best_so_far"] else best
        row |= errors.get(row["digest"], {})


def is_scored(row: Row) -> bool:
    """Whether a candidate has a score and did not fail later."""
    return row["score"] is not None and row["state"] != "failed"


def _architecture_fields(text: str, context_tokens: int) -> Row:
    architecture = Architecture.parse(text)
    context = architecture.meta_tokens + context_tokens
    return {
        "width": architecture.width,
        "architecture": text,
        "digest": architecture.digest,
        "parameters": architecture.parameters(),
        "flops_per_token": architecture.flops_per_token(context),
        "state_bytes": architecture.state_bytes(context),
    }


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The frontier's rows, fastest first."""
    return sorted(
        (row for row in rows if row["on_frontier"]),
        key=lambda row: (row["latency_ms"], row["score"], row["number"]),
    )


def chosen(rows: Sequence[Row]) -> Row | None:
    """The best score among what meets the target."""
    fitting = [row for row in rows if is_scored(row) and row["meets_target"]]
    return min(fitting, key=lambda row: (row["score"], row["latency_ms"]), default=None)


def worst_point(target_ms: float, vocab_size: int, quality: Quality) -> tuple[float, float]:
    """What hypervolume is measured from: a model that knows nothing, a little over the target."""
    from slm.data.choices import NUM_CHOICES

    chance = 1 - 1 / NUM_CHOICES
    # Of a task it is not known what guessing comes to.
    worst_scores = {"loss": math.log(vocab_size), "task_error": 1.0}
    return worst_scores.get(quality, chance), target_ms * WORST_LATENCY_TARGETS


def frontier_summary(
    rows: Sequence[Row],
    target_ms: float,
    vocab_size: int,
    quality: Quality,
    noise: SeedNoise | None,
) -> Row:
    """What `frontier.json` says of the search as a whole.

    noise: of the scores, if it is known; a member is called different from the chosen one only if
    their scores differ by more. None: not known, or the chosen one itself.

    hypervolume_history: [number, tokens trained on until then, hypervolume] for each score, in the
    order in which they were found.
    """
    worst = worst_point(target_ms, vocab_size, quality)
    events = sorted(
        (each["finished_at"], row["number"], rung)
        for row in rows
        for rung, each in enumerate(row["rungs"])
    )
    points, tokens, history = [], 0, []
    for _, number, rung in events:
        rungs = rows[number]["rungs"]
        points.append((rungs[rung]["score"], rows[number]["latency_ms"]))
        tokens += rungs[rung]["tokens"] - (rungs[rung - 1]["tokens"] if rung else 0)
        history.append([number, tokens])
    volumes = hypervolume_history(points, worst)
    best = chosen(rows)
    states = [row["state"] for row in rows]
    misses = [row["misses"] for row in rows]
    return {
        "quality": quality,
        "chosen": best["digest"] if best else None,
        "hypervolume": volumes[-1] if volumes else 0.0,
        "hypervolume_point": list(worst),
        "hypervolume_history": [
            [*event, volume] for event, volume in zip(history, volumes, strict=True)
        ],
        "members": [
            {
                **row,
                "is_different": _is_different(row, best, noise),
                "model": f"model/{row['digest']}.yaml",
            }
            for row in frontier(rows)
        ],
        "num_scored": sum(map(is_scored, rows)),
        "num_failed": states.count("failed"),
        "num_infeasible": states.count("infeasible"),
        "num_too_slow": misses.count("latency"),
        "num_too_large": misses.count("size"),
        "tokens": tokens,
    }


def _is_different(row: Row, chosen: Row | None, noise: SeedNoise | None) -> bool | None:
    if chosen is None or row is chosen or noise is None:
        return None
    return is_difference(row["score"], chosen["score"], noise)


def table_summary(rows: Sequence[Row]) -> Row | None:
    """How far the latency table was from the whole models that were measured."""
    from latency.table_error import table_error

    measured = [row for row in rows if row["latency_ms"] is not None]
    if not measured:
        return None
    error = table_error(
        [row["architecture"] for row in measured],
        [row["predicted_ms"] for row in measured],
        [row["latency_ms"] for row in measured],
        [row["latency_raw_ms"] for row in measured],
    )
    return {
        "num_models": len(measured),
        "mape_percent": error.mape_percent,
        "max_error_percent": error.max_error_percent,
        "spearman": error.spearman,
    }


def candidate_yaml(row: Row, run_folder: Path, plugins: Sequence[str]) -> str:
    """A Hydra config of the group `model` for a candidate."""
    genotype = Genotype.from_json(row["genotype"])
    letters = zip("ABCDEFGH", genotype.blocks, strict=False)
    return model_yaml(
        Architecture.parse(row["architecture"]),
        genotype.letters(),
        len(genotype.pattern),
        {letter: block.operators(genotype.ffn) for letter, block in letters},
        [
            training_command(run_folder, row["digest"], plugins),
            f"Candidate {row['number']}: loss {row['loss']:.4f} after {row['tokens']:,} tokens, "
            f"{row['latency_ms']:.4g} ms.",
        ],
    )
