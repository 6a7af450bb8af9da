"""How far a search's scores can be trusted, found by trainings of its own once it is over.

Two questions, both put to candidates that were drawn at random, since what climbed was chosen by
its scores and spans less than their range:

- Does a rung rank candidates as the last one does? Each is trained on to the last.
- How far does the seed alone move a score there? Some are trained again with further seeds.

Each training is a fact of the study, so an audit goes on where it was stopped. Candidates and
frontier stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from search.history import QUALITIES, Quality
from search.noise import SeedNoise, seed_noise
from search.quality import format_score, in_words
from search.rank_correlation import MIN_CANDIDATES, rank_correlation
from search.worker import JobError
from slm.config import ConfigError, schema

if TYPE_CHECKING:
    from search.config import SearchConfig
    from search.searcher import Searcher
    from search.study import Record, Study

NonNegative = Annotated[int, Field(ge=0)]
# What the keys of its facts begin with.
PREFIX = "audit-"


@schema
class AuditConfig:
    """What is trained for an audit.

    candidates: the first so many that were drawn at random are trained to the last rung; 0: none.
    repeated: of these, so many are trained again, with each of so many further `seeds`.
    qualities: what is found of each training; the search's own always is.
    """

    candidates: NonNegative = 0
    repeated: NonNegative = 0
    seeds: NonNegative = 0
    qualities: tuple[Quality, ...] = ("loss",)

    def __post_init__(self) -> None:
        problems = []
        if 0 < self.candidates < MIN_CANDIDATES and self.candidates > self.repeated:
            problems.append(
                f"candidates: a rank correlation needs >= {MIN_CANDIDATES}, got {self.candidates}"
            )
        if 0 < self.candidates < self.repeated:
            problems.append(
                f"repeated: must be <= candidates {self.candidates}, got {self.repeated}"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class AuditTraining:
    """A candidate's training to the last rung with a seed."""

    number: int
    seed: int

    @property
    def key(self) -> str:
        """Of its fact."""
        return f"{PREFIX}{self.number}-{self.seed}"


def audited(config: SearchConfig, records: Sequence[Record]) -> list[Record]:
    """The candidates that an audit is about."""
    drawn = (
        record
        for record in records
        if record.proposal.origin == "random" and record.results and record.state != "failed"
    )
    return list(islice(drawn, config.audit.candidates))


def seeds(config: SearchConfig, place: int) -> range:
    """The seeds that the candidate in a place among the audited ones is trained with."""
    further = config.audit.seeds if place < config.audit.repeated else 0
    return range(config.seed, config.seed + further + 1)


def trainings(config: SearchConfig, records: Sequence[Record]) -> list[AuditTraining]:
    """All trainings of an audit: those for the rank correlation, then those with further seeds."""
    found = [
        AuditTraining(record.proposal.number, seed)
        for place, record in enumerate(audited(config, records))
        for seed in seeds(config, place)
    ]
    return sorted(found, key=lambda training: training.seed)


def missing(config: SearchConfig, study: Study) -> list[AuditTraining]:
    """The trainings that are still to be done."""
    known = study.facts(PREFIX)
    return [training for training in trainings(config, study.records) if training.key not in known]


def run_audit(searcher: Searcher) -> None:
    """Do the trainings that are missing, one by one, and store each."""
    config, study = searcher.config, searcher.study
    todo = missing(config, study)
    if not todo:
        return
    searcher.say(f"audit: {len(todo)} trainings to {config.proxy.rung_tokens[-1]:,} tokens")
    for place, training in enumerate(todo, start=1):
        name = f"audit {place}/{len(todo)}  #{training.number} seed {training.seed}"
        # Another process may have been faster, whose result stands then.
        fact = study.fact(training.key) or study.settle(
            training.key, _train(searcher, training, name)
        )
        quality = config.evolution.quality
        searcher.say(
            f"{name}  failed: {fact['error']}"
            if "error" in fact
            else f"{name}  {in_words(quality)} {fact[quality]:.4f}"
        )


