"""The operator figure: loss against latency at equal parameters, and loss at equal latency."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from search.report_figures import GRID, INK, MIXER_COLORS

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = dict[str, Any]

# One per partner, in the order of the study.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "hexagon")
ALONE = "alone"
PIXELS_PER_ROW = 22


def figure_page(description: Row, rows: Sequence[Row]) -> str:
    """Both panels on one page that needs nothing from elsewhere."""
    from plotly.subplots import make_subplots

    done = [row for row in rows if row["loss"] is not None]
    by_parameters = [row for row in done if row["matching"] == "parameters"]
    by_latency = [row for row in done if row["matching"] == "latency"]
    by_latency.sort(key=lambda row: row["loss"], reverse=True)
    target_ms = description["target_ms"]
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.55, 0.45],
        horizontal_spacing=0.2,
        subplot_titles=(
            f"at about {description['target_parameters']:,} parameters",
            f"at about {target_ms:.4g} ms" if target_ms is not None else "at equal latency",
        ),
    )
    styles = _styles(rows)
    for row in by_parameters:
        if row["latency_ms"] is not None:
            figure.add_trace(_point(row, styles, row["latency_ms"], row["loss"]), row=1, col=1)
    for row in by_latency:
        figure.add_trace(_point(row, styles, row["loss"], row["name"]), row=1, col=2)
    for trace in _legend(styles):
        figure.add_trace(trace, row=1, col=1)
    figure.update_xaxes(title="measured latency of one request, ms", row=1, col=1)
    figure.update_yaxes(title="validation loss after the proxy, nats per token", row=1, col=1)
    figure.update_xaxes(title="validation loss after the proxy, nats per token", row=1, col=2)
    figure.update_yaxes(
        type="category", categoryarray=[row["name"] for row in by_latency], row=1, col=2
    )
    figure.update_layout(
        title=f"{description['name']}: operators on {description['device']['model']}, "
        f"{description['device']['limit']} (bars: 95 % intervals)",
        template="plotly_white",
        height=max(600, 200 + PIXELS_PER_ROW * len(by_latency)),
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "y": -0.12},
    )
    figure.update_xaxes(gridcolor=GRID)
    figure.update_yaxes(gridcolor=GRID)
    page: str = figure.to_html(config={"displaylogo": False, "responsive": True})
    return page.replace("<head>", f"<head><title>{escape(description['name'])}</title>", 1)


def _styles(rows: Sequence[Row]) -> tuple[dict[str, str], dict[str, str]]:
    """Colour of every first mixer, symbol of every second one."""
    first = dict.fromkeys(row["mixers"][0] for row in rows)
    second = dict.fromkeys([ALONE, *(_partner(row) for row in rows)])
    return (
        {name: MIXER_COLORS[place % len(MIXER_COLORS)] for place, name in enumerate(first)},
        {name: SYMBOLS[place % len(SYMBOLS)] for place, name in enumerate(second)},
    )


def _partner(row: Row) -> str:
    partner: str = row["mixers"][1] if len(row["mixers"]) > 1 else ALONE
    return partner


def _point(
    row: Row, styles: tuple[dict[str, str], dict[str, str]], x: float, y: float | str
) -> go.Scatter:
    """One model; the loss stands on the y axis, or on the x axis beside the name on the y axis."""
    import plotly.graph_objects as go

    color, symbol = styles[0][row["mixers"][0]], styles[1][_partner(row)]
    loss_bar = _bar(row, "loss", "", color)
    is_named = isinstance(y, str)
    return go.Scatter(
        x=[x],
        y=[y],
        error_x=loss_bar if is_named else _bar(row, "latency", "_ms", color),
        error_y=None if is_named else loss_bar,
        mode="markers",
        marker={"color": color, "symbol": symbol, "size": 10},
        customdata=[_hover(row)],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def _legend(styles: tuple[dict[str, str], dict[str, str]]) -> list[go.Scatter]:
    """What colours and symbols mean, as traces without points."""
    import plotly.graph_objects as go

    colors, symbols = styles
    markers = [(name, {"color": color, "symbol": "circle"}) for name, color in colors.items()]
    for name, symbol in symbols.items():
        text = name if name == ALONE else f"+ {name}"
        markers.append((text, {"color": INK, "symbol": symbol}))
    return [
        go.Scatter(x=[None], y=[None], mode="markers", name=name, marker={**marker, "size": 10})
        for name, marker in markers
    ]


def _bar(row: Row, name: str, unit: str, color: str) -> dict[str, Any] | None:
    low, high = row[f"{name}_low{unit}"], row[f"{name}_high{unit}"]
    if low is None:
        return None
    value = row[name + unit]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value],
        "arrayminus": [value - low],
        "color": color,
        "thickness": 1,
        "width": 2,
    }


def _hover(row: Row) -> str:
    latency = "not measured" if row["latency_ms"] is None else f"{row['latency_ms']:.4g} ms"
    accuracy = "" if row["accuracy"] is None else f", cloze {row['accuracy']:.1%}"
    return (
        f"<b>{escape(row['name'])}</b><br>{row['blocks']} blocks, width {row['width']}, "
        f"{row['parameters']:,} parameters<br>{latency}, loss {row['loss']:.4f}{accuracy}"
    )
