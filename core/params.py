"""Parameters and requests: each value a musician can set is declared and checked in one place.

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
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from core import text
from core.errors import StudioError

SONG, DIFFUSION, SCHEDULE, PLANNER, MUSIC = "Song", "Diffusion", "Schedule", "Planner", "Music"
ADAPTERS = "Adapters"
"""Groups of parameters, in the order a form shows them. The first is the form itself."""

MAX_ADAPTER_RANK = 256
"""The largest rank of an adapter's matrices."""

MAX_ADAPTER_STRENGTH = 3.0
"""The strength of an adapter runs from 0 to this; 1 is how it was trained. An adapter without its
alpha may need twice the strength of another."""

AUTO = ("", "auto", "automatic")
"""What stands for "decide for me", in any case, besides None."""

_STORED = {"stored": True}
"""The validation context of requests from files: their text is kept as it is."""


def is_auto(value: Any) -> bool:
    """Whether `value` is one of the words for "decide for me"."""
    return isinstance(value, str) and value.strip().lower() in AUTO


def _auto_as_none(value: Any) -> Any:
    return None if is_auto(value) else value


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a switch where a number belongs")
    return value


def _random_seed(value: Any) -> Any:
    """None for -1 and "random", which mean an automatic seed in most programs of this kind."""
    if isinstance(value, str):
        return None if value.strip().lower() in (*AUTO, "random", "-1") else value
    return None if not isinstance(value, bool) and value == -1 else value


def _tempo(value: Any) -> Any:
    """None for "auto"; the number of "120 bpm"."""
    if isinstance(value, str):
        value = re.sub(r"\s*bpm\s*$", "", value, flags=re.IGNORECASE)
    return _auto_as_none(value)


