"""Export, mastering and stems of the selected take, and the files they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.params import Request
from core.requests import EXPORTS
from core.results import ExportedFiles, ModelInfo
from web import markup, summaries
from web.handlers import WORK, Update, find_take
from web.job_controls import JobControls
from web.sessions import Sessions
from web.widgets import widget


class ExportPanel:
    """A button with its parameters for each request of `EXPORTS`, and the files it made.

    Attributes:
        buttons: those that are enabled, by mode.
    """

    def __init__(self, mode: str, info: ModelInfo) -> None:
        self.buttons: dict[str, gr.Button] = {}
        self.fields: dict[str, dict[str, gr.components.Component]] = {}
        self.files: dict[str, gr.File] = {}
        self.messages: dict[str, gr.HTML] = {}
        self._drawn: dict[str, gr.components.Component] = {}
        with gr.Accordion(tooltips.EXPORT_PANEL, open=False, elem_classes="exports"):
            for name, request in EXPORTS.items():
                self._draw(mode, name, request, info)

    def _draw(self, mode: str, name: str, request: type[Request], info: ModelInfo) -> None:
        """One export: what it does, its parameters, its button, or why it is not available.

        A parameter that an earlier export has is shared: the file format is chosen once.
        """
        reason, badge = (info.no_stems, info.stems) if name == "stems" else ("", "")
        text = [f"<h3>{tooltips.EXPORTS[name]}</h3><p>{tooltips.EXPORT_HELP[name]}</p>"]
        text += [f"<p class='badge'>{escape(badge)}</p>"] if badge else []
        text += [f"<p>{markup.with_commands(reason)}</p>"] if reason else []
        with gr.Column(elem_classes="export", min_width=0):
            gr.HTML("".join(text))
            params = [param for param in request.params() if param.name != "source"]
            with gr.Row(elem_classes="params"):
                for param in params:
                    if param.name not in self._drawn:
                        field = self._drawn[param.name] = widget(param, name, info)
                        field.elem_id = f"{mode}-{name}-{param.name}"
            self.fields[name] = {param.name: self._drawn[param.name] for param in params}
            button = gr.Button(
                tooltips.EXPORTS[name], size="md", interactive=not reason, elem_id=f"{mode}-{name}"
            )
            if not reason:
                self.buttons[name] = button
            self.files[name] = gr.File(
                label=tooltips.FILES,
                file_count="multiple",
                interactive=False,
                visible=False,
                elem_classes="exported-files",
                elem_id=f"{mode}-{name}-made",
            )
            self.messages[name] = gr.HTML("", visible=False, elem_id=f"{mode}-{name}-told")

    def wire(self, sessions: Sessions, controls: JobControls, takes: gr.Radio) -> None:
        """Let the buttons export the take selected in `takes`, with progress in `controls`."""
        for name, button in self.buttons.items():
            button.click(
                self._handler(name, sessions, controls),
                [takes, *self.fields[name].values()],
                controls.outputs(),
                **WORK,
            )

    def outputs(self) -> list[gr.blocks.Block]:
        """The components that a finished export changes."""
        return [*self.files.values(), *self.messages.values()]

    def clear(self) -> Update:
        """Remove the files of the take that was selected before."""
        return dict.fromkeys(self.outputs(), gr.update(value=None, visible=False))

    def _handler(
        self, name: str, sessions: Sessions, controls: JobControls
    ) -> Callable[..., Iterator[Update]]:
        def end(files: ExportedFiles) -> Update:
            text = summaries.export_summary(files)
            return {
                **controls.done(tooltips.DONE, tooltips.EXPORTS[name], announcement=text),
                self.files[name]: gr.update(value=list(files.paths), visible=True),
                self.messages[name]: gr.update(value=f"<p>{escape(text)}</p>", visible=bool(text)),
            }

        def handle(caller: gr.Request, take_id: str, *values: Any) -> Iterator[Update]:
            visitor = sessions.visitor(caller)
            try:
                take = find_take(sessions.studio, visitor, take_id)
                given = dict(zip(self.fields[name], values, strict=True))
                request = EXPORTS[name].of({"source": Path(take.path), **given})
            except StudioError as error:
                yield controls.failed(error)
                return
            yield from controls.follow(sessions.studio, request, visitor, end)

        return handle
