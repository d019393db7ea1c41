"""The half of a tab that answers: what is pressed, how far it is, what has come of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr

import theme
import tooltips as words
from core.results import ModelInfo, Take
from web import markup, summaries
from web.ab_compare import AbCompare
from web.export_panel import ExportPanel
from web.form import unasked
from web.handlers import Studio, Update
from web.job_controls import JobControls
from web.restore import link_of

WAVEFORM = gr.WaveformOptions(
    waveform_color="#8A8A8A",
    waveform_progress_color=theme.INK,
    trim_region_color="#5A5A5A",
)


class ResultPanel(JobControls):
    """The console of a song with its latest take and the shelf of the others.

    Attributes:
        at_rest: what the form shows at first; captions leave it out.
        sends: the buttons that take the piece to another tab, by mode.
    """

    def __init__(self, mode: str, at_rest: dict[str, Any], card: ModelInfo) -> None:
        super().__init__(mode)
        self.at_rest = at_rest
        self.empty = self.nothing_yet()
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
                self.share = gr.HTML(
                    None,
                    html_template=(theme.ASSETS / "share.html").read_text("utf-8"),
                    js_on_load=f"const say = {json.dumps(words.SHARING)};\n"
                    + (theme.ASSETS / "share.js").read_text("utf-8"),
                    apply_default_css=False,
                    elem_id=f"{mode}-share",
                    elem_classes="share",
                    link="",
                )
                self.sends = {
                    to: gr.Button(called, size="md", elem_classes="send", elem_id=f"{mode}-to-{to}")
                    for to, called in words.SEND.items()
                }
            self.finish = ExportPanel(mode, card)
            self.shelf = gr.Radio(
                [], label=words.SHELF, elem_id=f"{mode}-shelf", elem_classes="shelf", visible=False
            )
            self.compare = AbCompare(mode, at_rest)
            self.facts = gr.HTML("", elem_id=f"{mode}-facts")

        self.locked.extend((self.again, *self.finish.buttons.values()))

    def wire(self, studio: Studio) -> None:
        """Let the buttons under the player do what they say."""
        self.finish.wire(studio, self, self.shelf)
        self.compare.wire(studio)

    def parts(self) -> list[gr.blocks.Block]:
        """Everything that a job may change."""
        mine = (self.empty, self.result, self.player, self.wav, self.settings, self.share)
        under = (*self.finish.parts(), self.shelf, *self.compare.parts(), self.facts)
        return [*super().parts(), *mine, *under]

    def show(self, take: Take) -> Update:
        """Play `take` and say all that is known of it."""
        return {
            self.empty: gr.update(visible=False),
            self.result: gr.update(visible=True),
            self.player: take.path,
            self.wav: gr.update(value=take.path),
            self.settings: gr.update(value=str(Path(take.path).with_suffix(".json"))),
            self.share: gr.update(link=link_of(take)),
            **self.finish.blank(),
            self.facts: markup.particulars(take, unasked(take.mode, take.request)),
        }

    def finished(self, take: Take, takes: Iterable[Take]) -> Update:
        """A take has come: show it, put it on the shelf among the visitor's `takes`."""
        took = words.clock(sum(take.timings_s.values()))
        takes = list(takes)
        shelf = [(summaries.caption(t, self.at_rest), t.id) for t in takes if t.mode == self.mode]
        return {
            **self.show(take),
            **self.done(words.DONE, took, said=summaries.caption(take, self.at_rest)),
            self.shelf: gr.update(choices=shelf, value=take.id, visible=True),
            **self.compare.offer(takes),
        }
