"""Charts as HTML and inline SVG, without a script: lines over time, histograms, bars.

The SVG is stretched to the room there is, with strokes that keep their width; every word is HTML beside it, so it keeps
its size on a phone. Colours are CSS variables of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from batchinfer.data.stats import Bin

TICKS = 6
_TIME_STEPS = (1, 2, 5, 10, 15, 30, *(60 * m for m in (1, 2, 5, 10, 15, 30)), *(3600 * h for h in (1, 2, 3, 6, 12, 24)))


@dataclass(frozen=True)
class Line:
    """One line of a chart, in pieces: between two pieces it is interrupted."""

    name: str
    pieces: Sequence[tuple[np.ndarray, np.ndarray]]  # x, y
    colour: str  # CSS
    kind: str = "line"  # line | area | dashed


def line_chart(
    lines: Sequence[Line],
    y_name: Callable[[float], str],
    *,
    seconds: float,
    top: float | None = None,
    marks: Sequence[float] = (),
) -> str:
    """Values over ``seconds`` from 0 on, the y axis from 0 to ``top`` (or what the values need).

    Args:
        marks: moments to mark with an upright line.
    """
    peak = max((float(y.max()) for line in lines for _, y in line.pieces if len(y)), default=0.0)
    ticks = _ticks(top or peak or 1.0)
    high, wide = max(ticks[-1], top or 0.0), max(seconds, 1e-9)

    def points(x: np.ndarray, y: np.ndarray) -> list[str]:
        return [f"{px:.2f} {py:.2f}" for px, py in zip(x / wide * 100, 100 - y / high * 100)]

    shapes = [f'<path class="grid" d="M0 {100 - t / high * 100:.2f}H100"/>' for t in ticks]
    shapes += [f'<path class="mark" d="M{x / wide * 100:.2f} 0V100"/>' for x in marks]
    for line in lines:
        for x, y in line.pieces:
            if not len(x):
                continue
            path = "M" + "L".join(points(x, y))
            if line.kind == "area":
                base = f"L{x[-1] / wide * 100:.2f} 100L{x[0] / wide * 100:.2f} 100Z"
                shapes.append(f'<path class="area" style="fill:{line.colour}" d="{path}{base}"/>')
            dashed = " dashed" if line.kind == "dashed" else ""
            shapes.append(f'<path class="line{dashed}" style="stroke:{line.colour}" d="{path}"/>')
    shapes += _hovers(lines, y_name, wide)
    x_labels = [(t / wide, name) for t, name in _time_ticks(wide)]
    legend = "".join(
        f'<span><i class="{line.kind}" style="--c:{line.colour}"></i>{escape(line.name)}</span>' for line in lines
    )
    legend = f'<div class="legend">{legend}</div>' if len(lines) > 1 else ""
    return _frame(shapes, [(t / high, y_name(t)) for t in ticks], x_labels, legend + "<span>time at work</span>")


def histogram(bins: Sequence[Bin], colour: str, unit: str) -> str:
    """Counts of lengths. The last bin, where it is wider than the others, is drawn paler: the tail."""
    most = max(bin.count for bin in bins)
    ticks = _ticks(most, whole=True)
    high, width = ticks[-1], 100 / len(bins)
    usual = bins[0].last - bins[0].first
    shapes = [f'<path class="grid" d="M0 {100 - t / high * 100:.2f}H100"/>' for t in ticks]
    for i, bin in enumerate(bins):
        height = max(bin.count / high * 100, 0.8) if bin.count else 0
        tail = ' class="tail"' if bin.last - bin.first > usual else ""
        said = (
            f"{bin.first:,}–{bin.last:,} {unit}: {bin.count:,} rows"
            if usual or tail
            else f"{bin.first:,}: {bin.count:,}"
        )
        shapes.append(
            f'<rect x="{(i + 0.06) * width:.2f}" y="{100 - height:.2f}" width="{0.88 * width:.2f}" '
            f'height="{height:.2f}" style="fill:{colour}"{tail}><title>{said}</title></rect>'
        )
    step = max(1, math.ceil(len(bins) / TICKS))
    labels = [(i / len(bins), compact(bins[i].first)) for i in range(0, len(bins), step)]
    if bins[-1].last - bins[-1].first > usual:  # the tail is named, whatever the step
        labels = [at for at in labels if at[0] < 1 - 1.6 * step / len(bins)]
        labels.append((1 - 1 / len(bins), f"≥ {compact(bins[-1].first)}"))
    return _frame(shapes, [(t / high, compact(t)) for t in ticks], labels, f"<span>{escape(unit)}</span>")


def bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Horizontal bars: name, value, what to write beside it, colour."""
    most = max((value for _, value, _, _ in rows), default=0) or 1
    cells = "".join(
        f'<span class="name">{escape(name)}</span><span class="track"><i style="width:{value / most * 100:.2f}%;'
        f'background:{colour}"></i></span><span class="value">{escape(said)}</span>'
        for name, value, said, colour in rows
    )
    return f'<div class="bars">{cells}</div>'


