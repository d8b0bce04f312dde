"""Panels: the parts of a report's page, each a card of HTML made from a survey. Empty without anything to show."""

from __future__ import annotations

import time
from html import escape
from typing import Any

import numpy as np

from batchinfer.data.charts import Line, bars, compact, histogram, line_chart
from batchinfer.data.series import RunSeries
from batchinfer.data.stats import Lengths
from batchinfer.data.survey import Sample, Survey
from batchinfer.words import clock

BUCKETS = 90  # of a chart over time, as a screen has so many points
ROWS_A_RATE = 30  # that a rate is told of at least: tokens are counted as rows finish, and those come in bursts
MOST_REASONS = 12  # kinds of failure shown


# ---- over time


def over_time(found: Survey) -> str:
    begins = np.cumsum([0.0, *(run.seconds for run in found.runs)])
    runs = [(begin, run) for begin, run in zip(begins.tolist(), found.runs) if run.seconds]
    marks, wide = [begin for begin, _ in runs[1:]], float(begins[-1])

    def pieces(of: Any, *names: str) -> list[tuple[np.ndarray, np.ndarray]]:
        drawn = [(begin, *of(run, max(3, round(BUCKETS * run.seconds / wide)), *names)) for begin, run in runs]
        return [(x + begin, y) for begin, x, y in drawn]

    rates = [
        Line("in and out", pieces(_rate, "prompt_tokens", "completion_tokens"), "var(--blue)", "area"),
        Line("out", pieces(_rate, "completion_tokens"), "var(--teal)"),
    ]
    done, most = [], 0.0
    for x, y in pieces(_rows):  # what a run finds in the log of the one before it, it counts as it comes to it
        done.append((x, np.maximum(y, most)))
        most = float(done[-1][1][-1])
    rows = [Line("rows done", done, "var(--blue)", "area")]
    ends = wide
    if left := found.seconds_left:
        ends = wide + min(left, 3 * wide)  # a far end would squeeze what was
        reached = found.done + (found.rows - found.done) * (ends - wide) / left
        ahead = np.array([wide, ends]), np.array([float(found.done), reached])
        rows.append(Line("expected", [ahead], "var(--blue)", "dashed"))
    kv = [Line("KV pages in use", pieces(_level, "kv_used"), "var(--violet)", "area")]
    load = [
        Line("running", pieces(_level, "running"), "var(--teal)", "area"),
        Line("waiting", pieces(_level, "waiting"), "var(--amber)"),
    ]
    cards = [
        ("Throughput", "tokens a second, of rows finished", line_chart(rates, compact, seconds=wide, marks=marks)),
        ("Rows", f"of {found.rows:,}", line_chart(rows, compact, seconds=ends, top=float(found.rows), marks=marks)),
    ]
    if found.peak("kv_used"):
        cards.append(("KV cache", "share of its pages in use", line_chart(kv, _percent, seconds=wide, marks=marks)))
    if found.peak("running"):
        cards.append(("Sequences", "in the engine", line_chart(load, compact, seconds=wide, marks=marks)))
    return f'<div class="grid2">{"".join(card(*told) for told in cards)}</div>'


def _rate(run: RunSeries, buckets: int, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens a second around each moment."""
    seconds = np.concatenate(([0.0], run.points["seconds"]))
    tokens = np.concatenate(([0.0], sum(run.points[name] for name in names)))
    share = min(max(1 / buckets, 3 / len(seconds), ROWS_A_RATE / max(run.points["computed"][-1], 1)), 0.5)
    x = np.linspace(0, run.seconds, buckets)
    begin, end = (np.clip(x + sign * share / 2 * run.seconds, 0, run.seconds) for sign in (-1, 1))
    return x, (np.interp(end, seconds, tokens) - np.interp(begin, seconds, tokens)) / (end - begin)


def _rows(run: RunSeries, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    seconds = np.concatenate(([0.0], run.points["seconds"]))
    rows = np.concatenate(([float(run.begin["done"])], run.points["rows"]))
    x = np.linspace(0, run.seconds, buckets)
    return x, np.round(np.interp(x, seconds, rows))


def _level(run: RunSeries, buckets: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The highest value of each bucket, so that no peak is lost."""
    seconds, values = run.points["seconds"], run.points[name]
    begins = np.searchsorted(seconds, np.linspace(0, run.seconds, buckets + 1)[:-1])
    first = np.unique([*begins, len(seconds) - 1])  # the last point too, so that the line reaches the end
    return seconds[first], np.maximum.reduceat(values, first)


# ---- what came out


def lengths(title: str, lengths: Lengths, colour: str) -> str:
    if not lengths.count:
        return ""
    named = {"mean": f"{lengths.mean:,.0f}"} | {name: f"{value:,}" for name, value in lengths.quantiles().items()}
    chips = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in named.items())
    return card(
        title, "rows by tokens", f'{histogram(lengths.bins(), colour, "tokens")}<div class="chips">{chips}</div>'
    )


