"""The nouns: what a musician asks for, what comes back, and what is said in between.

A request is a frozen pydantic model. Each field declares its label, range, step, group and unit
once, with `knob`; widgets, checks, API names, command-line flags and the metadata in a take are
made from that declaration.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo

from errors import StudioError

SONG, DIFFUSION, SCHEDULE, MUSIC = "Song", "Diffusion", "Schedule", "Music"
"""Groups of knobs, in the order a form shows them. The first is the form itself."""

SAMPLE_RATE = 48_000
"""Hz. What leaves the studio is always 48 kHz stereo."""

MAX_SEED = 2**31 - 1

NOTES = ("C", "D", "E", "F", "G", "A", "B")
KEYS = tuple(
    f"{note}{sign} {mode}"
    for mode in ("major", "minor")
    for note in NOTES
    for sign in ("", "#", "b")
)
METRES = ("2", "3", "4", "6")
"""Beats a bar: 2/4, 3/4, 4/4 and 6/8."""

INSTRUMENTAL = "[Instrumental]"
"""Lyrics that mean: nobody sings. The spelling the models were trained on."""

LANGUAGES = tuple(
    "ar az bg bn ca cs da de el en es fa fi fr he hi hr ht hu id is it ja ko la lt ms ne nl no pa pl"
    " pt ro ru sa sk sr sv sw ta te th tl tr uk ur vi yue zh unknown".split()
)


def _no_switches(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a switch where a number belongs")
    return value


def _plain_key(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip().replace("\u266f", "#").replace("\u266d", "b")
    return value


Whole = Annotated[int, BeforeValidator(_no_switches)]
Real = Annotated[float, BeforeValidator(_no_switches)]
Key = Annotated[Literal[("", *KEYS)], BeforeValidator(_plain_key)]


def knob(
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
class Knob:
    """A field of a request with everything that was declared about it."""

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
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Check `given` and make a request, or raise the `StudioError` that names the culprit."""
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise _as_studio_error(cls, error) from error

    @classmethod
    def knobs(cls) -> tuple[Knob, ...]:
        """The fields as knobs: required first, then the mode's own, then what it shares."""
        own = inspect.get_annotations(cls)
        found = [_knob(name, info) for name, info in cls.model_fields.items()]
        return tuple(sorted(found, key=lambda k: (not k.required, k.name not in own)))

    def turned(self) -> dict[str, Any]:
        """Only the values that differ from their defaults: a take's caption."""
        return {
            k.name: getattr(self, k.name)
            for k in self.knobs()
            if k.required or getattr(self, k.name) != k.default
        }


class Sound(Request):
    """The knobs that every song mode has."""

    inference_steps: Whole | None = knob(None, "Steps", 1, 100, 1, group=DIFFUSION)
    guidance_scale: Real | None = knob(None, "Guidance", 1, 15, 0.5, group=DIFFUSION)
    infer_method: Literal["ode", "sde", "heun"] = knob("ode", "Method", group=DIFFUSION)
    seed: Whole | None = knob(None, "Seed", 0, MAX_SEED, 1, group=DIFFUSION)
    cfg_interval_start: Real = knob(0.0, "Guidance ends at", 0, 1, 0.05, group=SCHEDULE)
    cfg_interval_end: Real = knob(1.0, "Guidance begins at", 0, 1, 0.05, group=SCHEDULE)
    shift: Real | None = knob(None, "Shift", 0.5, 5, 0.1, group=SCHEDULE)
    use_adg: bool = knob(False, "Angle guidance (ADG)", group=SCHEDULE)
    bpm: Whole | None = knob(None, "Tempo", 30, 300, 1, group=MUSIC, unit="bpm")
    keyscale: Key = knob("", "Key", group=MUSIC)
    timesignature: Literal[("", *METRES)] = knob("", "Beats per bar", group=MUSIC)
    vocal_language: Literal[LANGUAGES] = knob("unknown", "Sung in", group=MUSIC)

    @field_validator("cfg_interval_end")
    @classmethod
    def _interval_runs_upwards(cls, end: float, info: Any) -> float:
        start = info.data.get("cfg_interval_start", 0.0)
        if end < start:
            raise ValueError(f"is {end:g}, below Guidance ends at ({start:g})")
        return end


