"""The memory plan of a model on this machine: what was asked for, the sizes on disk, the memory."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from core.errors import StudioError
from models import catalog, checkpoints
from runtime import device, memory_plan
from runtime.memory_plan import OFFLOADS, PRECISIONS, MemoryPlan, ModelSizes

PUBLISHED_2B_BYTES = 8_000_000_000
"""Checkpoints up to this size are taken for the 2B model until they are on disk."""


def choose(
    model: catalog.Model,
    place: device.Device,
    planner: catalog.PlannerModel | None = None,
    precision: str = "",
    offload: str = "",
) -> MemoryPlan:
    """The plan for `model` and its planner on `place`.

    Args:
        precision, offload: one of `PRECISIONS` and `OFFLOADS`, or "auto"; where empty,
            `ACE_PRECISION` and `ACE_OFFLOAD` count.

    Raises:
        StudioError: `value-out-of-range` for any other word.
    """
    native = {name: kind for kind, name in memory_plan.DTYPES.items()}[place.dtype]
    return memory_plan.plan(
        place.kind,
        device.memory_gb(place.kind),
        sizes_of(model, planner),
        precision=_setting("--precision", "ACE_PRECISION", precision, PRECISIONS),
        offload=_setting("--offload", "ACE_OFFLOAD", offload, OFFLOADS),
        int8_available=has_torchao(),
        native=native,
    )


def has_torchao() -> bool:
    """Whether torchao, which int8 and fp8 need, is installed."""
    return find_spec("torchao") is not None


def sizes_of(model: catalog.Model, planner: catalog.PlannerModel | None = None) -> ModelSizes:
    """Numbers of parameters, read from the files' headers, or the published ones until they are here.

    A broken checkpoint counts as the published one; loading names what is wrong with it.
    """
    sizes = memory_plan.XL
    if 0 < model.size_bytes < PUBLISHED_2B_BYTES:
        sizes = memory_plan.TWO_B
    folder = checkpoints.locate(model)
    if folder is not None:
        with suppress(StudioError, OSError, ValueError, KeyError, TypeError):
            sizes = _sizes_on_disk(model, folder)
    return replace(sizes, planner=planner.size_bytes // 2 if planner else 0)  # bfloat16 on disk


def _sizes_on_disk(model: catalog.Model, folder: Path) -> ModelSizes:
    counts = checkpoints.parameter_counts(model, folder)
    return ModelSizes(
        transformer=counts["transformer"],
        encoders=counts["condition_encoder"] + counts["text_encoder"],
        vae=counts["vae"],
        audio_codes=counts.get("audio_tokenizer", 0) + counts.get("audio_token_detokenizer", 0),
        blocks=int(checkpoints.transformer_config(folder)["num_hidden_layers"]),
    )


def _setting(flag: str, variable: str, given: str, known: tuple[str, ...]) -> str:
    """The value of a flag, else of its environment variable, else "auto"."""
    label, value = (flag, given) if given else (variable, os.environ.get(variable, ""))
    value = value.strip().lower() or "auto"
    if value not in ("auto", *known):
        raise StudioError(
            "value-out-of-range",
            label=label,
            problem=f"must be one of auto, {', '.join(known)}, not {value[:20]!r}",
            fix="Set it to one of them, or leave it out",
        )
    return value
