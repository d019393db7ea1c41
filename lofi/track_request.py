"""Parameters of the `generate` method: checked, completed from the defaults, and given an id."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from core.requests import MAX_SEED, Generate, Musicgen
from lofi.backends import BACKENDS, MIN_DURATION_S, Backends
from lofi.config import Config
from lofi.jsonrpc import Params, RpcError
from lofi.track_cache import track_id

SCHEDULERS = {"euler": "ode", "heun": "heun", "pingpong": "sde"}
"""Scheduler names on the wire, with the engine's `infer_method`. Pingpong predicts the clean latent
and adds fresh noise for the next time step; the noise comes from the job's seed."""


MAX_WIRE_SEED = 2**64 - 1


SAMPLING_FIELDS = ("inference_steps", "guidance_scale")
"""Params that only shape ACE-Step tracks, in the order they are checked."""


TOKENS_PER_SECOND = 50
"""MusicGen's steps are tokens."""


WITHOUT_PLANNER = dict.fromkeys(
    ("thinking", "use_cot_caption", "use_cot_metas", "use_cot_language"), False
)
"""A track follows its request alone, whatever planner is installed."""


def _whole(value: Any) -> Any:
    """Lua has only one number type, so 30.0 is accepted as an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) in (int, type(None)):
        return value
    raise ValueError("must be a whole number")


def _number(value: Any) -> Any:
    if type(value) in (int, float, type(None)):
        return value
    raise ValueError("must be a number")


def _encodable(value: str) -> str:
    """JSON can carry a lone surrogate, which no file and no tokenizer can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("contains a lone surrogate") from error
    return value


def _seed_in_range(value: int | None) -> int | None:
    if value is None or 0 <= value <= MAX_WIRE_SEED:
        return value
    raise ValueError(f"must be 0 to {MAX_WIRE_SEED}")


Integer = Annotated[int, BeforeValidator(_whole)]


OptionalInteger = Annotated[int | None, BeforeValidator(_whole)]


OptionalNumber = Annotated[float | None, BeforeValidator(_number)]


class GenerateParams(Params):
    """Params of `generate` with their types. `resolve` checks ranges, one by one."""

    prompt: Annotated[str, AfterValidator(_encodable)]
    duration_sec: Integer = 30
    backend: str | None = None
    seed: Annotated[OptionalInteger, AfterValidator(_seed_in_range)] = None
    priority: Literal["normal", "high"] = "normal"
    inference_steps: OptionalInteger = None
    scheduler: str | None = None
    guidance_scale: OptionalNumber = None


@dataclass(frozen=True)
class TrackRequest:
    """A track to make, with every value decided, and the id it will have in the cache.

    Attributes:
        seed: as the client sees it, up to 2**64 - 1; `request` holds it folded to `MAX_SEED`.
        params: the values that shape an ACE-Step track beside prompt, seed and duration.
        total_steps: denoising steps (ace_step) or tokens (musicgen).
    """

    track_id: str
    backend: str
    model_version: str
    prompt: str
    seed: int
    duration_sec: int
    request: Generate | Musicgen
    params: dict[str, Any]
    total_steps: int


def backend_name(name: str) -> str:
    """`name` if there is such a backend.

    Raises:
        RpcError: INVALID_BACKEND.
    """
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise RpcError("INVALID_BACKEND", f"No backend {name[:40]!r}. Choose one of: {known}.")
    return name


def resolve(params: GenerateParams, backends: Backends, config: Config) -> TrackRequest:
    """Check `params`, fill in the defaults and draw a seed where there is none.

    Checked in the order of the protocol: backend, prompt, duration, steps, guidance, scheduler,
    then whether the model is installed.

    Raises:
        RpcError: the first value that is out of range.
        StudioError: `backend-missing`.
    """
    backend = backend_name(config.backend if params.backend is None else params.backend)
    _check_ranges(params, backend, backends.max_duration_s(backend))
    folder = backends.installed_folder(backend)
    if folder is None:
        raise backends.not_installed(backend)
    seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed
    fields: dict[str, Any] = {
        "prompt": params.prompt,
        "duration_s": params.duration_sec,
        "seed": (seed ^ seed >> 31 ^ seed >> 62) & MAX_SEED,  # folded, so that every bit counts
    }
    if backend == "ace_step":
        total_steps, sampling = _ace_step_sampling(params, backends, config)
        fields |= {
            "inference_steps": total_steps,
            "infer_method": SCHEDULERS[sampling["scheduler"]],
            "guidance_scale": sampling["guidance_scale"],
            "instrumental": True,
            **WITHOUT_PLANNER,
        }
    else:
        total_steps, sampling = TOKENS_PER_SECOND * params.duration_sec, {}
    version = backends.model_version(backend, folder)
    return TrackRequest(
        track_id=track_id(
            backend, version, params.prompt, seed, params.duration_sec, [*sampling.values()]
        ),
        backend=backend,
        model_version=version,
        prompt=params.prompt,
        seed=seed,
        duration_sec=params.duration_sec,
        request=BACKENDS[backend].of(fields),
        params=sampling,
        total_steps=total_steps,
    )


def _check_ranges(params: GenerateParams, backend: str, max_duration_s: int) -> None:
    fields = {field.name: field for field in Generate.params()}
    max_length = fields["prompt"].max_length or 0
    if not params.prompt.strip():
        raise RpcError("INVALID_PROMPT", "The prompt is empty. Describe the music in a few words.")
    if len(params.prompt) > max_length:
        problem = f"The prompt has {len(params.prompt)} characters; the limit is {max_length}."
        raise RpcError("INVALID_PROMPT", f"{problem} Shorten it.")
    ranges = {name: (fields[name].low or 0, fields[name].high or 0) for name in SAMPLING_FIELDS}
    ranges = {"duration_sec": (MIN_DURATION_S, max_duration_s), **ranges}
    for name, (low, high) in ranges.items():
        value = getattr(params, name)
        if value is not None and not low <= value <= high:
            problem = f"{name} must be {low} to {high} with {backend}, not {str(value)[:40]}."
            raise RpcError(f"INVALID_{name.removesuffix('_sec').upper()}", problem)
    if params.scheduler is not None and params.scheduler.lower() not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        problem = f"No scheduler {params.scheduler[:40]!r}. Choose one of: {known}."
        raise RpcError("INVALID_SCHEDULER", problem)


def _ace_step_sampling(
    params: GenerateParams, backends: Backends, config: Config
) -> tuple[int, dict[str, Any]]:
    """Steps, scheduler and guidance: from the request, else the settings, else the checkpoint."""
    model = backends.model
    steps = params.inference_steps or config.ace_step_steps or model.steps
    guidance = params.guidance_scale or config.ace_step_guidance or model.guidance
    return steps, {
        "inference_steps": steps,
        "scheduler": (params.scheduler or config.ace_step_scheduler).lower(),
        # A distilled checkpoint has its guidance built in and runs at 1 whatever is requested.
        "guidance_scale": 1.0 if model.guidance == 1 else guidance,
    }
