"""The report of a study of depth and width: `report.html`, and the figures on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from search.cell_rows import Row
from search.depth_width_analysis import choose
from search.pages import render
from search.report_figures import ACCENT, GRID, INK, LINE, QUIET, as_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from search.depth_width_results import Findings

FIGURE_HEIGHT = 460
# Ends of a colour scale that are too pale on white.
PALEST = 0.85


def report_page(summary: Row, findings: Findings, commands: Mapping[str, str]) -> str:
    """The page that needs nothing from elsewhere.

    summary: what depth_width.json holds. commands: what trains a chosen size, by the budgets within
    which it is best.
    """
    content = {
        **summary,
        "is_trusted": findings.is_trusted,
        "commands": commands,
        "num_measured": sum(row["latency_ms"] is not None for row in findings.rows),
        "num_trained": sum(row["perplexity"] is not None for row in findings.rows),
        "figures": {
            "latency": latency_figure(findings),
            "best": best_figure(findings),
            "errors": errors_figure(findings.rows),
        },
    }
    return render("depth_width.html.j2", content, {})


def latency_figure(findings: Findings) -> str:
    """Perplexity against measured latency: a line per depth, widths along it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = [row for row in findings.rows if row["latency_ms"] is not None]
    colors = _colors(sorted({row["depth"] for row in rows}))
    for depth, color in colors.items():
        own = [row for row in rows if row["depth"] == depth]
        for trace in _depth_traces(depth, own, color, findings.is_trusted):
            figure.add_trace(trace)
    figure.add_trace(
        go.Scatter(
            x=[choice["latency_ms"] for choice in findings.choices],
            y=[choice["perplexity"] for choice in findings.choices],
            mode="markers",
            name="best within a budget",
            marker={"symbol": "star", "size": 16, "color": ACCENT},
            text=[_choice_hover(choice) for choice in findings.choices],
            hovertemplate="%{text}<extra></extra>",
        )
    )
    for budget_ms in findings.budgets_ms:
        figure.add_vline(x=budget_ms, line={"color": QUIET, "width": 1, "dash": "dot"})
        figure.add_annotation(
            # On a logarithmic axis a text stands at the logarithm, other than a line.
            x=math.log10(budget_ms),
            y=1,
            yref="paper",
            text=f"{budget_ms:g} ms",
            showarrow=False,
            xanchor="left",
            yanchor="top",
            font={"color": QUIET, "size": 11},
        )
    figure.update_xaxes(
        title="measured latency of one request, ms (bars: 95 % interval)", type="log"
    )
    figure.update_yaxes(title="perplexity of the validation text", type="log")
    return as_html(figure, height=FIGURE_HEIGHT, script=True)


