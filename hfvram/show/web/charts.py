"""Pictures of an answer: memory over context, and the timeline of a training step with its peak."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from hfvram.answer.course import Course
from hfvram.answer.curve import Point
from hfvram.answer.estimate import Estimate
from hfvram.memory.timeline import Category
from hfvram.show.layout import size
from hfvram.show.web.figures import COLOURS
from hfvram.units import GiB, short_count

PAPER = "rgba(255,255,255,0.85)"
INK, GRID, RED = "#868e9b", "rgba(128,128,128,0.25)", "#d64545"
HEIGHT: Final = 430
TINY: Final = 0.005
"""Share of the fullest below which a category is not in the legend."""


def curve(e: Estimate, points: tuple[Point, ...]) -> Any:
    """Memory over context: areas by category, the device above them, the GPU's memory, and the context asked for."""
    import plotly.graph_objects as go

    x = [p.ctx for p in points]
    live = [dict(p.live_bytes) for p in points]
    rows = {c: [sums.get(c, 0) for sums in live] for c in dict.fromkeys(c for sums in live for c in sums)}
    traces = _areas(rows, x)
    shown = [size(p.device_bytes) for p in points]
    traces.append(
        go.Scatter(
            x=x,
            y=[p.device_bytes / GiB for p in points],
            name="on the device",
            mode="lines+markers",
            line={"color": COLOURS[""], "width": 2},
            text=[f"{n:,} tokens: {s}" for n, s in zip(x, shown, strict=True)],
            hoverinfo="text",
        )
    )
    figure = go.Figure(traces, _layout("Memory over context", "tokens of context"))
    ticks = [n for n in x if n & (n - 1) == 0][::-2][::-1]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[_tokens(n) for n in ticks])
    asked = e.request.ctx or 0
    figure.add_scatter(
        x=[asked],
        y=[e.device_bytes / GiB],
        mode="markers",
        marker={"color": RED, "size": 11, "symbol": "diamond"},
        name=f"asked: {asked:,} tokens, {size(e.device_bytes)}",
        hoverinfo="name",
    )
    if e.fit:
        _capacity(figure, e)
    return figure


def course(e: Estimate, found: Course) -> Any:
    """A training step: what is live of each category, where each phase begins, and the peak by its name."""
    import plotly.graph_objects as go

    rows = {c: row for c, row in zip(found.categories, found.live_bytes, strict=True) if any(row)}
    traces = _areas(rows, range(len(found.live_bytes[0])))
    figure = go.Figure(traces, _layout("A training step", "allocations and frees, in order"))
    figure.update_xaxes(showticklabels=False, showgrid=False, range=[0, len(found.live_bytes[0]) - 1])
    last = len(found.live_bytes[0]) - 1
    for at, name in found.phases:
        figure.add_vline(x=at, line={"color": INK, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=at,
            y=1,
            yref="paper",
            yanchor="bottom",
            xanchor="left" if at < 0.85 * last else "right",
            text=_plain(name),
            showarrow=False,
            textangle=-35,
        )
    top = sum(row[found.peak] for row in found.live_bytes) / GiB
    named = (
        f"peak {size(e.peak_allocated_bytes)}<br>{_plain(found.peak_phase)}, most of it {_plain(found.peak_category)}"
    )
    figure.add_scatter(
        x=[found.peak],
        y=[top],
        mode="markers",
        marker={"color": RED, "size": 11, "symbol": "diamond"},
        name="peak",
        hovertext=named,
        hoverinfo="text",
    )
    capacity = e.fit.capacity_bytes / GiB if e.fit and _is_near(e.fit.capacity_bytes, e) else 0
    figure.update_yaxes(range=[0, 1.3 * max(top, capacity)])
    right = found.peak * 2 > len(found.live_bytes[0])
    figure.add_annotation(
        x=found.peak,
        y=top,
        text=named,
        ax=-40 if right else 40,
        ay=-30,
        xanchor="right" if right else "left",
        align="left",
        arrowcolor=RED,
        bgcolor=PAPER,
        font={"color": "#222"},
    )
    if e.fit:
        _capacity(figure, e)
    return figure


def _areas(rows: Mapping[Category, Sequence[int]], x: Sequence[int]) -> list[Any]:
    """Bytes of each category, stacked."""
    import plotly.graph_objects as go

    most = max(map(sum, zip(*rows.values(), strict=True)), default=0)
    return [
        go.Scatter(
            x=list(x),
            y=[count / GiB for count in row],
            name=category,
            stackgroup="live",
            mode="none",
            fillcolor=COLOURS[category],
            hoverinfo="skip",
            showlegend=max(row) > TINY * most,
        )
        for category, row in rows.items()
    ]


def _capacity(figure: Any, e: Estimate) -> None:
    """The GPU's memory as a line; far above what is drawn it would flatten the rest, and is left out."""
    if e.fit and _is_near(e.fit.capacity_bytes, e):
        figure.add_hline(
            y=e.fit.capacity_bytes / GiB,
            line={"color": RED, "width": 1.5, "dash": "dash"},
            annotation={
                "text": _plain(f"{e.fit.gpu}: {size(e.fit.capacity_bytes)}"),
                "font": {"color": "#b3261e"},
                "bgcolor": PAPER,
            },
            annotation_position="top left",
        )


def _is_near(capacity_bytes: int, e: Estimate) -> bool:
    return capacity_bytes <= 4 * e.device_bytes


def _layout(title: str, along: str) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "zeroline": False, "fixedrange": True}
    return {
        "title": {"text": title, "x": 0, "xref": "paper", "font": {"size": 15}, "y": 0.98},
        "height": HEIGHT,
        "margin": {"l": 48, "r": 24, "t": 84, "b": 10},
        "font": {"color": INK, "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "traceorder": "normal"},
        "xaxis": {**axis, "title": {"text": along, "standoff": 6}},
        "yaxis": {**axis, "title": {"text": "GiB", "standoff": 6}, "rangemode": "tozero"},
        "hovermode": "closest",
        "dragmode": False,
    }


def _tokens(count: int) -> str:
    """Powers of two as people write them."""
    return f"{count // 1024}k" if count >= 1024 else short_count(count)


def _plain(text: str) -> str:
    """Plotly reads markup in text."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
