"""A report about this machine: device, driver, memory, the plan, models on disk, what would be faster."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from models import catalog, checkpoints
from models.weights import Weights, format_bytes
from runtime import device, memory_choice
from runtime.job import Setup
from runtime.memory_plan import GET_TORCHAO
from runtime.takes import studio_version


def report(setup: Setup) -> dict[str, Any]:
    """Everything that decides which model runs here, and how fast, as JSON."""
    kind, plan = setup.device.kind, setup.plan
    return {
        "studio": studio_version(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchao": version("torchao") if memory_choice.has_torchao() else None,
        "device": {
            "kind": kind,
            "name": device.device_name(kind),
            "driver": device.driver(kind),
            "dtype": setup.device.dtype,
            "threads": setup.device.threads,
        },
        "memory": {
            "total_gb": round(device.memory_gb(kind), 1),
            "free_gb": round(device.free_gb(kind), 1),
        },
        "plan": {
            **plan.settings(),
            "model": setup.model.title,
            "planner": setup.planner.title if setup.planner else None,
            "needed_gb": plan.needed_gb,
            "fits": plan.fits,
            "summary": plan.reason,
        },
        "models": [_on_disk(weights) for weights in _weights(setup)],
        "faster": list(_faster(setup)),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A report as text for a terminal."""
    place, memory, plan = found["device"], found["memory"], found["plan"]
    yield f"Studio    {found['studio']}, Python {found['python']}, torch {found['torch']}"
    yield f"Device    {place['name']} ({place['kind']})"
    yield f"Driver    {place['driver']}"
    yield f"Computes  in {place['dtype']}, {place['threads']} CPU threads"
    yield f"Memory    {memory['total_gb']:g} GB, {memory['free_gb']:g} GB free"
    yield f"Model     {plan['model']}"
    yield f"Planner   {plan['planner'] or 'none'}"
    turns = ", planner in turn" if plan["planner_in_turn"] else ""
    yield f"Plan      {plan['precision']}, offload {plan['offload']}, tiles of {plan['tile']}{turns}"
    yield f"          {plan['summary']}"
    yield "Models on this computer"
    for model in found["models"]:
        where = model["folder"] or f"not here; {model['command']}"
        yield f"  {model['name']:15} {model['size']:>12}  {where}"
    yield "What would be faster"
    for each in found["faster"] or [{"what": "Nothing known", "why": "this is the fastest plan"}]:
        yield f"  {each['what']}: {each['why']}."


def _weights(setup: Setup) -> list[Weights]:
    """The models of the tables, and those in use that are in none."""
    used = [setup.model, setup.planner, setup.songwriter, setup.musicgen]
    known = {weights.name: weights for weights in catalog.BY_NAME.values()}
    return list({**known, **{each.name: each for each in used if each}}.values())


def _on_disk(weights: Weights) -> dict[str, Any]:
    folder = checkpoints.locate(weights)
    if folder is not None and weights.missing(folder):
        folder = None
    return {
        "name": weights.name,
        "size": format_bytes(weights.size_bytes) if weights.size_bytes else "size unknown",
        "folder": str(folder) if folder else None,
        "command": weights.command,
    }


def _faster(setup: Setup) -> Iterator[dict[str, str]]:
    """What would make songs faster here, each with the reason why it is not so."""
    kind, plan = setup.device.kind, setup.plan
    found = device.available()
    build = version("torch")
    if kind == "cpu" and len(found) > 1:
        yield {"what": f"The GPU ({found[0]})", "why": "the studio was started with --device cpu"}
    elif kind == "cpu" and "+cpu" in build:
        yield {"what": "A GPU", "why": f"torch {build} is a build for the processor alone"}
    elif kind == "cpu":
        yield {"what": "A GPU", "why": "torch finds none, or its driver is not installed"}
    if kind == "cpu" and setup.device.dtype == "float32" and not plan.quantized:
        yield {
            "what": "bfloat16 on the processor",
            "why": "it has neither AMX nor AVX512-BF16, or the plan asks for float32",
        }
    if device.has_own_memory(kind) and setup.device.dtype == "float32":
        yield {"what": "bfloat16", "why": "the GPU is older than Ampere, or float32 was asked for"}
    if plan.offload != "none":
        yield {
            "what": "Keeping the whole model on the device",
            "why": f"its memory has {device.memory_gb(kind):.3g} GB",
        }
    if plan.planner_in_turn:
        yield {
            "what": "Keeping the planner beside the model",
            "why": "they do not fit into memory together; a smaller one may: --planner 0.6B",
        }
    if not memory_choice.has_torchao() and (plan.offload == "blocks" or not plan.fits):
        yield {"what": "int8 weights", "why": f"torchao is not installed: {GET_TORCHAO}"}
