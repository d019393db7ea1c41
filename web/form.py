"""The form of a request: controls made from its knobs, and when each of them is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips as words
from core.errors import StudioError
from core.params import ADAPTERS, PLANNER, SONG, Knob, Request, Worn
from core.results import Card
from web.adapter_picker import Rack, worn
from web.handlers import Update, brought
from web.upload_preview import Picture

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


def deaf(mode: str, knob: Knob, card: Card) -> str:
    """Why a knob has nothing to turn here, in a sentence; empty where it works."""
    if knob.name in GUIDANCE and not card.takes_guidance:
        return words.NO_GUIDANCE.format(model=card.title)
    if knob.name in COMPOSING and mode != "generate":
        return words.LISTENS
    return card.no_planner if knob.group == PLANNER and not card.planner else ""


def starting_value(knob: Knob, card: Card) -> Any:
    """What a control shows at first: the model's own value where there is one."""
    if knob.name in CARD:
        return min(max(getattr(card, CARD[knob.name]), knob.low), knob.high)
    if knob.required and knob.type is str:
        return ""
    if knob.type is Worn:
        return []
    if knob.name == "duration_s":
        return min(knob.default, card.longest_s)
    return knob.default


def widget(knob: Knob, mode: str, card: Card) -> gr.components.Component:
    """The control for one knob, from its declaration alone."""
    start, reason = starting_value(knob, card), deaf(mode, knob, card)
    common = {"label": words.label(knob), "elem_id": f"{mode}-{knob.name}"}
    if knob.type is Path:
        return gr.File(file_count="single", height=96, elem_classes="file", **common)
    # Where a slider shows its ends, or a box takes any words, the range would be said twice.
    info = words.tip(mode, knob) if start is None else words.does(mode, knob)
    if knob.type is bool and knob.optional:
        info = words.does(mode, knob)
    # Why there is no planner is said once, above its knobs.
    common["info"] = reason if reason and reason != card.no_planner else info
    common["interactive"] = not reason
    if knob.type is bool and knob.optional:
        options = [(words.AUTO, ""), *_choices(knob, (True, False))]
        return gr.Radio(options, value="" if start is None else start, **common)
    if knob.type is bool and knob.name in words.CHOICES:
        return gr.Radio(_choices(knob, (False, True)), value=start, **common)
    if knob.type is bool:
        return gr.Checkbox(value=start, **common)
    if knob.choices:
        make = gr.Radio if len(knob.choices) <= 3 else gr.Dropdown
        return make(_choices(knob, knob.choices), value=start, **common)
    if knob.type is str:
        return gr.Textbox(
            value=start,
            lines=knob.lines,
            max_lines=max(knob.lines, 16),
            placeholder=words.PLACEHOLDERS.get(knob.name),
            **common,
        )
    high = min(knob.high, card.longest_s) if knob.name == "duration_s" else knob.high
    if start is None:
        # Not gr.Number: unfolding its accordion turns an empty one into 0 (Gradio 6.31).
        return gr.Textbox(
            value="",
            placeholder=words.PLACEHOLDERS.get(knob.name),
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
            elem_classes="digits",
            **common,
        )
    return gr.Slider(knob.low, high, value=start, step=knob.step, **common)


def _choices(knob: Knob, values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    named = [(words.choice(knob.name, value), value) for value in values]
    if knob.name in words.LANGUAGES:
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
        card: Card,
        beside: Callable[[str], None] = lambda field: None,
    ) -> None:
        """Draw it. `beside` is called with the name of each field on the form after it is drawn."""
        self.request, self.card, self.mode = request, card, request.mode
        self.knobs = {k.name: k for k in request.knobs()}
        self.at_rest = {name: starting_value(k, card) for name, k in self.knobs.items()}
        self.fields: dict[str, gr.components.Component] = {}
        self.pictures: dict[str, Picture] = {}
        self.rack: Rack | None = None
        own = [n for n, k in self.knobs.items() if k.group == SONG and n not in HELD]
        last = LAST.get(self.mode, ())
        for name in sorted(own, key=lambda n: (n in last, ORDER.index(n))):
            self._draw(name)
            beside(name)
        groups = dict.fromkeys(k.group for k in self.knobs.values() if k.group != SONG)
        fold = words.ADVANCED if len(groups) > 1 else next(iter(groups))
        with gr.Accordion(fold, open=False, elem_classes="advanced"):
            for group in groups:
                if len(groups) > 1:
                    gr.HTML(f"<h2>{escape(group)}</h2>")
                if group == PLANNER and not card.planner:
                    gr.HTML(f"<p>{escape(card.no_planner)}</p>", elem_classes="why")
                if group == ADAPTERS:
                    self.rack = Rack(self.knobs["adapters"], self.mode)
                    self.fields["adapters"] = self.rack.box
                    continue
                with gr.Row(elem_classes="knobs"):
                    for name in (n for n, k in self.knobs.items() if k.group == group):
                        if name in HELD:
                            continue
                        self.fields[name] = widget(self.knobs[name], self.mode, card)
        self.inputs = {
            name: self.fields[name]
            for name, knob in self.knobs.items()
            if name in self.fields and not deaf(self.mode, knob, card)
        }
        self.picks = REGION[0] in self.knobs
        if self.picks:
            self.inputs["region"] = self.pictures["source"].box
        at_first = {name: None if k.type is Path else k.default for name, k in self.knobs.items()}
        for name, field in self.fields.items():
            field.visible = shown(self.mode, name, at_first)

    def _draw(self, name: str) -> None:
        knob = self.knobs[name]
        if knob.type is not Path:
            self.fields[name] = widget(knob, self.mode, self.card)
            return
        with gr.Column(elem_classes="brought", min_width=0):
            self.fields[name] = widget(knob, self.mode, self.card)
            picks = name == "source" and REGION[0] in self.knobs
            tip = words.does(self.mode, knob)
            self.pictures[name] = Picture(f"{self.mode}-{name}-look", tip, picks)

    def given(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """What the form asks for, by knob: neither what is hidden nor an empty box.

        Raises:
            StudioError: a file that did not come through this page, or is still being read.
        """
        form = dict(zip(self.inputs, values, strict=True))
        region = form.pop("region", None)
        asked = {}
        for name, value in form.items():
            knob = self.knobs[name]
            if not shown(self.mode, name, form):
                continue
            if knob.type is Path:
                value = brought(value)
                if value is None and knob.required:
                    continue
            if knob.type is Worn:
                value = worn(value)
            asked[name] = None if knob.optional and value == "" else value
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
