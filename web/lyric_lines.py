"""The lyrics below the player: the line that is sung lights up, and a click on a line seeks to it."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

import theme
import tooltips
from audio.lyric_files import FORMATS
from core.results import Take
from web.handlers import QUICK, Update

SEEK = "(at) => ({__type__: 'update', playback_position: at.seconds})"
"""Moves the player, in the browser alone."""


class LyricLines:
    """The lines of the selected take's lyrics, and buttons that save their times.

    Attributes:
        files: the buttons, by file suffix.
    """

    def __init__(self, mode: str, player: gr.Audio) -> None:
        self.view = gr.HTML(
            None,
            html_template=(theme.ASSETS / "lyric_lines.html").read_text("utf-8"),
            js_on_load=f"const text = {json.dumps(tooltips.LYRIC_LINES)};\n"
            f"const player = {json.dumps(player.elem_id)};\n"
            + (theme.ASSETS / "lyric_lines.js").read_text("utf-8"),
            apply_default_css=False,
            elem_id=f"{mode}-lines",
            lines=[],
            seconds=0,
        )
        self.view.seek(None, [self.view], [player], js=SEEK, **QUICK)
        self.files: dict[str, gr.DownloadButton] = {}

    def draw_buttons(self, mode: str) -> None:
        """Draw the download buttons, in the row of the others."""
        self.files = {
            kind: gr.DownloadButton(
                kind.upper(), size="md", visible=False, elem_id=f"{mode}-{kind}"
            )
            for kind in FORMATS
        }

    def outputs(self) -> list[gr.blocks.Block]:
        """The components that another take changes."""
        return [self.view, *self.files.values()]

    def show(self, take: Take) -> Update:
        """Show the lines of `take`; nothing where they have no times."""
        song, timed = Path(take.path), bool(take.lyric_times)
        lines = [line.model_dump(exclude={"words", "confidence"}) for line in take.lyric_times]
        return {
            self.view: gr.update(lines=lines, seconds=take.duration_s),
            **{
                button: gr.update(
                    value=str(song.with_suffix(f".{kind}")) if timed else None, visible=timed
                )
                for kind, button in self.files.items()
            },
        }
