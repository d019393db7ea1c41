"""The control for one parameter, made from its declaration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import tooltips
from core.params import PLANNER, AdapterRef, Param
from core.requests import TRACK_EDITS
from core.results import ModelInfo

MODEL_DEFAULTS: dict[str, str] = {
    "inference_steps": "steps",
    "guidance_scale": "guidance",
    "shift": "shift",
}
"""Parameters that start at the model's own value, and its field in `ModelInfo`."""

GUIDANCE = ("guidance_scale", "cfg_interval_start", "cfg_interval_end", "use_adg")
"""Parameters without effect in a model that takes no guidance."""

COMPOSING = ("lm_cfg_scale", "lm_negative_prompt")
"""Planner parameters without effect where it analyses a song instead of composing one."""

NO_VOCALS = "no-vocals"
"""Class of a choice of vocals whose first option the page's script disables."""

DRAFT_STEPS, BEST_STEPS = 16, 50
"""Steps of the quality choices beside the model's own number. 50 is the authors' number for SFT."""


def starting_value(param: Param, info: ModelInfo) -> Any:
    """What a control shows at first: the model's own value where there is one."""
    if param.name in MODEL_DEFAULTS:
        return min(max(getattr(info, MODEL_DEFAULTS[param.name]), param.low), param.high)
    if param.required and param.type is str:
        return ""
    if param.type is AdapterRef:
        return []
    if param.name == "duration_s":
        return min(param.default, info.longest_s)
    return True if param.name == "instrumental" and not info.sings else param.default


def no_effect(mode: str, param: Param, info: ModelInfo) -> str:
    """Why a parameter has no effect in this mode with this model; empty if it has one."""
    if param.name in GUIDANCE and not info.takes_guidance:
        return tooltips.NO_GUIDANCE.format(model=info.title)
    if param.name == "fast_preview" and not info.takes_guidance:
        return tooltips.NO_PREVIEW.format(model=info.title)
    if param.name in COMPOSING and mode != "generate":
        return tooltips.NOT_WHILE_ANALYSING
    return info.no_planner if param.group == PLANNER and not info.planner else ""


def widget(param: Param, mode: str, info: ModelInfo) -> gr.components.Component:
    """The control for one parameter."""
    start, reason = starting_value(param, info), no_effect(mode, param, info)
    common: dict[str, Any] = {
        "label": tooltips.label(param),
        "elem_id": f"{mode}-{param.name}",
    }
    if param.type is Path:
        return gr.File(file_count="single", height=96, elem_classes="file", **common)
    common["info"] = _help(mode, param, start)
    if reason and reason != info.no_planner:  # a missing planner is explained once, above
        common["info"] = reason
    common["interactive"] = not reason
    if param.name == "instrumental" and not info.sings:
        # One choice, not the control: what a file with lyrics restores can be changed back.
        common["info"] = tooltips.NO_VOCALS.format(model=info.title)
        common["elem_classes"] = NO_VOCALS
    if options := _options(param, info):
        radio = param.type is bool or len(options) <= 3
        value = "" if start is None else start
        return (gr.Radio if radio else gr.Dropdown)(options, value=value, **common)
    if param.type is bool:
        return gr.Checkbox(value=start, **common)
    if param.type is str:
        return gr.Textbox(
            value=start,
            lines=param.lines,
            max_lines=max(param.lines, 16),
            placeholder=tooltips.PLACEHOLDERS.get(param.name),
            **common,
        )
    if start is None:
        # Not gr.Number: opening its accordion turns an empty one into 0 (Gradio 6.31).
        return gr.Textbox(
            value="",
            placeholder=tooltips.PLACEHOLDERS.get(param.name),
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
            elem_classes="digits",
            **common,
        )
    assert param.low is not None
    assert param.high is not None
    high = min(param.high, info.longest_s) if param.name == "duration_s" else param.high
    return gr.Slider(param.low, high, value=start, step=param.step, **common)


def _help(mode: str, param: Param, start: Any) -> str:
    """The help text, with the range only where the control does not show it."""
    optional_switch = param.type is bool and param.optional
    if start is None and not optional_switch:
        return tooltips.help_text(mode, param)
    return tooltips.description(mode, param)


def is_offered(param: Param | None, value: Any, info: ModelInfo) -> bool:
    """Whether the model can do what this choice of a parameter asks for."""
    return param is None or param.name != "kind" or value not in TRACK_EDITS or info.edits_tracks


def _options(param: Param, info: ModelInfo) -> list[tuple[str, Any]]:
    """(label, value) of each choice; empty for a parameter without choices."""
    if param.type is bool and param.optional:
        values: Sequence[Any] = ("", True, False)
    elif param.type is bool and param.name in tooltips.CHOICES:
        values = (False, True)
    else:
        values = [value for value in param.choices if is_offered(param, value, info)]
    options = [(tooltips.choice_label(param.name, value), value) for value in values]
    if param.name in tooltips.LANGUAGES:
        options.sort(key=lambda option: (option[0] != tooltips.AUTO, option[0]))
    return options


def valid_value(param: Param, value: Any, info: ModelInfo) -> bool:
    """Whether a control can show `value`, which came from the browser's storage."""
    if options := _options(param, info):
        return any(value == known and type(value) is type(known) for _, known in options)
    if param.type is bool:
        return isinstance(value, bool)
    if param.type is AdapterRef:
        return isinstance(value, list) and all(isinstance(row, Mapping) for row in value)
    if isinstance(value, str):  # parameters that are automatic when empty hold digits as text
        return len(value) <= (param.max_length or 40)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return param.low is not None and param.high is not None and param.low <= value <= param.high


def quality_choices(info: ModelInfo) -> list[tuple[str, int]]:
    """(label, steps) of the quality choices, fewest steps first.

    A model with guidance built in was trained for one number of steps: it has no choices.
    """
    if not info.takes_guidance:
        return []
    steps = {"draft": DRAFT_STEPS, "standard": info.steps, "best": BEST_STEPS}
    return [
        (tooltips.QUALITY_CHOICE.format(name=tooltips.QUALITIES[name], steps=count), count)
        for name, count in steps.items()
        if name == "standard" or (count < info.steps if name == "draft" else count > info.steps)
    ]
