"""Knobs and requests: a value a musician may turn is declared once, and checked in words.

A request is a frozen pydantic model. Each field declares its label, range, step, group and unit
with `param`; widgets, checks, API names, command-line flags and the metadata in a take are made
from that declaration.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from core.errors import StudioError

SONG, DIFFUSION, SCHEDULE, PLANNER, MUSIC = "Song", "Diffusion", "Schedule", "Planner", "Music"


ADAPTERS = "Adapters"
"""Groups of knobs, in the order a form shows them. The first is the form itself."""


MAX_ADAPTER_RANK = 256
"""Of an adapter's matrices."""

MAX_ADAPTER_STRENGTH = 1.5
"""Strengths of an adapter run from 0 to this; 1 is how it was trained."""


def _no_switches(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a switch where a number belongs")
    return value


def _a_name(value: Any) -> Any:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("names no file")
    return value


Integer = Annotated[int, BeforeValidator(_no_switches)]


Number = Annotated[float, BeforeValidator(_no_switches)]


FilePath = Annotated[Path, BeforeValidator(_a_name)]
"""A file somebody brought: a path on this machine. Whether it holds music is seen when it is read."""


def param(
    default: Any,
    label: str,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    *,
    group: str = SONG,
    unit: str = "",
    lines: int = 1,
    max_length: int | None = None,
) -> Any:
    """Declare one value a musician may turn. `...` as default makes it required.

    Args:
        low, high: the range, both ends included.
        step: what one press of an arrow key changes.
        unit: shown after the label and in messages, such as "s" or "bpm".
        lines: height of a text box in lines.
        max_length: characters.
    """
    return Field(
        default,
        title=label,
        ge=low,
        le=high,
        max_length=max_length,
        json_schema_extra={"group": group, "step": step, "unit": unit, "lines": lines},
    )


@dataclass(frozen=True)
class Param:
    """A field of a request with everything that was declared about it.

    Where `type` is `AdapterRef`, the value is any number of them, as a tuple.
    """

    name: str
    label: str
    type: type
    optional: bool
    required: bool
    default: Any
    low: float | None
    high: float | None
    step: float | None
    max_length: int | None
    choices: tuple[Any, ...]
    group: str
    unit: str
    lines: int


class Request(BaseModel):
    """What every mode shares: frozen, strict about names, built with `of`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    mode: ClassVar[str]

    @classmethod
    def of(cls, given: Any) -> Self:
        """Check `given` and make a request, or raise the `StudioError` that names the culprit."""
        try:
            return cls.model_validate(dict(given) if isinstance(given, Mapping) else given)
        except ValidationError as error:
            raise _as_studio_error(cls, error) from error

    @classmethod
    def params(cls) -> tuple[Param, ...]:
        """The fields as knobs: required first, then the mode's own, then what it shares."""
        own = inspect.get_annotations(cls)
        found = [_knob(name, info) for name, info in cls.model_fields.items()]
        own = {k.name for k in found if k.name in own and k.group == SONG}
        return tuple(sorted(found, key=lambda k: (not k.required, k.name not in own)))

    def non_defaults(self) -> dict[str, Any]:
        """Only the values that differ from their defaults: a take's caption."""
        return {
            k.name: getattr(self, k.name)
            for k in self.params()
            if k.required or getattr(self, k.name) != k.default
        }


class AdapterRef(Request):
    """An adapter and how strongly it plays; also read from "FILE", "FILE:0.8" or a path.

    A colon parts the two only where a number follows it to the end. `config` is the
    adapter_config.json of a file that lies elsewhere than beside it.
    """

    mode: ClassVar[str] = "adapters"
    file: FilePath = param(..., "Adapter")
    strength: Number = param(1.0, "Strength", 0, MAX_ADAPTER_STRENGTH, 0.05)
    config: FilePath | None = param(None, "Settings of the adapter")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, Path):
            return {"file": given}
        if not isinstance(given, str):
            return given
        parts = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", given, re.DOTALL)
        return {"file": parts[1], "strength": float(parts[2])} if parts else {"file": given}


