"""The output side of a tab: job controls, the latest take, and what can be done with takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr

import theme
import tooltips
from core.results import ModelInfo, Take
from web import markup, scripts, summaries
from web.ab_compare import AbCompare
from web.export_panel import ExportPanel
from web.form import unused
from web.handlers import Update
from web.job_controls import JobControls
from web.lyric_lines import LyricLines
from web.restore import link_to
from web.sessions import Sessions

WAVEFORM = gr.WaveformOptions(
    waveform_color="#8A8A8A",
    waveform_progress_color=theme.INK,
    trim_region_color="#5A5A5A",
)


class ResultPanel(JobControls):
    """Job controls, the selected take, the list of takes, and their exports and comparison.

    Attributes:
        start_values: what the form shows at first; captions leave these values out.
        send: the buttons that send the take to another tab, by mode.
    """

    def __init__(self, mode: str, start_values: dict[str, Any], info: ModelInfo) -> None:
        super().__init__(mode)
        self.start_values = start_values
        self.empty = self.empty_state()
        with gr.Column(visible=False, elem_classes="result", min_width=0) as self.result:
            self.player = gr.Audio(
                label=tooltips.PLAYER,
                type="filepath",
                interactive=False,
                buttons=[],
                waveform_options=WAVEFORM,
                elem_id=f"{mode}-player",
            )
            self.lines = LyricLines(mode, self.player)
            self._draw_actions()
            self.exports = ExportPanel(mode, info)
            self.takes = gr.Radio(
                [],
                label=tooltips.TAKES,
                elem_id=f"{mode}-shelf",
                elem_classes="takes",
                visible=False,
            )
            self.compare = AbCompare(mode, start_values)
            self.details = gr.HTML("", elem_id=f"{mode}-facts")
        self.locked.extend((self.retake, *self.exports.buttons.values()))

    def _draw_actions(self) -> None:
        mode = self.mode
        with gr.Row(elem_classes="take-actions"):
            self.retake = gr.Button(tooltips.RETAKE, size="md", elem_id=f"{mode}-again")
            self.reuse = gr.Button(tooltips.REUSE, size="md", elem_id=f"{mode}-reuse")
            self.wav = gr.DownloadButton(tooltips.SAVE_WAV, size="md", elem_id=f"{mode}-wav")
            self.json = gr.DownloadButton(tooltips.SAVE_JSON, size="md", elem_id=f"{mode}-json")
            self.lines.draw_buttons(mode)
            self.share = gr.HTML(
                None,
                html_template=scripts.template("share"),
                js_on_load=scripts.on_load("share", text=tooltips.SHARE),
                apply_default_css=False,
                elem_id=f"{mode}-share",
                elem_classes="share",
                link="",
            )
            self.send = {
                to: gr.Button(text, size="md", elem_classes="send", elem_id=f"{mode}-to-{to}")
                for to, text in tooltips.SEND.items()
            }

    def wire(self, sessions: Sessions) -> None:
        """Connect the export and comparison buttons."""
        self.exports.wire(sessions, self, self.takes)
        self.compare.wire(sessions)

    def outputs(self) -> list[gr.blocks.Block]:
        """The components that a job may change."""
        above = (self.empty, self.result, self.player, self.wav, self.json, self.share)
        above = (*above, *self.lines.outputs())
        below = (*self.exports.outputs(), self.takes, *self.compare.outputs(), self.details)
        return [*super().outputs(), *above, *below]

    def show(self, take: Take) -> Update:
        """Select `take`: player, downloads, link and details."""
        return {
            self.empty: gr.update(visible=False),
            self.result: gr.update(visible=True),
            self.player: take.path,
            self.wav: gr.update(value=take.path),
            self.json: gr.update(value=str(Path(take.path).with_suffix(".json"))),
            self.share: gr.update(link=link_to(take)),
            **self.lines.show(take),
            **self.exports.clear(),
            self.details: markup.take_details(take, unused(take.mode, take.request)),
        }

    def list_takes(self, takes: Iterable[Take]) -> Update:
        """List the visitor's takes and select the newest of this tab; nothing if it has none."""
        takes = list(takes)
        mine = [take for take in takes if take.mode == self.mode]
        if not mine:
            return {}
        choices = [(summaries.caption(take, self.start_values), take.id) for take in mine]
        return {
            **self.show(mine[0]),
            self.takes: gr.update(choices=choices, value=mine[0].id, visible=True),
            **self.compare.offer(takes),
        }

    def finished(self, take: Take, takes: Iterable[Take]) -> Update:
        """Show a take that has just been made, and list it among the visitor's `takes`."""
        duration = tooltips.elapsed(sum(take.timings_s.values()))
        caption = summaries.caption(take, self.start_values)
        return {
            **self.list_takes(takes),
            **self.show(take),
            **self.done(tooltips.DONE, duration, announcement=caption),
        }
