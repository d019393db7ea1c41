"""The adapters of a form: brought, judged at once, each with its strength."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import theme
import tooltips as words
from core.errors import StudioError
from core.params import MAX_ADAPTER_STRENGTH, AdapterRef, Param
from web.handlers import WORK, Studio, Update, brought, serve

CONFIG, PEFT = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT calls the settings of an adapter, and the adapter itself."""


class AdapterPicker:
    """The adapters that were brought: any number, each with its strength, and a box to bring more.

    The component's value are rows: where the file and its settings lie, how strong, what is told.
    """

    def __init__(self, param: Param, mode: str) -> None:
        step = next(k.step for k in AdapterRef.params() if k.name == "strength")
        say = {
            **words.RACK,
            "tip": words.does(mode, param),
            "most": MAX_ADAPTER_STRENGTH,
            "step": step,
        }
        with gr.Column(elem_classes=["brought", "adapters"], min_width=0):
            self.files = gr.File(
                file_count="multiple",
                height=96,
                label=words.label(param),
                elem_classes="file",
                elem_id=f"{mode}-{param.name}-file",
            )
            self.box = gr.HTML(
                [],
                html_template=(theme.ASSETS / "rack.html").read_text("utf-8"),
                js_on_load=f"const say = {json.dumps(say)};\n"
                + (theme.ASSETS / "rack.js").read_text("utf-8"),
                apply_default_css=False,
                elem_id=f"{mode}-{param.name}",
                **self._props(),
            )

    def wire(self, studio: Studio) -> None:
        """Let what is brought be judged at once."""

        def add(given: Any, rows: list[dict[str, Any]] | None) -> Iterator[Update]:
            yield {self.box: gr.update(**self._props("reading", words.READING_ADAPTERS))}
            try:
                worn = _paired([brought(file) for file in given or ()])
            except StudioError as error:
                yield {self.files: None, self.box: self.show(rows or [], "refused", error)}
            else:
                yield {self.files: None, self.box: self.judged(studio, worn, rows or [])}

        parts = [self.files, self.box]
        self.files.upload(add, parts, parts, **{**WORK, "trigger_mode": "multiple"})

    def judged(
        self, studio: Studio, worn: Sequence[AdapterRef], rows: Sequence[Mapping[str, Any]] = ()
    ) -> Any:
        """What fits is added to `rows`; what does not is told, the last of it."""
        kept, trouble, notes = list(rows), None, []
        for each in worn:
            try:
                seen = studio.fit(each)
            except StudioError as error:
                trouble = error
                continue
            kept.append(
                {**each.model_dump(mode="json"), "name": seen.name, "told": words.fitted(seen)}
            )
            notes += seen.notes
        if trouble or not worn:
            return self.show(kept, "refused", trouble or words.SETTINGS_ALONE, notes)
        return self.show(kept, "ready", words.ADDED.format(name=kept[-1]["name"]), notes)

    def again(self, studio: Studio, worn: Sequence[Mapping[str, Any]]) -> Any:
        """The adapters of a take, put among the files of this page."""
        found = []
        try:
            for each in worn:
                file = Path(each["file"])
                beside = file.with_name(CONFIG)
                found.append(
                    AdapterRef(
                        file=serve(self.box, file)[0],
                        config=serve(self.box, beside)[0] if beside.is_file() else None,
                        strength=each["strength"],
                    )
                )
        except StudioError as error:
            return self.show([], "refused", error)
        return self.judged(studio, found) if found else self.show([])

    def show(
        self,
        rows: Sequence[Mapping[str, Any]],
        state: str = "ready",
        told: str | StudioError = "",
        notes: Sequence[str] = (),
    ) -> Any:
        """These rows, and what is said below them."""
        return gr.update(value=list(rows), **self._props(state, str(told), notes))

    def _props(
        self, state: str = "empty", told: str = "", notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """All that is drawn, as for a `UploadPreview`."""
        return {"state": state, "told": told, "notes": list(notes)}


def _paired(files: Sequence[Path | None]) -> list[AdapterRef]:
    """Adapters among files that were chosen together, each with the settings that are its own."""
    settings = [file for file in files if file and file.suffix == ".json"]
    weights = [file for file in files if file and file.suffix != ".json"]
    own = weights if len(weights) == 1 else [f for f in weights if f.name == PEFT]
    config = settings[0] if len(settings) == len(own) == 1 else None
    return [AdapterRef(file=file, config=config if file in own else None) for file in weights]


def worn(rows: Any) -> list[Any]:
    """What the rows of a `AdapterPicker` ask for.

    Raises:
        StudioError: for a file that did not come through this page.
    """
    mark = {"meta": {"_type": "gradio.FileData"}}
    return [
        {
            "file": brought({"path": row.get("file"), **mark}),
            "config": brought({"path": row["config"], **mark}) if row.get("config") else None,
            "strength": row.get("strength"),
        }
        if isinstance(row, dict)
        else row
        for row in rows or ()
    ]
