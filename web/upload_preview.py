"""TODO"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

import theme
import tooltips as words
from core.errors import StudioError
from core.results import AudioInfo


class UploadPreview:
    """What is known of a file that was brought: waveform, length, what was mended, or the trouble.

    In a mode with a region two sliders pick it; the component's value is then [from, to] in
    seconds.
    """

    def __init__(self, elem_id: str, tip: str, pick: bool) -> None:
        self.tip, self.pick = tip, pick
        said = {"say": words.PICTURE, "empty": self._props(told=tip)}
        self.box = gr.HTML(
            None,
            html_template=(theme.ASSETS / "picture.html").read_text("utf-8"),
            js_on_load="".join(f"const {n} = {json.dumps(what)};\n" for n, what in said.items())
            + (theme.ASSETS / "picture.js").read_text("utf-8"),
            apply_default_css=False,
            elem_id=elem_id,
            **self._props(told=tip),
        )

    def blank(self) -> Any:
        """Nothing was brought, or it was taken away again."""
        return gr.update(value=None, **self._props(told=self.tip))

    def reading(self, name: str) -> Any:
        return gr.update(
            value=None, **self._props("reading", told=words.READING_FILE.format(name=name))
        )

    def refused(self, trouble: StudioError, wanted: Any = None) -> Any:
        """There is no file, or none that can be used. `wanted` is the region of one to come."""
        return gr.update(
            value=wanted, **self._props("refused", told=trouble.message, notes=[trouble.action])
        )

    def show(self, look: AudioInfo, url: str, wanted: Any = None) -> Any:
        """The file is there, with the region that is `wanted`: [from, to], to None for its end.

        Otherwise the middle third is picked: something to hear, and to move.
        """
        ends = [round(look.seconds * part, 1) for part in (1 / 3, 2 / 3)]
        if wanted and wanted[0] < look.seconds:
            ends = [wanted[0], min(wanted[1] or look.seconds, look.seconds)]
        return gr.update(
            value=ends if self.pick else None,
            **self._props(
                "ready",
                told=words.seen(look),
                notes=list(look.notes),
                peaks=list(look.peaks),
                seconds=look.seconds,
                name=look.name,
                url=url.lstrip("/"),  # from the page's own folder, wherever a proxy puts it
            ),
        )

    def _props(self, state: str = "empty", **known: Any) -> dict[str, Any]:
        """All that is drawn. All: to one on a tab not opened yet, Gradio keeps only what comes."""
        nothing = {"told": "", "notes": [], "peaks": [], "seconds": 0, "name": "", "url": ""}
        return {"pick": self.pick, "state": state, **nothing, **known}