def with_file_names(request: type[Request], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `request` as JSON has them, with names of files in place of where they lie."""
    told = dict(given)
    for param in request.params():
        if param.type is Path and told.get(param.name):
            told[param.name] = Path(told[param.name]).name
        elif param.type is AdapterRef and param.name in told:
            told[param.name] = [with_file_names(AdapterRef, worn) for worn in told[param.name]]
    return told


def _knob(name: str, info: FieldInfo) -> Param:
    base, optional, choices = _plain_type(info.annotation)
    extra = info.json_schema_extra
    limits = {}
    for rule in info.metadata:
        for limit in ("ge", "le", "max_length"):
            if hasattr(rule, limit):
                limits[limit] = getattr(rule, limit)
    return Param(
        name=name,
        label=info.title or name,
        type=base,
        optional=optional,
        required=info.is_required(),
        default=None if info.is_required() else info.default,
        low=limits.get("ge"),
        high=limits.get("le"),
        step=extra["step"],
        max_length=limits.get("max_length"),
        choices=choices,
        group=extra["group"],
        unit=extra["unit"],
        lines=extra["lines"],
    )


def _plain_type(annotation: Any) -> tuple[type, bool, tuple[Any, ...]]:
    """Reduce an annotation to (type, may be None, choices)."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        base, _, choices = _plain_type(inner[0])
        return base, len(inner) < len(get_args(annotation)), choices
    if get_origin(annotation) is Literal:
        return str, False, get_args(annotation)
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], False, ()
    return annotation, False, ()


def _as_studio_error(request: type[Request], error: ValidationError) -> StudioError:
    """Turn pydantic's first complaint into one sentence and one action."""
    first = error.errors()[0]
    if request is not AdapterRef and len(first["loc"]) > 2:  # adapters, which of them, what of it
        request, first = AdapterRef, {**first, "loc": first["loc"][2:]}
    if isinstance(cause := first.get("ctx", {}).get("error"), StudioError):
        return cause
    name = str(first["loc"][0]) if first["loc"] else request.mode
    known = {k.name: k for k in request.params()}
    if first["type"] == "extra_forbidden" or name not in known:
        return StudioError(
            "unknown-field", name=name[:80], mode=request.mode, known=", ".join(known)
        )
    k = known[name]
    missing = first["type"] == "missing" and request is not AdapterRef
    if missing and known[name].type is Path:
        return StudioError("source-needed", label=known[name].label)
    if missing:
        return StudioError("prompt-empty" if name == "prompt" else "brief-empty")
    problem, fix = _in_words(k, first)
    return StudioError("value-out-of-range", label=k.label, problem=problem, fix=fix)


def _in_words(k: Param, complaint: dict[str, Any]) -> tuple[str, str]:
    """What is wrong with a knob's value, and what to do: two clauses without a full stop."""
    given = complaint["input"]
    unit = f" {k.unit}" if k.unit else ""
    if complaint["type"] == "string_too_long":
        return (
            f"has {len(given):,} characters, and {k.max_length:,} fit",
            f"Shorten {k.label} by {len(given) - k.max_length:,} characters",
        )
    switched = isinstance(given, bool) and k.type is not bool
    if k.type is AdapterRef:
        return "holds what is not a file", f"Choose files for {k.label}"
    if k.type is Path:
        return "is not a file", f"Choose a file for {k.label}"
    if complaint["type"] == "value_error" and not switched:
        return str(complaint["ctx"]["error"]), f"Set {k.label} anew"
    shown = repr(given) if isinstance(given, str) else str(given)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    if k.choices:
        options = ", ".join(c or "auto" for c in k.choices[:8])
        more = " and so on" if len(k.choices) > 8 else ""
        return f"cannot be {shown}", f"Choose one of {options}{more}"
    if k.type is bool:
        return f"is a switch, not {shown}", f"Turn {k.label} on or off"
    if k.low is not None:
        word = "whole number" if k.type is int else "number"
        span = f"{k.low:,.10g} to {k.high:,.10g}{unit}"
        if complaint["type"] in ("greater_than_equal", "less_than_equal"):
            return f"runs from {span}, not {shown}", f"Set {k.label} to a value from {span}"
        return f"is a {word} from {span}, not {shown}", f"Set {k.label} to a {word} from {span}"
    return f"is text, not {shown}", f"Write {k.label} as text"
