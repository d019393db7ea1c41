"""The form of a request: controls made from its knobs, and when each of them is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips as words
from core.errors import StudioError
from core.params import ADAPTERS, PLANNER, SONG, AdapterRef, Param, Request
from core.results import ModelInfo
from web.adapter_picker import AdapterPicker, worn
from web.handlers import Update, brought
from web.upload_preview import UploadPreview

ORDER = (
    *("brief", "structure", "language", "tone", "rhyme", "lines"),
    *("source", "reference", "before_s", "after_s", "kind", "repaint_mode", "repaint_strength"),
    *("source_prompt", "source_lyrics", "prompt", "instrumental", "lyrics"),
    *("duration_s", "strength", "noise", "n_max", "n_min", "n_avg"),
)
"""How the knobs of a song follow each other on the form."""


LAST = {"generate": ("reference",)}
"""What stands below all that, where it is a sideline."""


CARD: dict[str, str] = {
    "inference_steps": "steps",
    "guidance_scale": "guidance",
    "shift": "shift",
}
"""Knobs that start at the model's own value, and where the card says it."""


GUIDANCE = ("guidance_scale", "cfg_interval_start", "cfg_interval_end", "use_adg")
"""Knobs that steer nothing in a model that takes no guidance."""


COMPOSING = ("lm_cfg_scale", "lm_negative_prompt")
"""Knobs of the planner that mean nothing where it listens instead of composing."""


REGION = ("start_s", "end_s")
"""Knobs that are picked on the waveform of the song."""


HELD = (*REGION, "repair")
"""Knobs without a control of their own. A draft is repaired by its own button."""


Values = Mapping[str, Any]


STEERING = ("instrumental", "source", "reference", "kind", "repaint_mode")
"""Knobs that decide which others are shown."""


SHOWN: dict[str, Callable[[Values], bool]] = {
    "lyrics": lambda form: not form["instrumental"],
    "cover.strength": lambda form: bool(form["source"]),
    "cover.noise": lambda form: bool(form["source"]),
    "cover.duration_s": lambda form: bool(form["reference"]) and not form["source"],
    "edit.start_s": lambda form: form["kind"] == "repaint",
    "edit.end_s": lambda form: form["kind"] == "repaint",
    "edit.repaint_mode": lambda form: form["kind"] == "repaint",
    "edit.repaint_strength": lambda form: (
        form["kind"] == "repaint" and form["repaint_mode"] == "balanced"
    ),
    **{
        f"edit.{name}": lambda form: form["kind"] == "morph"
        for name in ("source_prompt", "source_lyrics", "n_max", "n_min", "n_avg")
    },
}
"""When a control is there, by field or `mode.field`. What is hidden is not asked for."""


def shown(mode: str, name: str, form: Values) -> bool:
    """Whether the control of knob `name` is there while the form holds these values."""
    rule = SHOWN.get(f"{mode}.{name}") or SHOWN.get(name)
    return rule is None or rule(form)


def unasked(mode: str, form: Values) -> set[str]:
    """The knobs that mean nothing while the form holds these values."""
    hidden = {name for name in form if not shown(mode, name, form)}
    return hidden if mode == "generate" else hidden | set(COMPOSING)


def deaf(mode: str, param: Param, card: ModelInfo) -> str:
    """Why a knob has nothing to turn here, in a sentence; empty where it works."""
    if param.name in GUIDANCE and not card.takes_guidance:
        return words.NO_GUIDANCE.format(model=card.title)
    if param.name in COMPOSING and mode != "generate":
        return words.LISTENS
    return card.no_planner if param.group == PLANNER and not card.planner else ""


def starting_value(param: Param, card: ModelInfo) -> Any:
    """What a control shows at first: the model's own value where there is one."""
    if param.name in CARD:
        return min(max(getattr(card, CARD[param.name]), param.low), param.high)
    if param.required and param.type is str:
        return ""
    if param.type is AdapterRef:
        return []
    if param.name == "duration_s":
        return min(param.default, card.longest_s)
    return param.default


def widget(param: Param, mode: str, card: ModelInfo) -> gr.components.Component:
    """The control for one knob, from its declaration alone."""
    start, reason = starting_value(param, card), deaf(mode, param, card)
    common = {"label": words.label(param), "elem_id": f"{mode}-{param.name}"}
    if param.type is Path:
        return gr.File(file_count="single", height=96, elem_classes="file", **common)
    # Where a slider shows its ends, or a box takes any words, the range would be said twice.
    info = words.tip(mode, param) if start is None else words.does(mode, param)
    if param.type is bool and param.optional:
        info = words.does(mode, param)
    # Why there is no planner is said once, above its knobs.
    common["info"] = reason if reason and reason != card.no_planner else info
    common["interactive"] = not reason
    if param.type is bool and param.optional:
        options = [(words.AUTO, ""), *_choices(param, (True, False))]
        return gr.Radio(options, value="" if start is None else start, **common)
    if param.type is bool and param.name in words.CHOICES:
        return gr.Radio(_choices(param, (False, True)), value=start, **common)
    if param.type is bool:
        return gr.Checkbox(value=start, **common)
    if param.choices:
        make = gr.Radio if len(param.choices) <= 3 else gr.Dropdown
        return make(_choices(param, param.choices), value=start, **common)
    if param.type is str:
        return gr.Textbox(
            value=start,
            lines=param.lines,
            max_lines=max(param.lines, 16),
            placeholder=words.PLACEHOLDERS.get(param.name),
            **common,
        )
    high = min(param.high, card.longest_s) if param.name == "duration_s" else param.high
    if start is None:
        # Not gr.Number: unfolding its accordion turns an empty one into 0 (Gradio 6.31).
        return gr.Textbox(
            value="",
            placeholder=words.PLACEHOLDERS.get(param.name),
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
            elem_classes="digits",
            **common,
        )
    return gr.Slider(param.low, high, value=start, step=param.step, **common)


