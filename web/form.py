"""The form of a request: its controls, when each is shown, and the request they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips
from core.errors import StudioError
from core.params import ADAPTERS, PLANNER, SONG, AdapterRef, Param, Request
from core.requests import REGION_EDITS
from core.results import ModelInfo
from web.adapter_picker import AdapterPicker, requested_adapters
from web.handlers import PRIVATE, Update, uploaded_path
from web.upload_preview import UploadPreview
from web.widgets import COMPOSING, no_effect, quality_choices, starting_value, valid_value, widget

ORDER = (
    *("brief", "structure", "language", "tone", "rhyme", "lines"),
    *("source", "reference", "before_s", "after_s", "kind", "track", "tracks"),
    *("repaint_mode", "repaint_strength"),
    *("source_prompt", "source_lyrics", "prompt", "instrumental", "lyrics"),
    *("duration_s", "follow", "strength", "noise", "n_max", "n_min", "n_avg"),
)
"""The order of a form's main parameters."""

LAST = {"generate": ("reference",)}
"""Parameters that come after all others in a mode."""

REGION = ("start_s", "end_s")
"""Parameters that are selected on the waveform of the song."""

WITHOUT_CONTROL = (*REGION, "repair")
"""Parameters without a control of their own. A draft is repaired by its own button."""

Values = Mapping[str, Any]

CONTROLLERS = ("instrumental", "source", "reference", "kind", "repaint_mode")
"""Parameters that decide which others are shown."""


def _is_morph(form: Values) -> bool:
    return form["kind"] == "morph"


def _has_region(form: Values) -> bool:
    return form["kind"] in REGION_EDITS


SHOWN_IF: dict[str, Callable[[Values], bool]] = {
    "lyrics": lambda form: not form["instrumental"],
    "cover.strength": lambda form: bool(form["source"]),
    "cover.noise": lambda form: bool(form["source"]),
    "cover.duration_s": lambda form: bool(form["reference"]) and not form["source"],
    "cover.follow": lambda form: bool(form["source"]),
    "edit.track": lambda form: form["kind"] in ("add_track", "extract"),
    "edit.tracks": lambda form: form["kind"] == "accompany",
    "edit.start_s": _has_region,
    "edit.end_s": _has_region,
    "edit.repaint_mode": _has_region,
    "edit.repaint_strength": lambda form: _has_region(form) and form["repaint_mode"] == "balanced",
    "edit.fast_preview": lambda form: not _is_morph(form),
    **dict.fromkeys(
        ("edit.source_prompt", "edit.source_lyrics", "edit.n_max", "edit.n_min", "edit.n_avg"),
        _is_morph,
    ),
}
"""When a control is shown, by field or `mode.field`. A hidden one is left out of the request."""


def is_shown(mode: str, name: str, form: Values) -> bool:
    """Whether the control of a parameter is shown while the form holds these values."""
    rule = SHOWN_IF.get(f"{mode}.{name}") or SHOWN_IF.get(name)
    return rule is None or rule(form)


def unused(mode: str, form: Values) -> set[str]:
    """The parameters without effect while the form holds these values."""
    hidden = {name for name in form if not is_shown(mode, name, form)}
    return hidden if mode == "generate" else hidden | set(COMPOSING)


