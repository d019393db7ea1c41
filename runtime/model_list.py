"""Every model in the tables, with where it is, its licence, and whether it fits this machine."""

from __future__ import annotations

from collections.abc import Iterator

from core.results import ModelEntry
from models import catalog, checkpoints
from models.weights import Weights
from runtime import device, memory_choice
from runtime.downloads import Downloads
from runtime.job import Setup

WORK_GB = 4.0
"""Memory to work in beside the weights of a model whose parts were not counted."""


def list_models(setup: Setup, downloads: Downloads) -> tuple[ModelEntry, ...]:
    """All models that this machine could run, by kind, with the state of their downloads."""
    kind = setup.device.kind
    memory_gb = device.memory_gb(kind)
    may_change = not device.ON_SPACE
    # A page drawn without a planner has its planner's controls disabled.
    changeable = ("songwriter", "planner") if setup.planner else ("songwriter",)
    entries = []
    for group, weights, in_use, needed_gb in _rows(setup):
        found = checkpoints.locate(weights)
        on_disk = found is not None and not weights.missing(found)
        fits, memory = _fit(weights, needed_gb, setup, memory_gb)
        entries.append(
            ModelEntry(
                kind=group,
                name=weights.name,
                title=weights.title,
                size=weights.size,
                licence=weights.licence,
                may_sell=weights.may_sell,
                on_disk=on_disk,
                in_use=in_use,
                fits=fits,
                memory=memory,
                can_fetch=may_change and not on_disk,
                can_use=may_change and on_disk and not in_use and group in changeable,
                download=downloads.state(weights.name),
            )
        )
    return tuple(entries)


def _rows(setup: Setup) -> Iterator[tuple[str, Weights, bool, float]]:
    """(kind, weights, in use, memory in GB or 0 where it follows from the size)."""
    kind = setup.device.kind
    for model in {setup.model.name: setup.model, **catalog.MODELS}.values():
        yield "model", model, model == setup.model, 0.0
    for planner in catalog.PLANNERS:
        yield "planner", planner, planner == setup.planner, planner.min_memory_gb
    engine = setup.songwriter.engine
    for writer in catalog.SONGWRITERS.values():
        if writer.engine == engine:
            needed_gb = writer.needed_gb(kind) / catalog.USABLE
            yield "songwriter", writer, writer == setup.songwriter, needed_gb
    yield "stems", catalog.HTDEMUCS, True, 0.0
    yield "musicgen", setup.musicgen, True, 0.0


def _fit(
    weights: Weights, needed_gb: float, setup: Setup, memory_gb: float
) -> tuple[bool | None, str]:
    """Whether `weights` fit a device with `memory_gb`, and how, in one sentence.

    Music models are judged by the plan they would be loaded with.
    """
    kind = setup.device.kind
    if isinstance(weights, catalog.Model):
        in_use = weights == setup.model
        plan = setup.plan if in_use else memory_choice.choose(weights, setup.device, setup.planner)
        return plan.fits, f"{plan.title}. {plan.reason}"
    if not weights.size_bytes:
        return None, ""
    needed_gb = needed_gb or 1.1 * weights.size_bytes / 1e9 + WORK_GB
    where = "memory" if kind in ("cpu", "mps") else "GPU memory"
    return memory_gb >= needed_gb, f"Needs {needed_gb:.0f} of {memory_gb:.0f} GB of {where}."
