"""The interactive figures of the report, as pieces of HTML."""

from __future__ import annotations

from typing import Any

from search.factors import Effect
from search.quality import AXES

Record = dict[str, Any]

INK, GRID, ACCENT, QUIET, LINE = "#22303c", "#e6e9ec", "#d1495b", "#9aa5b1", "#2e86ab"
# One colour per token mixer, in the order in which a study or a search has them.
MIXER_COLORS = (
    *("#d1495b", "#edae49", "#2e86ab", "#1b4965", "#7d5ba6", "#c08497"),
    *("#3c896d", "#90be6d", "#8d6a4f", "#5c6b7a", "#e07a5f", "#118ab2"),
)
FFN_COLOR = "#c9b79c"


def frontier_figure(
    search: Record, scored: list[Record], members: list[Record], chosen: Record | None
) -> str | None:
    """Score against measured latency of every candidate; None before the first."""
    if not scored:
        return None
    import plotly.graph_objects as go

    numbers = {record["number"] for record in members}
    others = [record for record in scored if record["number"] not in numbers]
    figure = go.Figure()
    figure.add_trace(_points(others, "candidate", QUIET, 8))
    ordered = sorted(members, key=lambda record: record["latency_ms"])
    figure.add_trace(
        go.Scatter(
            x=[record["latency_ms"] for record in ordered],
            y=[record["score"] for record in ordered],
            mode="lines",
            line={"color": LINE, "width": 1.5, "shape": "hv"},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    figure.add_trace(_points(ordered, "frontier", LINE, 10))
    plain = [r for r in scored if r["digest"] == search["reference"]["digest"]]
    if plain:
        figure.add_trace(_points(plain, "plain transformer", INK, 12, symbol="square-open"))
    if chosen is not None:
        figure.add_trace(_points([chosen], "chosen", ACCENT, 17, symbol="star"))
    figure.add_vline(
        x=search["target_ms"],
        line={"color": ACCENT, "width": 1, "dash": "dash"},
        annotation_text=f"target {search['target_ms']:.2f} ms",
        annotation_position="top right",
    )
    figure.update_xaxes(title="measured latency of one request, ms (bars: 95 % interval)")
    figure.update_yaxes(title=f"{AXES[search['quality']]}, after the proxy")
    # The page's script is embedded once, with its first figure.
    return as_html(figure, height=460, script=True)


def progress_figure(scored: list[Record], axis: str) -> str | None:
    """Score of each candidate in order, and the best so far; None before two."""
    if len(scored) < 2:
        return None
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_trace(_trace(go, scored, "number", "score", "candidate", "markers", QUIET))
    best = [record for record in scored if record["best_so_far"]]
    last = {**best[-1], "number": scored[-1]["number"]} if best else None
    steps = [*best, last] if last else best
    trace = _trace(go, steps, "number", "score", "best within the target", "lines", ACCENT)
    figure.add_trace(trace.update(line={"shape": "hv", "color": ACCENT}))
    figure.update_xaxes(title="candidate")
    figure.update_yaxes(title=axis)
    return as_html(figure, height=340)


def hypervolume_figure(history: list[list[float]]) -> str | None:
    """Hypervolume over the tokens that all candidates were trained on; None before two scores.

    history: (candidate, tokens, hypervolume) whenever a score was found.
    """
    if len(history) < 2:
        return None
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Scatter(
            x=[tokens for _, tokens, _ in history],
            y=[volume for _, _, volume in history],
            text=[f"#{number}" for number, _, _ in history],
            mode="lines",
            line={"color": LINE, "shape": "hv"},
        )
    )
    figure.update_xaxes(title="tokens that all candidates were trained on")
    figure.update_yaxes(title="hypervolume")
    return as_html(figure, height=300)


def rungs_figure(scored: list[Record], chosen: Record | None, axis: str) -> str | None:
    """Score after each rung of the candidates that climbed; None if none did."""
    climbed = [record for record in scored if len(record["rungs"]) > 1]
    if not climbed:
        return None
    import plotly.graph_objects as go

    figure = go.Figure()
    lowest = [record for record in scored if len(record["rungs"]) == 1]
    figure.add_trace(
        go.Scatter(
            x=[record["rungs"][0]["tokens"] for record in lowest],
            y=[record["rungs"][0]["score"] for record in lowest],
            mode="markers",
            name="left on the first rung",
            marker={"color": QUIET, "size": 6},
        )
    )
    for record in sorted(climbed, key=lambda record: record is chosen):
        is_chosen = record is chosen
        figure.add_trace(
            go.Scatter(
                x=[each["tokens"] for each in record["rungs"]],
                y=[each["score"] for each in record["rungs"]],
                mode="lines+markers",
                name=f"#{record['number']}{', chosen' if is_chosen else ''}",
                text=record["short"],
                line={"color": ACCENT if is_chosen else LINE, "width": 3 if is_chosen else 1},
                showlegend=is_chosen,
            )
        )
    figure.update_xaxes(title="tokens trained on", type="log")
    figure.update_yaxes(title=axis)
    return as_html(figure, height=380)


def rank_correlation_figure(found: Record, axis: str) -> str:
    """Scores after a lower rung against those after the last, of candidates drawn at random."""
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Scatter(
            x=found["short"],
            y=found["long"],
            text=[f"#{number}" for number in found["numbers"]],
            mode="markers+text",
            textposition="top center",
            marker={"color": LINE, "size": 9},
        )
    )
    figure.update_xaxes(title=f"{axis}, after {found['short_tokens']:,} tokens")
    figure.update_yaxes(title=f"after {found['long_tokens']:,}")
    return as_html(figure, height=340)


