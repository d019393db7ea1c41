"""The start and Stop buttons of a tab, and the status of its running job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from html import escape
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.params import Request
from core.results import Cancelled, Failed, Progress
from web import markup
from web.handlers import Studio, Update

REFRESH_S = 0.2
"""Shortest time between two updates of the status within one stage."""


class JobControls:
    """The start button, Stop, the status line, and an announcement for screen readers.

    Attributes:
        locked: further buttons to disable while a job runs.
        live_text: the text box that shows text while it is being written.
    """

    def __init__(self, mode: str, enabled: bool = True) -> None:
        self.mode = mode
        self.locked: list[gr.Button] = []
        self.live_text: gr.Textbox | None = None
        with gr.Column(elem_classes="job-controls", min_width=0):
            with gr.Row(elem_classes="actions"):
                self.run = gr.Button(
                    tooltips.BUTTONS.get(mode, tooltips.MODES[mode]),
                    variant="primary",
                    interactive=enabled,
                    elem_id=f"{mode}-run",
                )
                self.stop = gr.Button(
                    tooltips.STOP, variant="stop", interactive=False, elem_id=f"{mode}-stop"
                )
            self.status = gr.HTML(markup.status("idle", tooltips.READY), elem_id=f"{mode}-status")
            self.announcement = gr.HTML("", elem_id=f"{mode}-said", elem_classes="announcement")

    def empty_state(self, title: str = tooltips.NO_TAKES) -> gr.HTML:
        """The placeholder shown before the first result."""
        text = escape(tooltips.GETTING_STARTED[self.mode])
        return gr.HTML(
            f"<p class='title'>{title}</p><p>{text}</p>",
            elem_classes="empty-state",
            elem_id=f"{self.mode}-empty",
        )

    def outputs(self) -> list[gr.blocks.Block]:
        """The components that a job may change."""
        return [self.run, self.stop, self.status, self.announcement, *self.locked]

    def running(self, on: bool) -> Update:
        """Enable Stop and disable the start buttons, or the reverse."""
        return {
            **dict.fromkeys((self.run, *self.locked), gr.update(interactive=not on)),
            self.stop: gr.update(interactive=on, value=tooltips.STOP),
        }

    def follow(
        self, studio: Studio, request: Request, visitor: str, end: Callable[[Any], Update]
    ) -> Iterator[Update]:
        """Run `request` and show its progress until it ends.

        Never blocks in `finally`: Gradio closes generators on its event loop.

        Args:
            end: shows the result, which is a Take, Draft, Idea or ExportedFiles.
        """
        yield {
            **self.running(True),
            self.status: markup.status("running", tooltips.STARTING),
            self.announcement: tooltips.STARTING,
        }
        shown_at, stage = 0.0, ""
        try:
            with closing(studio.run(request, visitor)) as events:
                for event in events:
                    now = time.monotonic()
                    if not isinstance(event, Progress):
                        yield {**self.running(False), **self._ended(event, end)}
                    elif event.stage != stage:
                        shown_at, stage = now, event.stage
                        yield {
                            **self._progress(event),
                            self.announcement: tooltips.stage_label(stage),
                        }
                    elif now - shown_at >= REFRESH_S:
                        shown_at = now
                        yield self._progress(event)
        except Exception as error:  # noqa: BLE001 - no exception may reach Gradio
            yield self.failed(Failed.from_error(error))

    def stopping(self) -> Any:
        """The Stop button after it was pressed."""
        return gr.update(interactive=False, value=tooltips.STOPPING)

    def _progress(self, event: Progress) -> Update:
        update: Update = {self.status: markup.progress(event)}
        if self.live_text and event.text:
            update[self.live_text] = event.text
        return update

    def _ended(self, event: Any, end: Callable[[Any], Update]) -> Update:
        if isinstance(event, Cancelled):
            return {
                self.status: markup.status(
                    "stopped", tooltips.CANCELLED, tooltips.elapsed(event.elapsed_s)
                ),
                self.announcement: tooltips.CANCELLED,
            }
        return self.failed(event) if isinstance(event, Failed) else end(event)

    def done(self, headline: str, *details: str, announcement: str = "") -> Update:
        """Show that a job has succeeded."""
        return {
            self.status: markup.status("done", headline, *details, fraction=1.0),
            self.announcement: escape(f"{headline}. {announcement}".strip()),
        }

    def failed(self, error: StudioError | Failed) -> Update:
        """Show why a job failed or was not started, and enable the start buttons."""
        return {**self.running(False), **self.show_error(error)}

    def show_error(self, error: StudioError | Failed) -> Update:
        """Show an error in the status line and as a toast."""
        markup.toast(error)
        return {
            self.status: markup.status("failed", error.message, error.action),
            self.announcement: "",  # screen readers announce the toast
        }
