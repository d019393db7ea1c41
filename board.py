"""The half of a tab that answers: what is pressed, how far it is, the take and its shelf."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import theme
import tooltips as words
from errors import StudioError
from forms import unasked
from song import Cancelled, Failed, Take

WAVEFORM = gr.WaveformOptions(
    waveform_color="#8A8A8A",
    waveform_progress_color=theme.INK,
    trim_region_color="#5A5A5A",
)

Update = dict[Any, Any]  # by component; what is not in it stays as it is


class Board:
    """Buttons, status, the latest take and the shelf of one tab.

    Attributes:
        at_rest: what the form shows at first; captions leave it out.
        sends: the buttons that take the piece to another tab, by mode.
        locked: further buttons that must not be pressed while a job runs.
    """

    def __init__(self, mode: str, at_rest: dict[str, Any]) -> None:
        self.mode, self.at_rest = mode, at_rest
        self.locked: list[gr.Button] = []
        with gr.Column(elem_classes="console", min_width=0):
            with gr.Row(elem_classes="actions"):
                self.run = gr.Button(words.MODES[mode], variant="primary", elem_id=f"{mode}-run")
                self.stop = gr.Button(
                    words.STOP, variant="stop", interactive=False, elem_id=f"{mode}-stop"
                )
            self.status = gr.HTML(theme.status("idle", words.READY), elem_id=f"{mode}-status")
            self.said = gr.HTML("", elem_id=f"{mode}-said", elem_classes="said")
        self.empty = gr.HTML(
            f"<p class='title'>{words.NOTHING_YET}</p><p>{escape(words.NOTHING_YET_TIPS[mode])}</p>",
            elem_classes="empty-shelf",
            elem_id=f"{mode}-empty",
        )
        with gr.Column(visible=False, elem_classes="result", min_width=0) as self.result:
            self.player = gr.Audio(
                label=words.PLAYER,
                type="filepath",
                interactive=False,
                buttons=[],
                waveform_options=WAVEFORM,
                elem_id=f"{mode}-player",
            )
            with gr.Row(elem_classes="takings"):
                self.again = gr.Button(words.RETAKE, size="md", elem_id=f"{mode}-again")
                self.reuse = gr.Button(words.REUSE, size="md", elem_id=f"{mode}-reuse")
                self.wav = gr.DownloadButton(words.SAVE_WAV, size="md", elem_id=f"{mode}-wav")
                self.settings = gr.DownloadButton(
                    words.SAVE_JSON, size="md", elem_id=f"{mode}-json"
                )
            with gr.Row(elem_classes="takings send"):
                self.sends = {
                    to: gr.Button(called, size="md", elem_id=f"{mode}-to-{to}")
                    for to, called in words.SEND.items()
                }
            self.shelf = gr.Radio(
                [], label=words.SHELF, elem_id=f"{mode}-shelf", elem_classes="shelf", visible=False
            )
            self.facts = gr.HTML("", elem_id=f"{mode}-facts")

    def parts(self) -> list[gr.blocks.Block]:
        """Everything that a job may change."""
        return [
            *(self.run, self.stop, self.status, self.said, self.empty, self.result, self.player),
            *(self.again, self.wav, self.settings, self.shelf, self.facts, *self.locked),
        ]

    def running(self, on: bool) -> Update:
        """Lock what must not be pressed twice, and the other way round."""
        return {
            **dict.fromkeys((self.run, self.again, *self.locked), gr.update(interactive=not on)),
            self.stop: gr.update(interactive=on, value=words.STOP),
        }

    def show(self, take: Take) -> Update:
        """Play `take` and say all that is known of it."""
        return {
            self.empty: gr.update(visible=False),
            self.result: gr.update(visible=True),
            self.player: take.path,
            self.wav: gr.update(value=take.path),
            self.settings: gr.update(value=str(Path(take.path).with_suffix(".json"))),
            self.facts: theme.particulars(take, unasked(take.mode, take.request)),
        }

    def finished(self, take: Take, takes: Iterable[Take]) -> Update:
        """A take has come: show it, put it on the shelf among the visitor's `takes`."""
        took = words.clock(sum(take.timings_s.values()))
        shelf = [(words.caption(t, self.at_rest), t.id) for t in takes if t.mode == self.mode]
        return {
            **self.show(take),
            **self.done(words.DONE, took, said=words.caption(take, self.at_rest)),
            self.shelf: gr.update(choices=shelf, value=take.id, visible=True),
        }

    def done(self, headline: str, *details: str, said: str = "") -> Update:
        """Something has ended well."""
        return {
            self.status: theme.status("done", headline, *details, fraction=1.0),
            self.said: escape(f"{headline}. {said}".strip()),
        }

    def stopped(self, event: Cancelled) -> Update:
        return {
            self.status: theme.status("stopped", words.CANCELLED, words.clock(event.elapsed_s)),
            self.said: words.CANCELLED,
        }

    def failed(self, trouble: StudioError | Failed) -> Update:
        toast(trouble)
        return {
            self.status: theme.status("failed", trouble.message, trouble.action),
            self.said: "",  # the toast is announced already
        }


def toast(trouble: StudioError | Failed) -> None:
    """Say what went wrong, and what helps, in a corner of the page."""
    gr.Warning(escape(f"{trouble.message} {trouble.action}"), title=words.FAILED, duration=8)
