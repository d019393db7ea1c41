"""Pieces of HTML. Every text that a person or a file brought in is escaped here."""

from __future__ import annotations

import re
from collections.abc import Collection
from html import escape
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.results import Download, Draft, Failed, ModelInfo, Progress, Take
from web import summaries


def take_details(take: Take, unused: Collection[str] = ()) -> str:
    """Everything known about a take, without the parameters in `unused`, which had no effect."""
    return _measurements(take.check) + _sections(take.notes, summaries.take_details(take, unused))


def draft_details(draft: Draft) -> str:
    """Everything known about a draft."""
    return _sections(draft.notes, summaries.draft_details(draft))


def _measurements(check: dict[str, Any]) -> str:
    """A table of what was measured in a take, beside what was requested."""
    heads = "".join(f"<th scope='col'>{head}</th>" for head in tooltips.CHECK_COLUMNS)
    rows = "".join(
        f"<tr><th scope='row'>{escape(what)}</th><td>{escape(requested)}</td>"
        f"<td>{escape(measured)}</td></tr>"
        for what, requested, measured in summaries.measurements(check)
    )
    table = f"<table><tr>{heads}</tr>{rows}</table><p class='tip'>{tooltips.CHECK_HELP}</p>"
    return f"<h2>{tooltips.CHECK}</h2>{table}" if rows else ""


def _sections(notes: Collection[str], sections: dict[str, dict[str, str]]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (f"<h2>{tooltips.NOTES}</h2><ul>{items}</ul>" if items else "") + "".join(
        f"<h2>{escape(heading)}</h2>{_pairs(facts)}" for heading, facts in sections.items()
    )


def _pairs(facts: dict[str, str]) -> str:
    rows = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def with_commands(text: str) -> str:
    """`text` as HTML, with the commands in it marked as code."""
    return re.sub(
        r"python app\.py (?:fetch|--model) [\w.-]*\w", r"<code>\g<0></code>", escape(text)
    )


def toast(error: StudioError | Failed) -> None:
    """Show an error and what to do about it in a corner of the page."""
    gr.Warning(escape(f"{error.message} {error.action}"), title=tooltips.FAILED, duration=8)


def masthead(info: ModelInfo) -> str:
    """The top of the page: title, model and device."""
    return (
        f"<a class='skip' href='#studio'>{tooltips.SKIP}</a>"
        f"<header><h1>{tooltips.TITLE}</h1><button type='button' class='badge'"
        f" aria-haspopup='dialog'><b>{escape(info.title)}</b><span>{escape(info.device)}</span>"
        f"<span class='sr'>{tooltips.MODELS['open']}</span></button></header>"
    )


def progress(event: Progress) -> str:
    """The status line of a running job."""
    return status(
        "running",
        tooltips.stage_label(event.stage),
        tooltips.progress_count(event),
        tooltips.elapsed(event.elapsed_s),
        tooltips.time_left(event.left_s),
        fraction=event.step / event.steps if event.steps > 1 else None,
    )


def download(title: str, state: Download) -> str:
    """The status line of a download."""
    return status(
        "running",
        tooltips.DOWNLOADING.format(title=title),
        f"{state.done / 1e6:,.0f} of {state.total / 1e6:,.0f} MB",
        f"{state.rate / 1e6:.1f} MB/s" if state.rate else "",
        fraction=state.done / state.total if state.total else None,
    )


def status(state: str, headline: str, *details: str, fraction: float | None = None) -> str:
    """A status line.

    Args:
        state: idle, running, done, stopped or failed.
        fraction: 0 to 1 for the progress bar; None where nothing is counted.
    """
    value = "" if fraction is None else f" value='{min(1.0, fraction) * 100:.1f}'"
    bar = f"<progress max='100'{value} aria-label='{tooltips.PROGRESS}'></progress>"
    spans = "".join(f"<span>{escape(detail)}</span>" for detail in details if detail)
    return (
        f"<div class='status' data-state='{state}'><p><b>{escape(headline)}</b>{spans}</p>"
        f"{bar if state in ('running', 'done') else ''}</div>"
    )