def _train(searcher: Searcher, training: AuditTraining, name: str) -> dict[str, Any]:
    """What a training gives, or why it gives nothing."""
    config, record = searcher.config, searcher.study.records[training.number]
    result, budgets, start = record.results[-1], config.proxy.rung_tokens, None
    if training.seed == config.seed:
        # On the last rung it has been trained to already.
        rung = min(len(record.results), len(budgets) - 1)
        budgets, start = budgets[rung:], result["checkpoint"]
    else:
        budgets = budgets[-1:]

    def on_report(progress: Mapping[str, Any]) -> None:
        if "warning" in progress:
            searcher.say(f"{name} {progress['warning']}")
            return
        searcher.live(f"{name} training {progress['share']:4.0%}  loss {progress['loss']:.4f}")

    try:
        fact: dict[str, Any] = searcher.run_job(
            "audit",
            result["architecture"],
            budgets,
            start,
            training.seed,
            config.audit.qualities,
            on_report=on_report,
        )
    except JobError as error:
        return {"error": str(error)}
    return fact


# What it found


def audit_summary(config: SearchConfig, study: Study) -> dict[str, Any]:
    """What `frontier.json` says of an audit.

    tokens: of the last rung, where the noise is. noise: by quality, with how many `models` and
    `seeds` it is from. rank_correlations: one for each lower rung, of the search's own scores, with
    those that it is from.
    """
    facts = study.facts(PREFIX)
    records = audited(config, study.records)
    return {
        "tokens": config.proxy.rung_tokens[-1],
        "noise": _noise(config, records, facts),
        "rank_correlations": _rank_correlations(config, records, facts),
    }


def noise_of(summary: Mapping[str, Any], quality: Quality) -> SeedNoise | None:
    """The noise that a summary tells of a quality, if it does."""
    found = summary["noise"].get(quality)
    return found and SeedNoise(
        **{name: found[name] for name in ("deviation", "low", "high", "degrees_of_freedom")}
    )


def audit_lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary for people, a line per finding."""
    lines = []
    for quality, noise in summary["noise"].items():
        lines.append(
            f"seed noise of the {in_words(quality)} {format_score(noise['deviation'], quality)} "
            f"({noise['models']} models x {noise['seeds']} seeds): "
            f"differences below {noise['least_difference']:.4f} are none"
        )
    for each in summary["rank_correlations"]:
        lines.append(
            f"rank correlation of {each['short_tokens']:,} against {each['long_tokens']:,} tokens "
            f"{each['rho']:.2f} [{each['low']:.2f}, {each['high']:.2f}], {each['n']} models drawn "
            "at random"
        )
    return lines


def _noise(
    config: SearchConfig, records: Sequence[Record], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for quality in QUALITIES:
        scores = []
        for place, record in enumerate(records):
            keys = (AuditTraining(record.proposal.number, s).key for s in seeds(config, place))
            known = (facts.get(key, {}) for key in keys)
            scores.append([fact[quality] for fact in known if quality in fact])
        scores = [group for group in scores if len(group) > 1]
        if scores:
            noise = seed_noise(scores)
            found[quality] = {
                **asdict(noise),
                "least_difference": noise.least_difference,
                "models": len(scores),
                "seeds": max(map(len, scores)),
            }
    return found


def _rank_correlations(
    config: SearchConfig, records: Sequence[Record], facts: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    budgets = config.proxy.rung_tokens
    # Of each candidate the scores after every rung.
    curves: dict[int, list[float]] = {}
    for record in records:
        number = record.proposal.number
        fact = facts.get(AuditTraining(number, config.seed).key, {})
        if "scores" in fact:
            before = record.scores[: len(budgets) - len(fact["scores"])]
            curves[number] = [*before, *fact["scores"]]
    long = [curve[-1] for curve in curves.values()]
    found = []
    for rung, tokens in enumerate(budgets[:-1]):
        short = [curve[rung] for curve in curves.values()]
        correlation = rank_correlation(short, long, config.seed)
        if correlation is not None:
            found.append(
                {
                    "short_tokens": tokens,
                    "long_tokens": budgets[-1],
                    **asdict(correlation),
                    "numbers": list(curves),
                    "short": short,
                    "long": long,
                }
            )
    return found
