"""One HTML file to look at: what was searched, what was found, which one was chosen and why.

    python -m search.report runs/demo

Reads what a search, and the training and export of its winner, have left in the run folder;
whatever is not there yet is left out. The page needs nothing from elsewhere.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from search.factors import Effect, mutation_effects, operator_effects, shape_effects
from search.history import Quality
from search.pages import render
from search.quality import AXES, format_score, in_words
from search.report_figures import (
    FFN_COLOR,
    MIXER_COLORS,
    effects_figure,
    frontier_figure,
    hypervolume_figure,
    progress_figure,
    rank_correlation_figure,
    rungs_figure,
    training_figure,
)
from search.results import is_scored
from slm.training.files import write_atomically

Record = dict[str, Any]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the folder of a search, and return its path.

    Raises ValueError naming the file if the folder holds no search.
    """
    content = report_content(run_folder)
    colors = operator_colors(content["candidates"])
    filters: dict[str, Callable[..., Any]] = {
        "operator_color": lambda text: colors[operator_name(text)],
        "operator_name": operator_name,
        "in_words": in_words,
        "format_score": format_score,
        "continuation": lambda sample, prompt: sample.removeprefix(prompt),
    }
    page = render("report.html.j2", content, filters)
    path = run_folder / "report.html"
    write_atomically(path, page)
    return path


def operator_colors(candidates: list[Record]) -> dict[str, str]:
    """One colour per operator of a search, by its name, the same everywhere on the page."""
    texts = (text for record in candidates for text in record["operators"])
    mixers = [name for name in dict.fromkeys(map(operator_name, texts)) if name != "ffn"]
    return {"ffn": FFN_COLOR, **dict(zip(mixers, cycle(MIXER_COLORS), strict=False))}


def report_content(run_folder: Path) -> dict[str, Any]:
    """Everything the page shows, by the names its template uses."""
    search = _read_json(run_folder / "search.json")
    if search is None:
        raise ValueError(f"{run_folder / 'search.json'}: not found; is this a search's folder?")
    candidates = _read_json(run_folder / "candidates.json") or []
    frontier = _read_json(run_folder / "frontier.json") or {}
    scored = list(filter(is_scored, candidates))
    members = frontier.get("members", [])
    chosen = next((r for r in scored if r["digest"] == frontier.get("chosen")), None)
    quality: Quality = search["quality"]
    axis = AXES[quality]
    audit = frontier.get("audit") or {"noise": {}, "rank_correlations": []}
    curve = _read_metrics(run_folder / "train" / "metrics.csv")
    operators, shapes = operator_effects(candidates), shape_effects(candidates)
    mutations = mutation_effects(candidates)
    return {
        "search": search,
        "candidates": candidates,
        "scored": scored,
        "members": members,
        "chosen": chosen,
        "reasons": reasons(chosen, scored, members, search) if chosen else [],
        "lineage": lineage(chosen, candidates) if chosen else [],
        "audit": audit,
        "findings": findings([*operators, *shapes], quality),
        "trained": _read_json(run_folder / "train" / "result.json"),
        "export": _read_json(run_folder / "export.json"),
        "figures": {
            "frontier": frontier_figure(search, scored, members, chosen),
            "rungs": rungs_figure(scored, chosen, axis),
            "progress": progress_figure(scored, axis),
            "operators": effects_figure(
                operators, axis, "one standard deviation more of an operator"
            ),
            "shapes": effects_figure(shapes, axis, "one standard deviation more"),
            "mutations": effects_figure(mutations, axis, "a child less its parent"),
            "hypervolume": hypervolume_figure(frontier.get("hypervolume_history", [])),
            "training": training_figure(curve),
            "rank_correlations": [
                rank_correlation_figure(each, axis) for each in audit["rank_correlations"]
            ],
        },
    }


def reasons(
    chosen: Record, scored: list[Record], members: list[Record], search: Record
) -> list[str]:
    """Why this candidate was chosen, one sentence each, in figures."""
    within = [r for r in scored if r["meets_target"]]
    quality = search["quality"]
    found = [
        f"Lowest {in_words(quality)} ({format_score(chosen['score'], quality)}) of the "
        f"{len(within)} candidates measured within the target of {search['target_ms']:.2f} ms "
        f"({len(scored)} were scored)."
    ]
    faster = [r for r in members if r["latency_ms"] < chosen["latency_ms"]]
    if faster:
        next_faster = max(faster, key=lambda r: r["latency_ms"])
        found.append(
            f"The next faster one on the frontier (#{next_faster['number']}) takes "
            f"{next_faster['latency_ms']:.2f} ms instead of {chosen['latency_ms']:.2f} ms and "
            f"loses {format_score(next_faster['score'] - chosen['score'], quality)}."
        )
    equals = [f"#{r['number']}" for r in members if r["is_different"] is False]
    if equals:
        found.append(
            f"Between it and {', '.join(equals)} there is no difference: their {in_words(quality)} "
            "lies within what another seed can change."
        )
    plain = next((r for r in scored if r["digest"] == search["reference"]["digest"]), None)
    if plain is not None and plain is not chosen:
        # One of them may have climbed further.
        theirs, own = list(zip(plain["rungs"], chosen["rungs"], strict=False))[-1]
        found.append(
            f"The plain transformer (#{plain['number']}) reached "
            f"{format_score(theirs['score'], quality)} in {plain['latency_ms']:.2f} ms, this one "
            f"{format_score(own['score'], quality)}, both after {own['tokens']:,} training tokens."
        )
    return found


def findings(effects: list[Effect], quality: Quality) -> str:
    """Which factors were told from zero, in a sentence."""
    told = [effect for effect in effects if effect.is_told_from_zero]
    parts = [
        f"{verb} with more of: {', '.join(effect.name for effect in group)}"
        for verb, group in (
            ("lower", [effect for effect in told if effect.difference < 0]),
            ("higher", [effect for effect in told if effect.difference > 0]),
        )
        if group
    ]
    if not parts:
        return "No factor can be told from chance."
    return (
        f"At equal latency the {in_words(quality)} was {'; '.join(parts)}. "
        "No other can be told from chance."
    )


def lineage(chosen: Record, candidates: list[Record]) -> list[Record]:
    """The chosen one and its ancestors, the first of them first."""
    line = [chosen]
    while line[0]["parent"] is not None:
        line.insert(0, candidates[line[0]["parent"]])
    return line


def operator_name(text: str) -> str:
    """'attention' of 'attention(head_dim=32)'."""
    return text.partition("(")[0]


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a training run's metrics, empty fields left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def main() -> None:
    """Write the report of the run folder named on the command line."""
    if len(sys.argv) != 2:
        print("usage: python -m search.report RUN_FOLDER", file=sys.stderr)
        sys.exit(2)
    try:
        path = write_report(Path(sys.argv[1]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run_folder = path.parent
    for name, place in (
        ("report", path),
        ("frontier", run_folder / "frontier"),
        ("model", run_folder / "train"),
        ("export", run_folder / "export"),
    ):
        if place.exists():
            print(f"{name:<9} {place}")


if __name__ == "__main__":
    main()