def _depth_traces(
    depth: int, rows: Sequence[Row], color: str, is_trusted: bool
) -> list[go.Scatter]:
    """What was measured at a depth, narrowest first, and what the law says."""
    import plotly.graph_objects as go

    name = f"{depth} block{'s' if depth > 1 else ''}"
    trained = [row for row in rows if row["perplexity"] is not None]
    traces = [
        go.Scatter(
            x=[row["latency_ms"] for row in trained],
            y=[row["perplexity"] for row in trained],
            error_x=_bars(trained, "latency", "_ms", color),
            error_y=_bars(trained, "perplexity", "", color),
            mode="markers" if is_trusted else "lines+markers",
            name=name,
            legendgroup=name,
            showlegend=bool(trained),
            marker={"color": color, "size": 9},
            line={"color": color, "width": 1},
            text=[_hover(row, "measured", row["perplexity"]) for row in trained],
            hovertemplate="%{text}<extra></extra>",
        )
    ]
    if is_trusted:
        traces.append(
            go.Scatter(
                x=[row["latency_ms"] for row in rows],
                y=[row["predicted_perplexity"] for row in rows],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=not trained,
                marker={"color": color, "size": 7, "symbol": "circle-open"},
                line={"color": color, "width": 1, "dash": "dash"},
                text=[_hover(row, "by the law", row["predicted_perplexity"]) for row in rows],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    return traces


def best_figure(findings: Findings) -> str | None:
    """Best depth and width under every budget; None where nothing is known of them."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    latencies = [row["latency_ms"] for row in findings.rows if row["latency_ms"] is not None]
    choices = choose(findings.rows, sorted(latencies), findings.analysis)
    if not choices:
        return None
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=("depth, blocks", "width"), horizontal_spacing=0.1
    )
    budgets = [choice["budget_ms"] for choice in choices]
    if findings.is_trusted:
        for bound, fill in (("depth_high", None), ("depth_low", "tonexty")):
            figure.add_trace(
                go.Scatter(
                    x=budgets,
                    y=[choice[bound] for choice in choices],
                    mode="lines",
                    line={"width": 0, "shape": "hv"},
                    fill=fill,
                    fillcolor="rgba(46, 134, 171, 0.15)",
                    showlegend=False,
                    hoverinfo="skip",
                ),
                row=1,
                col=1,
            )
    for col, name in enumerate(("depth", "width"), start=1):
        figure.add_trace(
            go.Scatter(
                x=budgets,
                y=[choice[name] for choice in choices],
                mode="lines",
                line={"color": LINE, "width": 2, "shape": "hv"},
                showlegend=False,
                text=[_choice_hover(choice) for choice in choices],
                hovertemplate="%{text}<extra></extra>",
            ),
            row=1,
            col=col,
        )
    figure.update_xaxes(title="budget for one request, ms", type="log")
    figure.update_yaxes(rangemode="tozero")
    return as_html(figure, height=340)


def errors_figure(rows: Sequence[Row]) -> str | None:
    """How far each trained size is off the law, over depth and width; None without a law."""
    import plotly.graph_objects as go

    known = {
        (row["depth"], row["width"]): row["law_error"]
        for row in rows
        if row["law_error"] is not None
    }
    if not known:
        return None
    depths, widths = (sorted({size[axis] for size in known}) for axis in (0, 1))
    percent = [[_percent(known.get((depth, width))) for width in widths] for depth in depths]
    figure = go.Figure(
        go.Heatmap(
            x=[str(width) for width in widths],
            y=[str(depth) for depth in depths],
            z=percent,
            text=[["" if z is None else f"{z:+.2f} %" for z in line] for line in percent],
            texttemplate="%{text}",
            textfont={"color": INK},
            hovertemplate="%{y} blocks, width %{x}: %{text}<extra></extra>",
            zmid=0,
            colorscale=[[0, LINE], [0.5, "#ffffff"], [1, ACCENT]],
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(title="width", type="category", gridcolor=GRID)
    figure.update_yaxes(title="blocks", type="category")
    return as_html(figure, height=120 + 46 * len(depths))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _colors(depths: Sequence[int]) -> dict[int, str]:
    """One per depth, the deeper the darker."""
    from plotly.colors import sample_colorscale

    count = max(1, len(depths) - 1)
    places = [PALEST * (1 - place / count) for place in range(len(depths))]
    return dict(zip(depths, sample_colorscale("Viridis", places), strict=True))


def _bars(rows: Sequence[Row], name: str, unit: str, color: str) -> dict[str, Any]:
    """Error bars; of a single seed there are none."""
    above, below = [], []
    for row in rows:
        value, low, high = (row[f"{name}{part}{unit}"] for part in ("", "_low", "_high"))
        above.append(None if high is None else high - value)
        below.append(None if low is None else value - low)
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": color,
        "thickness": 1,
        "width": 2,
    }


def _hover(row: Row, origin: str, perplexity: float) -> str:
    return (
        f"<b>{row['depth']} blocks, width {row['width']}</b><br>{row['parameters']:,} parameters"
        f"<br>{row['latency_ms']:.4g} ms<br>perplexity {perplexity:.4g}, {origin}"
    )


def _choice_hover(choice: Row) -> str:
    origin = "by the law" if choice["by"] == "law" else "measured"
    return f"<b>within {choice['budget_ms']:.4g} ms</b><br>" + _hover(
        choice, origin, choice["perplexity"]
    )
