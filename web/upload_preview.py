"""The preview of an uploaded audio file: waveform, length, notes, and the region to edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.results import AudioInfo, Failed
from web import scripts, summaries


class UploadPreview:
    """Waveform, length and notes of an uploaded file, or why it cannot be used.

    With `has_region`, two sliders select a region; the component's value is then [from, to] in
    seconds.
    """

    def __init__(self, elem_id: str, help_text: str, has_region: bool) -> None:
        self.help_text, self.has_region = help_text, has_region
        self.box = gr.HTML(
            None,
            html_template=scripts.template("upload_preview"),
            js_on_load=scripts.on_load(
                "upload_preview", text=tooltips.PREVIEW, empty=self._props(message=help_text)
            ),
            apply_default_css=False,
            elem_id=elem_id,
            **self._props(message=help_text),
        )

    def clear(self) -> Any:
        """Show the help text: there is no file."""
        return gr.update(value=None, **self._props(message=self.help_text))

    def reading(self, name: str) -> Any:
        """Show that the file is being read."""
        message = tooltips.READING_FILE.format(name=name)
        return gr.update(value=None, **self._props("reading", message=message))

    def refused(
        self, error: StudioError | Failed, region: Sequence[float | None] | None = None
    ) -> Any:
        """Show why there is no usable file. `region` is for the file that will be chosen next."""
        return gr.update(
            value=region, **self._props("refused", message=error.message, notes=[error.action])
        )

    def show(self, info: AudioInfo, url: str, region: Sequence[float | None] | None = None) -> Any:
        """Show a file.

        Args:
            region: [from, to] in seconds to select, `to` None for the end of the file. Without one
                the middle third is selected, so that there is something to hear and to move.
        """
        ends = [round(info.seconds * part, 1) for part in (1 / 3, 2 / 3)]
        if region and region[0] is not None and region[0] < info.seconds:
            ends = [region[0], min(region[1] or info.seconds, info.seconds)]
        return gr.update(
            value=ends if self.has_region else None,
            **self._props(
                "ready",
                message=summaries.audio_summary(info),
                notes=list(info.notes),
                peaks=list(info.peaks),
                seconds=info.seconds,
                name=info.name,
                url=url.lstrip("/"),  # relative to the page, as behind a proxy with a path prefix
            ),
        )

    def _props(self, state: str = "empty", **known: Any) -> dict[str, Any]:
        """All properties that are drawn. On a tab that was never opened Gradio keeps only those
        that an update names."""
        blank = {"message": "", "notes": [], "peaks": [], "seconds": 0, "name": "", "url": ""}
        return {"has_region": self.has_region, "state": state, **blank, **known}
