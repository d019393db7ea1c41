"""Under the player: what is done with the take that is shown, and the files that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips as words
from core.params import Request
from core.requests import EXPORTS
from core.results import ExportedFiles, ModelInfo
from web import markup, summaries
from web.form import widget
from web.handlers import WORK, Studio, Update, take_of, visitor_of
from web.job_controls import JobControls


class ExportPanel:
    """A button with its knobs for each request of `EXPORTS`, and the files it made.

    Attributes:
        buttons: those that can be pressed, by mode.
    """

    def __init__(self, mode: str, card: ModelInfo) -> None:
        self.buttons: dict[str, gr.Button] = {}
        self.fields: dict[str, dict[str, gr.components.Component]] = {}
        self._drawn: dict[str, gr.components.Component] = {}
        self.files: dict[str, gr.File] = {}
        self.told: dict[str, gr.HTML] = {}
        with gr.Accordion(words.FINISH, open=False, elem_classes="finish"):
            for name, request in EXPORTS.items():
                self._draw(mode, name, request, card)

    def _draw(self, mode: str, name: str, request: type[Request], card: ModelInfo) -> None:
        """One way to finish: what it is, its knobs, its button, or why there is nothing to press.

        A knob that an earlier way has is that one's: the format of a file is chosen once.
        """
        why, badge = (card.no_stems, card.stems) if name == "stems" else ("", "")
        told = [f"<h3>{words.EXPORTS[name]}</h3><p>{words.FINISHED_AS[name]}</p>"]
        told += [f"<p class='badge'>{escape(badge)}</p>"] if badge else []
        told += [f"<p>{markup.with_commands(why)}</p>"] if why else []
        with gr.Column(elem_classes="way", min_width=0):
            gr.HTML("".join(told))
            params = [param for param in request.params() if param.name != "source"]
            with gr.Row(elem_classes="knobs"):
                for param in params:
                    if param.name not in self._drawn:
                        field = self._drawn[param.name] = widget(param, name, card)
                        field.elem_id = f"{mode}-{name}-{param.name}"
            self.fields[name] = {param.name: self._drawn[param.name] for param in params}
            button = gr.Button(
                words.EXPORTS[name], size="md", interactive=not why, elem_id=f"{mode}-{name}"
            )
            if not why:
                self.buttons[name] = button
            self.files[name] = gr.File(
                label=words.MADE,
                file_count="multiple",
                interactive=False,
                visible=False,
                elem_classes="made",
                elem_id=f"{mode}-{name}-made",
            )
            self.told[name] = gr.HTML("", visible=False, elem_id=f"{mode}-{name}-told")

    def wire(self, studio: Studio, board: JobControls, shelf: gr.Radio) -> None:
        """Let the buttons work on the take that is chosen on `shelf`, followed by `board`."""
        for name, button in self.buttons.items():
            button.click(
                self._does(name, studio, board),
                [shelf, *self.fields[name].values()],
                board.parts(),
                **WORK,
            )

    def parts(self) -> list[gr.blocks.Block]:
        """What a finished job changes."""
        return [*self.files.values(), *self.told.values()]

    def blank(self) -> Update:
        """Another take is shown: what was made of the last one is not of this one."""
        return dict.fromkeys(self.parts(), gr.update(value=None, visible=False))

    def _does(
        self, name: str, studio: Studio, board: JobControls
    ) -> Callable[..., Iterator[Update]]:
        def do(caller: gr.Request, chosen: str, *values: Any) -> Iterator[Update]:
            visitor = visitor_of(caller)

            def ask() -> Request:
                take = take_of(studio, visitor, chosen)
                given = dict(zip(self.fields[name], values, strict=True))
                return EXPORTS[name].of({"source": Path(take.path), **given})

            def end(made: ExportedFiles) -> Update:
                told = summaries.made(made)
                return {
                    **board.done(words.DONE, words.EXPORTS[name], said=told),
                    self.files[name]: gr.update(value=list(made.paths), visible=True),
                    self.told[name]: gr.update(value=f"<p>{escape(told)}</p>", visible=bool(told)),
                }

            yield from board.follow(studio, ask, visitor, end)

        return do
