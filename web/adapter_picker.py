"""The adapters of a form: upload, check at once, set the strength of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.params import MAX_ADAPTER_STRENGTH, AdapterRef, Param
from web import scripts, summaries
from web.handlers import WORK, Studio, Update, serve_file, uploaded_path

CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names for the configuration of an adapter, and for its weights."""

Rows = Sequence[Mapping[str, Any]]
"""One adapter each: file, config, strength, name, message."""


class AdapterPicker:
    """A box to upload adapters, and a row with a strength slider for each.

    The component's value is the rows.
    """

    def __init__(self, param: Param, mode: str) -> None:
        step = next(k.step for k in AdapterRef.params() if k.name == "strength")
        text = {
            **tooltips.ADAPTER_ROW,
            "help": tooltips.description(mode, param),
            "max": MAX_ADAPTER_STRENGTH,
            "step": step,
        }
        with gr.Column(elem_classes=["upload", "adapters"], min_width=0):
            self.files = gr.File(
                file_count="multiple",
                height=96,
                label=tooltips.label(param),
                elem_classes="file",
                elem_id=f"{mode}-{param.name}-file",
            )
            self.box = gr.HTML(
                [],
                html_template=scripts.template("adapter_picker"),
                js_on_load=scripts.on_load("adapter_picker", text=text),
                apply_default_css=False,
                elem_id=f"{mode}-{param.name}",
                **self._props(),
            )

    def wire(self, studio: Studio) -> None:
        """Check adapters as soon as they are uploaded."""

        def add(uploads: Any, rows: list[dict[str, Any]] | None) -> Iterator[Update]:
            yield {self.box: gr.update(**self._props("reading", tooltips.READING_ADAPTERS))}
            try:
                adapters = _paired([uploaded_path(file) for file in uploads or ()])
            except StudioError as error:
                yield {self.files: None, self.box: self.show(rows or [], "refused", error)}
            else:
                yield {self.files: None, self.box: self.check(studio, adapters, rows or [])}

        parts = [self.files, self.box]
        self.files.upload(add, parts, parts, **{**WORK, "trigger_mode": "multiple"})

    def check(self, studio: Studio, adapters: Sequence[AdapterRef], rows: Rows = ()) -> Any:
        """Add the adapters that fit to `rows`; show the last error of the others."""
        kept, problem, notes = list(rows), None, []
        for adapter in adapters:
            try:
                info = studio.check_adapter(adapter)
            except StudioError as error:
                problem = error
                continue
            row = {"name": info.name, "message": summaries.adapter_summary(info)}
            kept.append({**adapter.model_dump(mode="json"), **row})
            notes += info.notes
        if problem or not adapters:
            return self.show(kept, "refused", problem or tooltips.CONFIG_ALONE, notes)
        return self.show(kept, "ready", tooltips.ADDED.format(name=kept[-1]["name"]), notes)

    def load(self, studio: Studio, used: Sequence[Mapping[str, Any]]) -> Any:
        """Show the adapters of a take, after copying their files to the page's cache."""
        found = []
        try:
            for each in used:
                file = Path(each["file"])
                config = file.with_name(CONFIG)
                found.append(
                    AdapterRef(
                        file=serve_file(self.box, file)[0],
                        config=serve_file(self.box, config)[0] if config.is_file() else None,
                        strength=each["strength"],
                    )
                )
        except StudioError as error:
            return self.show([], "refused", error)
        return self.check(studio, found) if found else self.show([])

    def show(
        self,
        rows: Rows,
        state: str = "ready",
        message: str | StudioError = "",
        notes: Sequence[str] = (),
    ) -> Any:
        """Show these rows with a message below them."""
        return gr.update(value=list(rows), **self._props(state, str(message), notes))

    def _props(
        self, state: str = "empty", message: str = "", notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """All properties that are drawn, as for an `UploadPreview`."""
        return {"state": state, "message": message, "notes": list(notes)}


def _paired(files: Sequence[Path | None]) -> list[AdapterRef]:
    """The adapters among uploaded files, each with the configuration uploaded for it, if any."""
    configs = [file for file in files if file and file.suffix == ".json"]
    weights = [file for file in files if file and file.suffix != ".json"]
    configured = weights if len(weights) == 1 else [f for f in weights if f.name == PEFT_WEIGHTS]
    config = configs[0] if len(configs) == len(configured) == 1 else None
    return [
        AdapterRef(file=file, config=config if file in configured else None) for file in weights
    ]


def requested_adapters(rows: Any) -> list[Any]:
    """The adapters that the rows of an `AdapterPicker` request.

    Raises:
        StudioError: a file was not uploaded to this page.
    """
    mark = {"meta": {"_type": "gradio.FileData"}}
    return [
        {
            "file": uploaded_path({"path": row.get("file"), **mark}),
            "config": uploaded_path({"path": row["config"], **mark}) if row.get("config") else None,
            "strength": row.get("strength"),
        }
        if isinstance(row, dict)
        else row
        for row in rows or ()
    ]
