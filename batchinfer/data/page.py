"""Page: a survey as one HTML file that needs nothing else, for the person whose job it is."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from batchinfer.data import panels
from batchinfer.data.journal import Tally
from batchinfer.data.report import mishaps
from batchinfer.data.series import RunSeries, average_rate
from batchinfer.data.survey import Survey
from batchinfer.words import clock, counted

# Nothing is fetched and nothing runs, whatever a completion says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(found: Survey) -> str:
    """The survey as HTML. Text from the data is escaped wherever it stands."""
    name = escape(found.identity["job"]["job"]["name"])
    body = "\n".join(filter(None, _sections(found)))
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · batchinfer</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _sections(found: Survey) -> Iterator[str]:
    yield _header(found)
    yield from _notes(found)
    yield _progress(found)
    yield _tiles(found)
    if any(run.seconds for run in found.runs):
        yield panels.over_time(found)
    cards = [
        panels.lengths("Prompt length", found.prompt, "var(--blue)"),
        panels.lengths("Completion length", found.completion, "var(--teal)"),
        panels.finish_reasons(found),
        panels.stages(found),
    ]
    yield f'<div class="grid2">{"".join(cards)}</div>' if any(cards) else ""
    yield panels.failures(found)
    yield panels.predicted(found)
    yield panels.samples(found.samples)
    yield _runs(found)
    yield _settings(found)
    yield f"<footer>Written {panels.moment(found.time)} from {escape(str(found.output))}</footer>"


# ---- what is told first


def _state(found: Survey) -> tuple[str, str]:
    limit = found.identity["job"]["limits"]["max_failed_fraction"]
    if found.state == "complete":
        too_many = found.job.failed > limit * found.job.rows
        return ("complete, too many failed rows", "--red") if too_many else ("complete", "--green")
    if found.state == "running":
        return "running", "--blue"
    return ("failed", "--red") if found.runs and found.runs[-1].error else ("unfinished", "--amber")


def _header(found: Survey) -> str:
    state, colour = _state(found)
    job = found.identity["job"]
    began = f" · began {panels.moment(found.runs[0].begin['time'])}" if found.runs else ""
    return (
        f"<header><h1>{escape(job['job']['name'])}</h1>"
        f'<span class="pill" style="--c:var({colour})">{state}</span>'
        f"<p>{escape(Path(job['model']['path']).name)}{began}</p></header>"
    )


def _notes(found: Survey) -> Iterator[str]:
    if found.state == "unfinished":
        last = found.runs[-1] if found.runs else None
        if last is not None and last.error:
            yield _note("--red", f"The last run died: {escape(last.error)}. Run the same command again to go on.")
        elif last is not None and last.summary is None:
            yield _note("--amber", "The last run was cut off without a word. Run the same command again to go on.")
        else:
            why = f" ({escape(found.summary['reason'])})" if found.summary.get("reason") else ""
            yield _note("--amber", f"The last run stopped early{why}. Run the same command again to go on.")
    if found.unread:
        hint = "They may be on their way; " if found.state == "running" else ""
        yield _note(
            "--amber",
            f"{counted(found.unread, 'committed part')} could not be read. {hint}<code>batchinfer verify</code> tells "
            "more.",
        )


def _note(colour: str, html: str) -> str:
    return f'<p class="note" style="--c:var({colour})">{html}</p>'


def _progress(found: Survey) -> str:
    if found.state == "complete" and found.rows:
        return ""
    if not found.rows:
        return _note("--amber", "The input has no rows, so there is nothing to show.")
    failed = found.job.failed / found.rows * 100
    done = found.done / found.rows * 100
    left = found.seconds_left
    ahead = ""
    if left is not None:
        ahead = f"about {clock(left)} of work left"
        if found.state == "running":
            ahead += f", done at {panels.moment(found.runs[-1].last_time + left)}"
    return (
        f'<div class="card"><div class="progress-line"><b>{found.done:,} of {found.rows:,} rows ({done:.0f} %)</b>'
        f'<span class="soft">{ahead}</span></div><div class="progress">'
        f'<i style="width:{max(done - failed, 0):.2f}%;background:var(--blue)"></i>'
        f'<i style="width:{failed:.2f}%;background:var(--red)"></i></div></div>'
    )


def _tiles(found: Survey) -> str:
    job, rate = found.job, average_rate(found.runs)
    wall = sum(run.summary["run"]["seconds"] if run.summary else run.seconds for run in found.runs)
    answered = max(job.rows - job.failed, 1)
    tiles = [
        ("Rows", f"{job.rows:,}", "all committed" if found.state == "complete" else f"committed of {found.rows:,}"),
        ("Failed", f"{job.failed:,}", _losses(job)),
        ("Tokens in", panels.short(job.prompt_tokens), f"{job.prompt_tokens / max(job.rows, 1):,.0f} a row"),
        ("Tokens out", panels.short(job.completion_tokens), f"{job.completion_tokens / answered:,.0f} a row"),
        ("Throughput", f"{rate:,.0f}" if rate else "–", "tokens a second, in and out"),
        ("Wall time", clock(wall) if found.runs else "–", f"{len(found.runs)} run{'s' * (len(found.runs) != 1)}"),
    ]
    if (peak := found.peak("kv_used")) is not None:
        preempted = int(sum(run.points["preemptions"][-1] for run in found.runs if run.seconds))
        tiles.append(("KV peak", f"{peak:.0%}", f"{preempted:,} preemption{'s' * (preempted != 1)}"))
    if memory := found.summary.get("peak_rss_bytes"):
        tiles.append(("Memory peak", f"{memory / 2**30:.2f} GiB", "of the last run"))
    details = (found.summary.get("load") or {}).get("details", {})
    if mishaps(details):
        aside = details["quarantined"]
        tiles.append(("Engine restarts", f"{details['restarts']:,}", f"{aside:,} row{'s' * (aside != 1)} set aside"))
    cells = "".join(
        f'<div class="tile"><span>{name}</span><b{_bad(name, job.failed)}>{value}</b><span>{said}</span></div>'
        for name, value, said in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _losses(job: Tally) -> str:
    told = [f"{job.failed / job.rows:.2%} of the rows"] if job.failed else []
    told += [f"{job.skipped:,} skipped"] if job.skipped else []
    return ", ".join(told) or "no row"


def _bad(name: str, failed: int) -> str:
    return ' class="bad"' if name == "Failed" and failed else ""


# ---- how it was made


def _runs(found: Survey) -> str:
    rows = []
    for i, run in enumerate(found.runs):
        rate = average_rate([run])
        made = run.points["computed"][-1] if run.seconds else 0
        live = found.state == "running" and i == len(found.runs) - 1
        cells = (panels.moment(run.begin["time"]), clock(run.seconds), f"{made:,.0f}", f"{rate:,.0f}" if rate else "–")
        rows.append((*cells, "running" if live else _ended(run)))
    if not rows:
        return ""
    kinds = ("nowrap", "num", "num", "num", "wide")
    return panels.card("Runs", "", panels.table(("began", "at work", "rows", "tok/s", "ended"), rows, kinds))


def _ended(run: RunSeries) -> str:
    if run.summary is None:
        return f"died: {run.error}" if run.error else "cut off"
    reason = run.summary.get("reason")
    return run.summary["state"] + (f": {reason}" if reason else "")


def _settings(found: Survey) -> str:
    told = {
        "fingerprint": found.identity["fingerprint"],
        **{f"retry {each['retry']}": _of_retry(each) for each in found.identity.get("retries", [])},
        **_flat(found.identity["semantic"].get("engine", {}), "engine."),
        **_flat(found.identity["job"]),
    }
    cells = "".join(f"<span>{escape(key)}</span><span>{escape(str(value))}</span>" for key, value in told.items())
    return (
        '<details class="card"><summary>Settings and fingerprint</summary>'
        f'<div class="settings mono">{cells}</div></details>'
    )


def _of_retry(told: dict[str, Any]) -> str:
    changed = ", ".join(f"{key} = {value}" for key, value in told["set"].items())
    return f"rows where {told['where']}" + (f", with {changed}" if changed else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat
