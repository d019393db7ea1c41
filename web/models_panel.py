"""The list of models, in a dialog that the badge at the top of the page opens."""

from __future__ import annotations

from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.results import Download, ModelEntry
from web import scripts
from web.handlers import Studio


def models_panel(studio: Studio) -> gr.HTML:
    """Draw the dialog. Its script asks for the rows while it is open."""

    def manage(asked: str) -> dict[str, Any]:
        """The rows of the list, after `asked`: an action and a name, or nothing."""
        action, _, name = str(asked).partition(" ")
        actions = {"fetch": studio.fetch, "stop": studio.stop_fetch, "use": studio.use}
        problem = ""
        try:
            if action in actions:
                actions[action](name)
        except StudioError as error:
            problem = str(error)
        return {"rows": [_row(entry) for entry in studio.models()], "problem": problem}

    changeable = any(entry.can_fetch or entry.can_use for entry in studio.models())
    text = {
        **tooltips.MODELS,
        "kinds": tooltips.MODEL_KINDS,
        "help": tooltips.MODELS_HELP if changeable else tooltips.MODELS_HELP_SPACE,
    }
    return gr.HTML(
        None,
        html_template=scripts.template("models_panel"),
        js_on_load=scripts.on_load("models_panel", text=text),
        server_functions=[manage],
        apply_default_css=False,
        elem_id="models",
    )


def _row(entry: ModelEntry) -> dict[str, Any]:
    """What the script shows of a model: texts, which buttons, and a download's share done."""
    text, state = tooltips.MODELS, entry.download
    at = state.state if state and not entry.on_disk else ""
    where = "in_use" if entry.in_use and entry.on_disk else "on_disk"
    fits = {True: text["fits"], False: text["does_not_fit"], None: ""}[entry.fits]
    facts = (
        text[where] if entry.on_disk else text["missing"],
        entry.size,
        f"{entry.licence}: {tooltips.MAY_SELL[entry.may_sell]}",
        f"{fits}: {entry.memory}" if entry.memory else fits,
    )
    running = at in ("running", "stopping")
    button = "stop" if running else "use" if entry.can_use else ""
    if entry.can_fetch and not running:
        button = "fetch"
    return {
        "kind": entry.kind,
        "name": entry.name,
        "title": entry.title,
        "facts": " · ".join(fact for fact in facts if fact),
        "button": button,
        "label": text["resume" if button == "fetch" and state and state.done else button or "use"],
        "enabled": at != "stopping",
        "share": state.done / state.total if running and state and state.total else None,
        "message": _message(state) if state and at else "",
    }


def _message(state: Download) -> str:
    """How a download stands, in a few words."""
    text = tooltips.MODELS
    megabytes = {"done": state.done / 1e6, "total": state.total / 1e6}
    if state.failed:
        return f"{state.failed.message} {state.failed.action}"
    message = text[state.state].format(**megabytes)
    rate = text["rate"].format(rate=state.rate / 1e6) if state.rate else ""
    return " · ".join(part for part in (message, rate) if part)