def effects_figure(effects: list[Effect], axis: str, of: str) -> str | None:
    """Effects with their intervals, grey where these include zero; None without any."""
    if not effects:
        return None
    import plotly.graph_objects as go

    figure = go.Figure()
    for effect in reversed(effects):
        color = QUIET if not effect.is_told_from_zero else LINE if effect.difference < 0 else ACCENT
        figure.add_trace(
            go.Scatter(
                x=[effect.difference],
                y=[f"{effect.name}, n = {effect.n}"],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [effect.high - effect.difference],
                    "arrayminus": [effect.difference - effect.low],
                    "color": color,
                },
                mode="markers",
                marker={"color": color, "size": 9},
                text=f"{effect.difference:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]",
                hovertemplate="%{y}: %{text}<extra></extra>",
                showlegend=False,
            )
        )
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    figure.update_xaxes(title=f"{axis}: {of}")
    figure.update_yaxes(automargin=True)
    return as_html(figure, height=110 + 30 * len(effects))


def training_figure(curve: list[dict[str, float]]) -> str | None:
    """Training and validation loss of the winner; None before it is trained."""
    if not curve:
        return None
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = [row for row in curve if "loss" in row]
    figure.add_trace(_trace(go, rows, "tokens", "loss", "training", "lines", QUIET))
    rows = [row for row in curve if "validation_loss" in row]
    figure.add_trace(
        _trace(go, rows, "tokens", "validation_loss", "validation", "lines+markers", ACCENT)
    )
    figure.update_xaxes(title="training tokens")
    figure.update_yaxes(title="loss, nats per token")
    return as_html(figure, height=340)


def _trace(go: Any, rows: list[Record], x: str, y: str, name: str, mode: str, color: str) -> Any:
    return go.Scatter(
        x=[row[x] for row in rows],
        y=[row[y] for row in rows],
        name=name,
        mode=mode,
        marker={"color": color},
        line={"color": color},
    )


def _points(records: list[Record], name: str, color: str, size: int, symbol: str = "circle") -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=[r["latency_ms"] for r in records],
        y=[r["score"] for r in records],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [r["latency_high_ms"] - r["latency_ms"] for r in records],
            "arrayminus": [r["latency_ms"] - r["latency_low_ms"] for r in records],
            "color": color,
            "thickness": 1,
            "width": 2,
        },
        mode="markers",
        name=name,
        marker={"color": color, "size": size, "symbol": symbol, "line": {"width": 1.5}},
        text=[
            f"<b>#{r['number']}</b> {r['short']}<br>width {r['width']}, "
            f"{r['parameters']:,} parameters<br>loss {r['loss']:.4f}, {r['latency_ms']:.2f} ms"
            for r in records
        ],
        hovertemplate="%{text}<extra></extra>",
    )


def as_html(figure: Any, height: int, script: bool = False) -> str:
    """A figure as a piece of a page, in the looks of all; script: with the page's script."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 60, "t": 30, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "y": 1.08, "x": 0},
    )
    figure.update_xaxes(gridcolor=GRID)
    figure.update_yaxes(gridcolor=GRID)
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=script, config={"displaylogo": False, "responsive": True}
    )
    return html
