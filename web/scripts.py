"""The scripts of our own components. Each is sent once with the page, however often it is used."""

from __future__ import annotations

import json
from typing import Any

from theme import ASSETS

SCRIPTS = {
    "ab_compare": ("text",),
    "adapter_picker": ("text",),
    "models_panel": ("text",),
    "restore": ("text",),
    "share": ("text",),
    "upload_preview": ("text", "empty"),
}
"""The scripts in `assets`, with the names of the constants that each is given."""

EVENTS = {"restore": ("come", "resume")}
"""The events that a script triggers."""

ARGUMENTS = "element, trigger, props, server, upload, watch"
"""What Gradio gives to the script of a `gr.HTML`."""


def template(name: str) -> str:
    """The HTML template that goes with a script."""
    return (ASSETS / f"{name}.html").read_text("utf-8")


def on_load(name: str, **constants: Any) -> str:
    """The `js_on_load` that runs a shared script with these constants."""
    assert set(constants) == set(SCRIPTS[name]), f"{name} takes {SCRIPTS[name]}"
    call = f"studioScripts.{name}({ARGUMENTS}, {json.dumps(constants)});"
    # Gradio looks for the names of events in this text.
    return f"{call} // {json.dumps(EVENTS[name])}" if name in EVENTS else call


def shared() -> str:
    """The script that defines `studioScripts`, to be run before any component is drawn."""
    functions = "".join(
        f"{name}({ARGUMENTS}, {{{', '.join(constants)}}}) {{\n"
        f"{(ASSETS / f'{name}.js').read_text('utf-8')}}},\n"
        for name, constants in SCRIPTS.items()
    )
    return f"window.studioScripts = {{\n{functions}}};\n"
