"""TODO"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from html import escape

import gradio as gr

import tooltips as words
from core.errors import StudioError
from core.params import Request
from core.results import Cancelled, Event, Failed, Progress
from web import markup
from web.handlers import Studio, Update, watch

REFRESH_S = 0.2
"""The page hears of progress within one stage at most this often."""


class JobControls:
    """The main button, Stop, and the line that says how far it is.

    Attributes:
        locked: further buttons that must not be pressed while a job runs.
        reader: where text appears while it is written.
    """

    def __init__(self, mode: str, able: bool = True) -> None:
        self.mode = mode
        self.locked: list[gr.Button] = []
        self.reader: gr.Textbox | None = None
        with gr.Column(elem_classes="console", min_width=0):
            with gr.Row(elem_classes="actions"):
                self.run = gr.Button(
                    words.BUTTONS.get(mode, words.MODES[mode]),
                    variant="primary",
                    interactive=able,
                    elem_id=f"{mode}-run",
                )
                self.stop = gr.Button(
                    words.STOP, variant="stop", interactive=False, elem_id=f"{mode}-stop"
                )
            self.status = gr.HTML(markup.status("idle", words.READY), elem_id=f"{mode}-status")
            self.said = gr.HTML("", elem_id=f"{mode}-said", elem_classes="said")

    def nothing_yet(self, title: str = words.NOTHING_YET) -> gr.HTML:
        """What stands where the answer will be."""
        tip = escape(words.NOTHING_YET_TIPS[self.mode])
        return gr.HTML(
            f"<p class='title'>{title}</p><p>{tip}</p>",
            elem_classes="empty-shelf",
            elem_id=f"{self.mode}-empty",
        )

    def parts(self) -> list[gr.blocks.Block]:
        """Everything that a job may change."""
        return [self.run, self.stop, self.status, self.said, *self.locked]

    def running(self, on: bool) -> Update:
        """Lock what must not be pressed twice, and the other way round."""
        return {
            **dict.fromkeys((self.run, *self.locked), gr.update(interactive=not on)),
            self.stop: gr.update(interactive=on, value=words.STOP),
        }

    def follow(
        self,
        studio: Studio,
        ask: Callable[[], Request],
        visitor: str,
        end: Callable[[Event], Update],
    ) -> Iterator[Update]:
        """Watch one job from the first click to its ending, which `end` shows.

        Blocks nowhere, least in `finally`.
        """
        yield {
            **self.running(True),
            self.status: markup.status("running", words.STARTING),
            self.said: words.STARTING,
        }
        heard, stage = 0.0, ""
        with closing(watch(studio, ask, visitor)) as events:
            for event in events:
                now = time.monotonic()
                if not isinstance(event, Progress):
                    yield {**self.running(False), **self._ended(event, end)}
                elif event.stage != stage:
                    heard, stage = now, event.stage
                    yield {**self._heard(event), self.said: words.stage(stage)}
                elif now - heard >= REFRESH_S:
                    heard = now
                    yield self._heard(event)

    def _heard(self, event: Progress) -> Update:
        told = {self.status: markup.progress(event)}
        return {**told, self.reader: event.text} if self.reader and event.text else told

    def _ended(self, event: Event, end: Callable[[Event], Update]) -> Update:
        if isinstance(event, Cancelled):
            return {
                self.status: markup.status(
                    "stopped", words.CANCELLED, words.clock(event.elapsed_s)
                ),
                self.said: words.CANCELLED,
            }
        return self.failed(event) if isinstance(event, Failed) else end(event)

    def done(self, headline: str, *details: str, said: str = "") -> Update:
        """Something has ended well."""
        return {
            self.status: markup.status("done", headline, *details, fraction=1.0),
            self.said: escape(f"{headline}. {said}".strip()),
        }

    def failed(self, trouble: StudioError | Failed) -> Update:
        """Something could not be done."""
        markup.toast(trouble)
        return {
            self.status: markup.status("failed", trouble.message, trouble.action),
            self.said: "",  # the toast is announced already
        }