def compact(value: float) -> str:
    """A number in four characters or so: 950, 1.2k, 35k, 4M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _frame(
    shapes: Sequence[str], y_labels: Sequence[tuple[float, str]], x_labels: Sequence[tuple[float, str]], below: str
) -> str:
    y = "".join(f'<span style="bottom:{at * 100:.2f}%">{escape(name)}</span>' for at, name in y_labels)
    x = "".join(
        f'<span{_end_class(at)} style="left:{at * 100:.2f}%">{escape(name)}</span>' for at, name in x_labels if at <= 1
    )
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
    unit = f'<div class="unit">{below}</div>'
    return (
        f'<div class="plot"><div class="y">{y}</div><div class="canvas">{svg}</div><div class="x">{x}</div>{unit}</div>'
    )


def _end_class(at: float) -> str:
    return ' class="start"' if at < 0.02 else ' class="end"' if at > 0.94 else ""


def _hovers(lines: Sequence[Line], y_name: Callable[[float], str], wide: float) -> list[str]:
    """Invisible columns that tell the values below the pointer."""
    shapes = []
    named = [line for line in lines if line.kind != "dashed"]
    for i, (x, _) in enumerate(named[0].pieces if named else ()):
        edges = np.concatenate((x[:1], (x[1:] + x[:-1]) / 2, x[-1:]))
        for j, at in enumerate(x):
            values = ", ".join(f"{line.name} {y_name(line.pieces[i][1][j])}" for line in named)
            shapes.append(
                f'<rect class="hover" x="{edges[j] / wide * 100:.2f}" y="0" height="100" '
                f'width="{(edges[j + 1] - edges[j]) / wide * 100:.2f}"><title>{_time_name(at, wide)}: '
                f"{escape(values)}</title></rect>"
            )
    return shapes


def _ticks(top: float, whole: bool = False) -> list[float]:
    """0, step, 2 step, … up to the first that is no less than ``top``; a step is 1, 2 or 5 times a power of ten."""
    rough = top / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    step = max(1.0, math.ceil(step)) if whole else step
    return [i * step for i in range(math.ceil(top / step - 1e-6) + 1)]


def _time_ticks(wide: float) -> list[tuple[float, str]]:
    step = next((s for s in _TIME_STEPS if wide / s <= TICKS), 86_400 * math.ceil(wide / 86_400 / TICKS))
    return [(i * step, _time_name(i * step, wide)) for i in range(int(wide / step) + 1)]


def _time_name(seconds: float, wide: float) -> str:
    """A moment on an axis of that many seconds, with its unit."""
    if wide < 120:
        return f"{seconds:.3g} s"
    if wide < 2 * 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}:{rest:02} min" if rest else f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours}:{rest:02} h" if rest else f"{hours} h"
