"""What follows from latencies and losses of a grid: the law, and the best size within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.cell_rows import Row
from search.depth_width_law import Array, Law, Observations, bootstrap, fit_law, interval
from search.depth_width_trust import Extrapolation, doubts, extrapolate, largest_sizes

# Where none are given: so many, evenly spread over the logarithm of latency.
NUM_BUDGETS = 6
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Analysis:
    """What is known of the law.

    tokens: the budget that predictions are for, the largest. law: None where there are too few
    points to fit one. resampled: see `bootstrap`. doubts: why it is not to be trusted.
    """

    observations: Observations
    tokens: int
    law: Law | None
    resampled: tuple[Law, ...]
    extrapolation: Extrapolation | None
    doubts: tuple[str, ...]

    @property
    def is_trusted(self) -> bool:
        """Whether nothing speaks against the law."""
        return not self.doubts

    def predictions(self, rows: Sequence[Row]) -> tuple[Array, Array]:
        """Perplexity of every size [S] by the law, and by each resampled one [R, S].

        rows: have `depth` and `width`.
        """
        assert self.law is not None, "there is no law"
        factors = self._factors(rows)
        every = np.array([law.perplexity(factors) for law in self.resampled])
        return self.law.perplexity(factors), every

    def _factors(self, rows: Sequence[Row]) -> Array:
        """[S, F]"""
        sizes = np.array([(row["depth"], row["width"], self.tokens) for row in rows], dtype=float)
        return sizes[:, : self.observations.factors.shape[1]]

    def summary(self) -> Row:
        """JSON-able; `constants` by name: value and 95 % interval."""
        found: Row = {
            "is_trusted": self.is_trusted,
            "doubts": list(self.doubts),
            "tokens": self.tokens,
            "constants": None,
            "extrapolation": None,
        }
        if self.law is not None:
            resampled = [law.constants() for law in self.resampled]
            found["constants"] = {
                name: [value, *interval(np.array([each[name] for each in resampled]))]
                for name, value in self.law.constants().items()
            }
        if self.extrapolation is not None:
            found["extrapolation"] = {
                "largest_error": self.extrapolation.largest,
                "mean_error": self.extrapolation.mean,
                "constants": self.extrapolation.law.constants(),
                "errors": list(self.extrapolation.errors),
                "sizes": list(self.extrapolation.sizes),
            }
        return found


def analyse(rows: Sequence[Row], trainings: Sequence[Row]) -> Analysis | None:
    """Fit the law to what trainings gave; None before the first.

    rows: every size, with `parameters`. trainings: `size` (its place among the rows), `depth`,
    `width`, `seed`, `tokens` and `loss` of each training and token budget.
    """
    if not trainings:
        return None
    budgets = {each["tokens"] for each in trainings}
    names = ("depth", "width", "tokens") if len(budgets) > 1 else ("depth", "width")
    observations = Observations(
        factors=np.array([[each[name] for name in names] for each in trainings], dtype=float),
        perplexity=np.exp([each["loss"] for each in trainings]),
        sizes=np.array([each["size"] for each in trainings]),
        seeds=np.array([each["seed"] for each in trainings]),
    )
    law, resampled, extrapolation = None, [], None
    if len(observations.points[0]) > observations.num_constants:
        law = fit_law(observations)
        resampled = bootstrap(observations, law, BOOTSTRAP_SEED)
        parameters = {size: rows[size]["parameters"] for size in map(int, observations.sizes)}
        extrapolation = extrapolate(observations, largest_sizes(parameters))
    return Analysis(
        observations,
        max(budgets),
        law,
        tuple(resampled),
        extrapolation,
        tuple(doubts(observations, law, extrapolation)),
    )


def default_budgets_ms(rows: Sequence[Row]) -> list[float]:
    """Budgets between the fastest and the slowest size that was trained, of two digits each."""
    latencies = [row["latency_ms"] for row in _trained(rows)]
    if not latencies:
        return []
    spread = np.geomspace(min(latencies), max(latencies), NUM_BUDGETS)
    return sorted({_rounded_up(float(each)) for each in spread})


def _trained(rows: Sequence[Row]) -> list[Row]:
    """Those that were measured and trained."""
    return [row for row in rows if None not in (row["latency_ms"], row["perplexity"])]


def _rounded_up(value: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    # Of 0.30000000000000004 nobody wants the rest.
    return float(f"{unit * math.ceil(value / unit):.6g}")


def choose(
    rows: Sequence[Row], budgets_ms: Sequence[float], analysis: Analysis | None
) -> list[Row]:
    """The best size within each budget that any meets.

    By the law, among all sizes, where it is to be trusted; else by measured perplexity, among those
    that were trained. agreement: in how many of the resampled laws the best depth is the same;
    depth_low, depth_high: between which it lies in 95 % of them. is_extrapolated: deeper, wider or
    larger than anything that was trained.
    """
    if analysis is not None and analysis.is_trusted:
        return _by_law(rows, budgets_ms, analysis)
    trained = _trained(rows)
    found = []
    for budget_ms in budgets_ms:
        fitting = [row for row in trained if row["latency_ms"] <= budget_ms]
        if fitting:
            best = min(fitting, key=lambda row: row["perplexity"])
            values = [best[f"perplexity{part}"] for part in ("", "_low", "_high")]
            found.append(_choice(budget_ms, best, "trainings", values))
    return found


def _by_law(rows: Sequence[Row], budgets_ms: Sequence[float], analysis: Analysis) -> list[Row]:
    measured = [row for row in rows if row["latency_ms"] is not None]
    trained = _trained(measured)
    most = {name: max(row[name] for row in trained) for name in ("depth", "width", "parameters")}
    predicted, resampled = analysis.predictions(measured)
    depths = np.array([row["depth"] for row in measured])
    found = []
    for budget_ms in budgets_ms:
        fits = np.array([row["latency_ms"] <= budget_ms for row in measured])
        if not fits.any():
            continue
        place = int(np.argmin(np.where(fits, predicted, np.inf)))
        best = measured[place]
        best_depths = depths[np.argmin(np.where(fits, resampled, np.inf), axis=1)]
        depth_low, depth_high = np.quantile(best_depths, [0.025, 0.975], method="inverted_cdf")
        values = [float(predicted[place]), *interval(resampled[:, place])]
        found.append(
            _choice(budget_ms, best, "law", values)
            | {
                "agreement": float((best_depths == best["depth"]).mean()),
                "depth_low": int(depth_low),
                "depth_high": int(depth_high),
                "is_extrapolated": any(best[name] > most[name] for name in most),
            }
        )
    return found


def _choice(budget_ms: float, row: Row, by: str, perplexity: Sequence[float | None]) -> Row:
    copied = ("depth", "width", "parameters", "digest", "latency_ms", "has_converged")
    value, low, high = perplexity
    return {
        "budget_ms": budget_ms,
        "by": by,
        **{name: row[name] for name in copied},
        "is_trained": row["perplexity"] is not None,
        "perplexity": value,
        "perplexity_low": low,
        "perplexity_high": high,
        **dict.fromkeys(("agreement", "depth_low", "depth_high")),
        "is_extrapolated": False,
    }


def depth_findings(choices: Sequence[Row]) -> str:
    """Whether the best depth moves with the budget, in a sentence."""
    if len(choices) < 2:
        return "There are too few budgets to say whether the best depth moves with them."
    first, last = choices[0], choices[-1]
    move = {True: "grows", False: "falls"}[last["depth"] > first["depth"]]
    if last["depth"] == first["depth"]:
        move = "stays"
    text = (
        f"The best depth {move}: {first['depth']} blocks (width {first['width']}) within "
        f"{first['budget_ms']:g} ms, {last['depth']} (width {last['width']}) within "
        f"{last['budget_ms']:g} ms"
    )
    if first["by"] == "law":
        lows = f"{first['depth_low']} to {first['depth_high']}"
        highs = f"{last['depth_low']} to {last['depth_high']}"
        return f"{text}; 95 % intervals {lows} and {highs}."
    return f"{text}, of what was trained."