class Generate(Sound):
    """A song from words."""

    mode: ClassVar[str] = "generate"
    prompt: str = knob(..., "Style", lines=3, max_length=512)
    lyrics: str = knob("", "Lyrics", lines=8, max_length=4096)
    instrumental: bool = knob(False, "Instrumental")
    duration_s: Real = knob(30.0, "Length", 10, 240, 1, unit="s")

    @field_validator("prompt")
    @classmethod
    def _prompt_says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise StudioError("prompt-empty")
        return prompt


MODES: dict[str, type[Request]] = {request.mode: request for request in (Generate,)}


class ModelUsed(BaseModel):
    """Which weights made a take."""

    model_config = ConfigDict(frozen=True)
    name: str
    source: str
    revision: str
    sha256: str
    licence: str
    may_sell: bool | None


class DeviceUsed(BaseModel):
    """Where a take was made. Equal values and an equal request mean equal samples."""

    model_config = ConfigDict(frozen=True)
    kind: str
    name: str
    dtype: str
    threads: int
    torch: str


class Card(BaseModel):
    """What is playing: the model on its device, and the defaults that suit it.

    `hint` is one plain sentence for people whose machine plays a smaller model than it could be,
    or slowly; None where there is nothing to explain.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    title: str
    licence: str
    may_sell: bool | None
    device: str
    hint: str | None
    steps: int
    guidance: float
    shift: float
    longest_s: float
    takes_guidance: bool


class Progress(BaseModel):
    """A sign of life: what is being done, how far it is, how long it will take.

    `elapsed_s` counts from the start of the job; `left_s` is the range (soonest, latest) in which
    the end is expected, or None while nothing is known.
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["progress"] = "progress"
    stage: str
    step: int = 0
    steps: int = 0
    elapsed_s: float = 0.0
    left_s: tuple[float, float] | None = None


class Take(BaseModel):
    """A finished piece: its file, and the request as it was really run."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["take"] = "take"
    id: str
    path: str
    mode: str
    request: dict[str, Any]
    model: ModelUsed
    device: DeviceUsed
    sample_rate: int
    samples: int
    peak_dbfs: float | None
    timings_s: dict[str, float]
    notes: tuple[str, ...] = ()
    made_at: datetime
    studio: str

    @property
    def duration_s(self) -> float:
        return self.samples / self.sample_rate

    def again(self, **changes: Any) -> Request:
        """The request that made this take, with `changes`. A retake changes the seed."""
        return MODES[self.mode].of({**self.request, **changes})


class Cancelled(BaseModel):
    """The musician stopped it. `stage` is where it stood."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["cancelled"] = "cancelled"
    stage: str
    elapsed_s: float


class Failed(BaseModel):
    """It could not be done: the code, one sentence, one action."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["failed"] = "failed"
    code: str
    message: str
    action: str

    @classmethod
    def by(cls, error: StudioError) -> Self:
        return cls(code=error.code, message=error.message, action=error.action)


Event = Progress | Take | Cancelled | Failed


def _knob(name: str, info: FieldInfo) -> Knob:
    base, optional, choices = _plain_type(info.annotation)
    extra = info.json_schema_extra
    limits = {}
    for rule in info.metadata:
        for limit in ("ge", "le", "max_length"):
            if hasattr(rule, limit):
                limits[limit] = getattr(rule, limit)
    return Knob(
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
    return annotation, False, ()


def _as_studio_error(request: type[Request], error: ValidationError) -> StudioError:
    """Turn pydantic's first complaint into one sentence and one action."""
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), StudioError):
        return cause
    name = str(first["loc"][0]) if first["loc"] else request.mode
    known = {k.name: k for k in request.knobs()}
    if first["type"] == "extra_forbidden" or name not in known:
        return StudioError(
            "unknown-field", name=name[:80], mode=request.mode, known=", ".join(known)
        )
    k = known[name]
    if name == "prompt" and first["type"] == "missing":
        return StudioError("prompt-empty")
    problem, fix = _in_words(k, first)
    return StudioError("value-out-of-range", label=k.label, problem=problem, fix=fix)


def _in_words(k: Knob, complaint: dict[str, Any]) -> tuple[str, str]:
    """What is wrong with a knob's value, and what to do: two clauses without a full stop."""
    given = complaint["input"]
    unit = f" {k.unit}" if k.unit else ""
    if complaint["type"] == "string_too_long":
        return (
            f"has {len(given):,} characters, and {k.max_length:,} fit",
            f"Shorten {k.label} by {len(given) - k.max_length:,} characters",
        )
    switched = isinstance(given, bool) and k.type is not bool
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