class Form:
    """All controls of one request.

    Attributes:
        fields: the control of each parameter, by name.
        adapter_picker: the adapters, where the request has any.
        previews: the preview of each uploaded file, by the name of its parameter.
        inputs: the components that a request is read from, by name. Controls without effect are
            not among them. "region" is the region selected on the song's waveform.
        start_values: what the controls show at first, by name.
        has_region: whether a region is selected on the song's waveform.
    """

    def __init__(
        self,
        request: type[Request],
        info: ModelInfo,
        draw_below: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Draw the form.

        Args:
            draw_below: called with the name of each main parameter after its control.
        """
        self.request, self.info, self.mode = request, info, request.mode
        self.params = {k.name: k for k in request.params()}
        self.start_values = {name: starting_value(k, info) for name, k in self.params.items()}
        self.has_region = REGION[0] in self.params
        self.fields: dict[str, gr.components.Component] = {}
        self.previews: dict[str, UploadPreview] = {}
        self.adapter_picker: AdapterPicker | None = None
        self._draw_main(draw_below)
        self._draw_advanced()
        self.inputs = {
            name: self.fields[name]
            for name, param in self.params.items()
            if name in self.fields and not no_effect(self.mode, param, info)
        }
        if self.has_region:
            self.inputs["region"] = self.previews["source"].box
        at_first = {
            name: None if self.params[name].type is Path else value
            for name, value in self.start_values.items()
        }
        for name, field in self.fields.items():
            field.visible = is_shown(self.mode, name, at_first)

    def _draw_main(self, draw_below: Callable[[str], None]) -> None:
        main = [
            name
            for name, param in self.params.items()
            if param.group == SONG and name not in WITHOUT_CONTROL
        ]
        last = LAST.get(self.mode, ())
        for name in sorted(main, key=lambda name: (name in last, ORDER.index(name))):
            self._draw(name)
            draw_below(name)

    def _draw(self, name: str) -> None:
        param = self.params[name]
        if param.type is not Path:
            self.fields[name] = widget(param, self.mode, self.info)
            return
        with gr.Column(elem_classes="upload", min_width=0):
            self.fields[name] = widget(param, self.mode, self.info)
            self.previews[name] = UploadPreview(
                f"{self.mode}-{name}-look",
                tooltips.description(self.mode, param),
                has_region=self.has_region and name == "source",
            )

    def _draw_advanced(self) -> None:
        groups = dict.fromkeys(k.group for k in self.params.values() if k.group != SONG)
        alone = len(groups) == 1
        title = next(iter(groups)) if alone else tooltips.ADVANCED
        with gr.Accordion(title, open=False, elem_classes="advanced"):
            for group in groups:
                if not alone:
                    gr.HTML(f"<h2>{escape(group)}</h2>")
                self._draw_group(group)

    def _draw_group(self, group: str) -> None:
        if group == PLANNER and not self.info.planner:
            gr.HTML(f"<p>{escape(self.info.no_planner)}</p>", elem_classes="why")
        if group == ADAPTERS:
            self.adapter_picker = AdapterPicker(self.params["adapters"], self.mode)
            self.fields["adapters"] = self.adapter_picker.box
            return
        with gr.Row(elem_classes="params"):
            for name, param in self.params.items():
                if param.group != group or name in WITHOUT_CONTROL:
                    continue
                if name == "inference_steps":
                    self._draw_steps(param)
                else:
                    self.fields[name] = widget(param, self.mode, self.info)

    def _draw_steps(self, param: Param) -> None:
        """Steps with a choice of qualities beside it, which only moves the slider."""
        choices = quality_choices(self.info)
        quality = None
        if choices:
            quality = gr.Radio(
                choices,
                value=self.start_values[param.name],
                label=tooltips.QUALITY,
                info=tooltips.QUALITY_HELP,
                elem_id=f"{self.mode}-quality",
            )
        steps = self.fields[param.name] = widget(param, self.mode, self.info)
        if quality is not None:
            known = [count for _, count in choices]
            in_browser = {**PRIVATE, "queue": False}
            quality.input(None, [quality], [steps], js="(steps) => steps", **in_browser)
            steps.change(
                None,
                [steps],
                [quality],
                js=f"(steps) => {known}.includes(steps) ? steps : null",
                **in_browser,
            )

    def read(self, values: Iterable[Any]) -> dict[str, Any]:
        """The parameters that the form requests, without hidden controls and empty boxes.

        Args:
            values: of `inputs`, in their order.

        Raises:
            StudioError: a file was not uploaded to this page, or is still being read.
        """
        form = dict(zip(self.inputs, values, strict=True))
        region = form.pop("region", None)
        given = {}
        for name, value in form.items():
            param = self.params[name]
            if not is_shown(self.mode, name, form):
                continue
            if param.type is Path:
                value = uploaded_path(value)
                if value is None and param.required:
                    continue
            if param.type is AdapterRef:
                value = requested_adapters(value)
            given[name] = None if param.optional and value == "" else value
        if self.has_region and "source" in given and is_shown(self.mode, REGION[0], form):
            if not region:
                raise StudioError("still-reading", name=given["source"].name)
            given |= dict(zip(REGION, region, strict=True))
        return given

    def read_request(self, values: Iterable[Any], **more: Any) -> Request:
        """The checked request that the form makes. Raises `StudioError`, as `read` does."""
        return self.request.of({**self.read(values), **more})

    def visibility(self, values: Values) -> Update:
        """Show and hide the controls that depend on others, for a form with these values."""
        form = {**dict.fromkeys(CONTROLLERS), **values}
        update: Update = {
            field: gr.update(visible=is_shown(self.mode, name, form))
            for name, field in self.fields.items()
            if f"{self.mode}.{name}" in SHOWN_IF or name in SHOWN_IF
        }
        if self.has_region:
            update[self.previews["source"].box] = gr.update(whole=not _has_region(form))
        return update

    def outputs(self) -> list[gr.components.Component]:
        """All components that filling in the form changes."""
        return [*self.fields.values(), *(preview.box for preview in self.previews.values())]

    def controllers(self) -> dict[str, gr.components.Component]:
        """The controls that decide which others are shown, by name."""
        return {name: self.fields[name] for name in CONTROLLERS if name in self.fields}

    def stored_values(self, stored: Values) -> dict[str, Any]:
        """Those of `stored` that the controls can show; files and the region are left out.

        Args:
            stored: values by the names of `inputs`, from the browser's session storage.
        """
        return {
            name: stored[name]
            for name in self.inputs
            if name in stored
            and name in self.params
            and self.params[name].type is not Path
            and valid_value(self.params[name], stored[name], self.info)
        }
