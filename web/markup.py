"""TODO"""

from __future__ import annotations

import re
from collections.abc import Collection
from html import escape
from typing import Any

import gradio as gr

import tooltips as words
from core.errors import StudioError
from core.results import Draft, Failed, ModelInfo, Progress, Take
from web import summaries


def particulars(take: Take, unasked: Collection[str] = ()) -> str:
    """Everything a take knows of itself, to read, but the knobs that meant nothing to it."""
    return _check(take.check) + _facts(take.notes, summaries.particulars(take, unasked))


def draft(draft: Draft) -> str:
    """What is known of words that were written."""
    return _facts(draft.notes, summaries.drafted(draft))


def _check(check: dict[str, Any]) -> str:
    """What a take measures, beside what was asked for."""
    heads = "".join(f"<th scope='col'>{head}</th>" for head in words.CHECK_COLUMNS)
    rows = "".join(
        f"<tr><th scope='row'>{escape(what)}</th><td>{escape(asked)}</td><td>{escape(told)}</td></tr>"
        for what, asked, told in summaries.checked(check)
    )
    table = f"<table><tr>{heads}</tr>{rows}</table><p class='tip'>{words.CHECK_TIP}</p>"
    return f"<h2>{words.CHECK}</h2>{table}" if rows else ""


def _facts(notes: Collection[str], told: dict[str, dict[str, str]]) -> str:
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (f"<h2>{words.NOTES}</h2><ul>{listed}</ul>" if listed else "") + "".join(
        f"<h2>{escape(heading)}</h2>{_pairs(facts)}" for heading, facts in told.items()
    )


def _pairs(facts: dict[str, str]) -> str:
    rows = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def with_commands(text: str) -> str:
    """`text` as HTML, what is to be typed in it set apart."""
    return re.sub(
        r"python app\.py (?:fetch|--model) [\w.-]*\w", r"<code>\g<0></code>", escape(text)
    )


def toast(trouble: StudioError | Failed) -> None:
    """Say what went wrong, and what helps, in a corner of the page."""
    gr.Warning(escape(f"{trouble.message} {trouble.action}"), title=words.FAILED, duration=8)


def masthead(card: ModelInfo) -> str:
    return (
        f"<a class='skip' href='#studio'>{words.SKIP}</a>"
        f"<header><h1>{words.TITLE}</h1><p class='badge'><b>{escape(card.title)}</b>"
        f"<span>{escape(card.device)}</span></p></header>"
    )


def progress(event: Progress) -> str:
    share = event.step / event.steps if event.steps > 1 else None
    return status(
        "running",
        words.stage(event.stage),
        words.count(event),
        words.clock(event.elapsed_s),
        words.left(event.left_s),
        fraction=share,
    )


def status(state: str, headline: str, *details: str, fraction: float | None = None) -> str:
    """The status line. Its bar has no value while nothing can be counted."""
    value = "" if fraction is None else f" value='{min(1.0, fraction) * 100:.1f}'"
    bar = f"<progress max='100'{value} aria-label='{words.PROGRESS}'></progress>"
    told = "".join(f"<span>{escape(detail)}</span>" for detail in details if detail)
    return (
        f"<div class='status' data-state='{state}'><p><b>{escape(headline)}</b>{told}</p>"
        f"{bar if state in ('running', 'done') else ''}</div>"
    )