def _lower_case(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _file_name(value: Any) -> Any:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("names no file")
    return value


def _normalized(value: Any, info: ValidationInfo) -> Any:
    return text.normalize(value) if isinstance(value, str) and not info.context else value


Integer = Annotated[int, BeforeValidator(_not_a_switch)]
Number = Annotated[float, BeforeValidator(_not_a_switch)]
"""Numbers, but not booleans, which Python counts among them."""

AutoInteger = Annotated[Integer | None, BeforeValidator(_auto_as_none)]
AutoNumber = Annotated[Number | None, BeforeValidator(_auto_as_none)]
AutoSwitch = Annotated[bool | None, BeforeValidator(_auto_as_none)]
"""None, an empty text or "auto" leave the value open."""

Seed = Annotated[Integer | None, BeforeValidator(_random_seed)]
Tempo = Annotated[Integer | None, BeforeValidator(_tempo)]

Text = Annotated[str, BeforeValidator(_normalized)]
"""Text, normalised with `text.normalize` unless it comes from a file of the studio."""

LowerCase = BeforeValidator(_lower_case)
"""Accept a choice in any case."""

FilePath = Annotated[Path, BeforeValidator(_file_name)]
"""An uploaded file: a path on this computer. Whether it holds audio is checked when it is read."""


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
    """Declare one parameter. `...` as default makes it required.

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
    """The declaration of one parameter.

    Where `type` is `AdapterRef`, the value is a tuple of any number of them.
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


T = TypeVar("T")


class Request(BaseModel):
    """The base of all requests: frozen, strict about names, built with `of` or `stored`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    mode: ClassVar[str]

    @classmethod
    def of(cls, given: Any) -> Self:
        """Check what a person or a program asks for. Text is normalised (`text.normalize`).

        Raises:
            StudioError: names the first value that does not fit, and what to do about it.
        """
        return cls._validated(given, None)

    @classmethod
    def stored(cls, given: Any) -> Self:
        """Check a request from a file of the studio, whose text stays exactly as it is.

        Files written before text was normalised make their own samples again only that way.

        Raises:
            StudioError: as `of`.
        """
        return cls._validated(given, _STORED)

    @classmethod
    def _validated(cls, given: Any, context: dict[str, Any] | None) -> Self:
        given = dict(given) if isinstance(given, Mapping) else given
        try:
            return cls.model_validate(given, context=context)
        except ValidationError as error:
            raise _as_studio_error(cls, error) from error

    @classmethod
    def params(cls) -> tuple[Param, ...]:
        """All parameters: required ones first, then the mode's own, then the shared ones."""
        found = [_param_of(name, info) for name, info in cls.model_fields.items()]
        declared = inspect.get_annotations(cls)
        own = {param.name for param in found if param.name in declared and param.group == SONG}
        return tuple(sorted(found, key=lambda param: (not param.required, param.name not in own)))

    def non_defaults(self) -> dict[str, Any]:
        """The values that differ from their defaults, and the required ones."""
        return {
            param.name: getattr(self, param.name)
            for param in self.params()
            if param.required or getattr(self, param.name) != param.default
        }


class AdapterRef(Request):
    """An adapter and its strength; also built from a path, "FILE" or "FILE:0.8".

    A colon separates the two only where nothing but a number follows it. `config` is the
    adapter_config.json, where it is not beside the file.
    """

    mode: ClassVar[str] = "adapters"
    file: FilePath = param(..., "Adapter")
    strength: Number = param(1.0, "Strength", 0, MAX_ADAPTER_STRENGTH, 0.05)
    config: FilePath | None = param(None, "Adapter configuration")

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
    """The JSON values of `request` with the names of files in place of their paths."""
    values = dict(given)
    for param in request.params():
        value = values.get(param.name)
        if param.type is Path and value:
            values[param.name] = Path(value).name
        elif param.type is AdapterRef and param.name in values:
            values[param.name] = [with_file_names(AdapterRef, adapter) for adapter in value or ()]
    return values


def _param_of(name: str, info: FieldInfo) -> Param:
    base, optional, choices = _plain_type(info.annotation)
    extra: dict[str, Any] = dict(cast("Mapping[str, Any]", info.json_schema_extra))
    limits: dict[str, Any] = {}
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
    first: dict[str, Any] = {**error.errors()[0]}
    if request is not AdapterRef and len(first["loc"]) > 2:  # ("adapters", index, field)
        request, first = AdapterRef, {**first, "loc": first["loc"][2:]}
    if isinstance(cause := first.get("ctx", {}).get("error"), StudioError):
        return cause
    name = str(first["loc"][0]) if first["loc"] else request.mode
    known = {param.name: param for param in request.params()}
    if first["type"] == "extra_forbidden" or name not in known:
        return StudioError(
            "unknown-field", name=name[:80], mode=request.mode, known=", ".join(known)
        )
    param = known[name]
    missing = first["type"] == "missing" and request is not AdapterRef
    if missing and param.type is Path:
        return StudioError("source-needed", label=param.label)
    if missing:
        return StudioError("prompt-empty" if name == "prompt" else "brief-empty")
    problem, fix = _in_words(param, first)
    return StudioError("value-out-of-range", label=param.label, problem=problem, fix=fix)


def _in_words(param: Param, complaint: dict[str, Any]) -> tuple[str, str]:
    """What is wrong with a value, and what to do: two clauses without a full stop."""
    given, kind = complaint["input"], complaint["type"]
    if kind == "string_too_long":
        over = len(given) - (param.max_length or 0)
        return (
            f"has {len(given):,} characters; the limit is {param.max_length:,}",
            f"Shorten {param.label} by {over:,} characters",
        )
    if param.type is AdapterRef:
        return "contains something that is not a file", f"Choose files for {param.label}"
    if param.type is Path:
        return "is not a file", f"Choose a file for {param.label}"
    switched = isinstance(given, bool) and param.type is not bool
    if kind == "value_error" and not switched:
        return str(complaint["ctx"]["error"]), f"Change {param.label}"
    if kind == "string_unicode":
        return "contains broken characters", f"Type {param.label} again"
    shown = repr(given) if isinstance(given, str) else str(given)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    if param.choices:
        options = ", ".join(choice or "auto" for choice in param.choices[:8])
        more = " and so on" if len(param.choices) > 8 else ""
        return f"cannot be {shown}", f"Choose one of {options}{more}"
    if param.type is bool:
        return f"must be on or off, not {shown}", f"Turn {param.label} on or off"
    if param.low is not None:
        return _range_in_words(param, shown)
    return f"must be text, not {shown}", f"Write {param.label} as text"


def _range_in_words(param: Param, shown: str) -> tuple[str, str]:
    noun = "a whole number" if param.type is int else "a number"
    unit = f" {param.unit}" if param.unit else ""
    span = f"{noun} from {param.low:,.10g} to {param.high:,.10g}{unit}"
    return f"must be {span}, not {shown}", f"Set {param.label} to {span}"


def filled(value: T | None) -> T:
    """`value`, which is never None once a request was prepared for its job."""
    if value is None:
        raise RuntimeError("the request was not prepared")
    return value