def _choices(param: Param, values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    named = [(words.choice(param.name, value), value) for value in values]
    if param.name in words.LANGUAGES:
        named.sort(key=lambda pair: (pair[0] != words.AUTO, pair[0]))
    return named


class Form:
    """All controls of one request, in the order of its form.

    Attributes:
        fields: the control of each knob, by name.
        rack: the adapters, where the request has any.
        pictures: what is known of each file, by the name of its knob.
        inputs: what a run is asked with; a control that has nothing to turn is not in it.
    """

    def __init__(
        self,
        request: type[Request],
        card: ModelInfo,
        beside: Callable[[str], None] = lambda field: None,
    ) -> None:
        """Draw it. `beside` is called with the name of each field on the form after it is drawn."""
        self.request, self.card, self.mode = request, card, request.mode
        self.params = {k.name: k for k in request.params()}
        self.at_rest = {name: starting_value(k, card) for name, k in self.params.items()}
        self.fields: dict[str, gr.components.Component] = {}
        self.pictures: dict[str, UploadPreview] = {}
        self.rack: AdapterPicker | None = None
        own = [n for n, k in self.params.items() if k.group == SONG and n not in HELD]
        last = LAST.get(self.mode, ())
        for name in sorted(own, key=lambda n: (n in last, ORDER.index(n))):
            self._draw(name)
            beside(name)
        groups = dict.fromkeys(k.group for k in self.params.values() if k.group != SONG)
        fold = words.ADVANCED if len(groups) > 1 else next(iter(groups))
        with gr.Accordion(fold, open=False, elem_classes="advanced"):
            for group in groups:
                if len(groups) > 1:
                    gr.HTML(f"<h2>{escape(group)}</h2>")
                if group == PLANNER and not card.planner:
                    gr.HTML(f"<p>{escape(card.no_planner)}</p>", elem_classes="why")
                if group == ADAPTERS:
                    self.rack = AdapterPicker(self.params["adapters"], self.mode)
                    self.fields["adapters"] = self.rack.box
                    continue
                with gr.Row(elem_classes="knobs"):
                    for name in (n for n, k in self.params.items() if k.group == group):
                        if name in HELD:
                            continue
                        self.fields[name] = widget(self.params[name], self.mode, card)
        self.inputs = {
            name: self.fields[name]
            for name, param in self.params.items()
            if name in self.fields and not deaf(self.mode, param, card)
        }
        self.picks = REGION[0] in self.params
        if self.picks:
            self.inputs["region"] = self.pictures["source"].box
        at_first = {name: None if k.type is Path else k.default for name, k in self.params.items()}
        for name, field in self.fields.items():
            field.visible = shown(self.mode, name, at_first)

    def _draw(self, name: str) -> None:
        param = self.params[name]
        if param.type is not Path:
            self.fields[name] = widget(param, self.mode, self.card)
            return
        with gr.Column(elem_classes="brought", min_width=0):
            self.fields[name] = widget(param, self.mode, self.card)
            picks = name == "source" and REGION[0] in self.params
            tip = words.does(self.mode, param)
            self.pictures[name] = UploadPreview(f"{self.mode}-{name}-look", tip, picks)

    def given(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """What the form asks for, by knob: neither what is hidden nor an empty box.

        Raises:
            StudioError: a file that did not come through this page, or is still being read.
        """
        form = dict(zip(self.inputs, values, strict=True))
        region = form.pop("region", None)
        asked = {}
        for name, value in form.items():
            param = self.params[name]
            if not shown(self.mode, name, form):
                continue
            if param.type is Path:
                value = brought(value)
                if value is None and param.required:
                    continue
            if param.type is AdapterRef:
                value = worn(value)
            asked[name] = None if param.optional and value == "" else value
        if self.picks and "source" in asked and shown(self.mode, REGION[0], form):
            if not region:
                raise StudioError("still-reading", name=asked["source"].name)
            asked |= dict(zip(REGION, region, strict=True))
        return asked

    def visible(self, values: Values) -> Update:
        """Show and hide what the steering knobs among `values` decide about."""
        form = {**dict.fromkeys(STEERING), **values}
        update: Update = {
            field: gr.update(visible=shown(self.mode, name, form))
            for name, field in self.fields.items()
            if f"{self.mode}.{name}" in SHOWN or name in SHOWN
        }
        if self.picks:
            update[self.pictures["source"].box] = gr.update(whole=form["kind"] != "repaint")
        return update

    def parts(self) -> list[gr.components.Component]:
        """All that filling the form changes."""
        return [*self.fields.values(), *(picture.box for picture in self.pictures.values())]

    def steering(self) -> dict[str, gr.components.Component]:
        """The controls that decide about others."""
        return {name: self.fields[name] for name in STEERING if name in self.fields}