def finish_reasons(found: Survey) -> str:
    colours = {"stop": "var(--green)", "length": "var(--amber)", "error": "var(--red)", "skipped": "var(--violet)"}
    total = sum(found.job.finish_reasons.values())
    rows = [
        (reason, count, f"{count:,} ({count / total:.1%})", colours.get(reason, "var(--soft)"))
        for reason, count in found.job.finish_reasons.most_common()
    ]
    return card("Finish reasons", "of all completions", bars(rows)) if rows else ""


def stages(found: Survey) -> str:
    stages = sorted(found.summary.get("stages", {}).items(), key=lambda item: -item[1])
    rows = [(name, seconds, clock(seconds), "var(--blue)") for name, seconds in stages if seconds >= 0.05][:12]
    return card("Where the time went", "last run; stages overlap", bars(rows)) if rows else ""


def failures(found: Survey) -> str:
    if not found.failures:
        return ""
    kinds = sorted(found.failures.items(), key=lambda item: -item[1].count)
    rows = [
        (f"{told.count:,}", f"{told.count / found.job.rows:.2%}", kind, ", ".join(told.rows))
        for kind, told in kinds[:MOST_REASONS]
    ]
    hidden = sum(told.count for _, told in kinds[MOST_REASONS:])
    more = f'<p class="soft">{hidden:,} rows of other kinds are not shown.</p>' if hidden else ""
    told = table(("rows", "share", "reason", "first rows"), rows, ("num", "num", "wide", "wide"))
    return card("Failures", f"{found.job.failed:,} rows by reason; N is any number", told + more)


def predicted(found: Survey) -> str:
    told = found.prediction
    if told is None:
        return ""
    actual: list[tuple[str, Any, float, Any]] = [
        ("rows", [told["rows"]] * 2, found.rows, short),
        ("tokens in", told["tokens_in"], found.job.prompt_tokens, short),
        ("tokens out", told["tokens_out"], found.job.completion_tokens, short),
    ]
    if told["seconds"]:
        actual.append(("time at work", told["seconds"], found.seconds, clock))
    rows = [
        (name, show(low) if low == high else f"{show(low)} – {show(high)}", show(value), _verdict(low, high, value))
        for name, (low, high), value, show in actual
    ]
    if found.state != "complete":
        rows = [(*row[:3], "") for row in rows]
    so_far = "actual" if found.state == "complete" else "so far"
    shown = table(("what", "predicted", so_far, "so it came"), rows, ("nowrap", "num", "num", ""))
    return card("Predicted and actual", f"foretold {moment(told['time'])} from {told['sampled']:,} rows", shown)


def _verdict(low: float, high: float, value: float) -> str:
    if low <= value <= high:
        return "as predicted"
    end = high if value > high else low
    return f"{abs(value / end - 1):.0%} {'more' if value > high else 'less'}" if end else "more"


def samples(found: list[Sample]) -> str:
    return (
        card("Samples", "rows as they came out", f'<div class="samples">{"".join(map(_sample, found))}</div>')
        if found
        else ""
    )


def _sample(sample: Sample) -> str:
    asked = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in sample.asked.items())
    said = "".join(
        f'<dt>completion · {escape(reason)}</dt><dd class="said">{escape(text) or "(empty)"}</dd>'
        for text, reason in zip(sample.completions, sample.finish_reasons)
    )
    size = f"{sample.prompt_tokens or 0:,} in · {sample.completion_tokens:,} out"
    head = f"<header><code>{escape(sample.address)}</code><span>{size}</span></header>"
    return f'<article class="sample">{head}<dl>{asked}{said}</dl></article>'


# ---- small things


def card(title: str, said: str, html: str) -> str:
    small = f"<small>{escape(said)}</small>" if said else ""
    return f'<section class="card"><h2>{escape(title)}{small}</h2>{html}</section>'


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], kinds: tuple[str, ...]) -> str:
    """Cells of text under their names, a CSS class for each column. On a phone a name stands before each cell."""
    top = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(head, kinds))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}" data-name="{escape(name)}">{escape(cell)}</td>'
            for cell, name, kind in zip(row, head, kinds)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def short(count: float) -> str:
    return f"{count:,.0f}" if count < 1e7 else compact(count)


def _percent(share: float) -> str:
    return f"{share * 100:.3g}%"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
