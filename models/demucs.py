"""TODO"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio import levels
from core.errors import StudioError
from core.requests import SAMPLE_RATE
from core.results import Progress
from models import checkpoints
from models.catalog import HTDEMUCS, StemsModel
from models.weights import broken

if TYPE_CHECKING:
    import numpy as np
    import torch


STEMS = ("vocals", "drums", "bass", "other")
"""In the order they are shown and zipped. The model's own order is another."""


SUM_ERROR_DBFS = -120.0
"""How far the sum of the stems may be from the mix: the rounding of 32-bit samples."""


OVERLAP = 0.25
"""Share of a window that the next one hears too: the model's authors' choice."""


LICENCE_NOTE = (
    "Stems: HTDemucs weights, for research use; their author keeps them outside its licence."
)
"""What a badge says where stems are offered."""


@dataclass(frozen=True)
class Separator:
    """A loaded HTDemucs in float32 on its device."""

    model: torch.nn.Module
    device: str


def find(weights: StemsModel = HTDEMUCS) -> Path:
    """The folder of a separator's weights. Raises `stems-missing`, with the command to get them."""
    folder = checkpoints.locate(weights)
    if folder is None or weights.missing(folder):
        raise StudioError(
            "stems-missing", model=weights.title, size=weights.size, command=weights.command
        )
    return folder


def load(weights: StemsModel = HTDEMUCS, device: str = "cpu") -> Iterator[Progress]:
    """Load a separator (returned) from its file, of which nothing is run.

    The file's bytes must be the ones of the table; it names a class, which is only compared, and
    that class's settings.

    Raises:
        StudioError: `stems-missing`, or `model-broken`, naming the file.
    """
    path = find(weights) / weights.marker
    yield Progress(stage=f"Loading {weights.title}")
    size = path.stat().st_size
    if size != weights.size_bytes:
        problem = f"is {size} bytes long and should be {weights.size_bytes}"
        raise broken(weights, path.name, problem)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != weights.sha256:
            raise broken(weights, path.name, "has other contents than published")

    from demucs.htdemucs import HTDemucs
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if said.get("klass") != f"{HTDemucs.__module__}.{HTDemucs.__qualname__}":
        raise broken(weights, path.name, "holds another kind of model")
    known = inspect.signature(HTDemucs).parameters
    settings = dict(zip(known, json.loads(said.get("args", "[]")), strict=False))
    settings |= json.loads(said["kwargs"], object_hook=_fraction)
    model = HTDemucs(**{name: value for name, value in settings.items() if name in known})
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise broken(weights, path.name, "lacks some of its tensors") from error
    if {*model.sources} != {*STEMS}:
        raise broken(weights, path.name, "splits into other stems")
    return Separator(model.eval().to(device), device)


def _fraction(value: dict[str, Any]) -> Any:
    """JSON for numbers such as 39/5, which the length of the model's window is."""
    from fractions import Fraction

    if value.get("_type") == "fraction":
        return Fraction(value["numerator"], value["denominator"])
    return value


def separate(separator: Separator, sound: np.ndarray) -> Iterator[Progress]:
    """Split `sound` into its stems, one window of the model at a time; closing stops there.

    What the model gives to no stem (the air above 22 kHz, small errors) goes to "other", so that
    the stems sum to the mix: within `SUM_ERROR_DBFS` as long as none rises above 16. The same sound
    gives the same bits on the same device: nothing is shifted at random.

    Returns:
        float32 [2, samples] at 48 kHz for each of `STEMS`, as long as `sound`.

    Raises:
        StudioError: `stems-memory`.
    """
    import numpy as np
    import torch

    samples, rate = sound.shape[1], separator.model.samplerate
    if not np.any(sound):
        return {name: np.zeros_like(sound) for name in STEMS}
    heard = levels.resample(sound, SAMPLE_RATE, rate, math.ceil(samples * rate / SAMPLE_RATE))
    # As the model was trained: by the mean and the deviation of the mono sum.
    mono = heard.mean(0, dtype=np.float64)
    middle, spread = np.float32(mono.mean()), np.float32(mono.std() + 1e-8)
    parts = yield from _windows(separator, torch.from_numpy((heard - middle) / spread))
    stems = {}
    for name in STEMS[:-1]:
        part = parts[separator.model.sources.index(name)].numpy() * spread + middle
        stems[name] = levels.resample(part, rate, SAMPLE_RATE, samples)
    rest = sound.astype(np.float64)
    for part in stems.values():
        rest -= part
    return {**stems, STEMS[-1]: rest.astype(np.float32)}


def _windows(separator: Separator, mix: torch.Tensor) -> Iterator[Progress]:
    """Run the model over `mix` [2, n] in windows that fade into each other like triangles.

    A short last window hears what is before it and silence after, as the model's authors do it.
    Returns float32 [stems, 2, n] on the CPU, the stems in the model's order.
    """
    import torch
    from torch.nn.functional import pad

    model, length = separator.model, mix.shape[1]
    window = int(model.samplerate * model.segment)
    starts = range(0, length, int((1 - OVERLAP) * window))
    rising = torch.arange(1, window // 2 + 1)
    weight = torch.cat([rising, torch.arange(window - window // 2, 0, -1)])
    weight = weight / weight.max()
    total = torch.zeros(len(model.sources), mix.shape[0], length)
    weights = torch.zeros(length)
    for step, start in enumerate(starts):
        yield Progress(stage="Splitting into stems", step=step, steps=len(starts))
        end = min(start + window, length)
        early = (window - (end - start)) // 2
        first, last = start - early, start - early + window
        part = pad(
            mix[:, max(0, first) : min(last, length)], (max(0, -first), max(0, last - length))
        )
        found = _heard(separator, part)[..., early : early + end - start]
        total[..., start:end] += weight[: end - start] * found
        weights[start:end] += weight[: end - start]
    yield Progress(stage="Splitting into stems", step=len(starts), steps=len(starts))
    return total / weights


def _heard(separator: Separator, part: torch.Tensor) -> torch.Tensor:
    """One window [2, n] through the model: [stems, 2, n] on the CPU."""
    import torch

    try:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True),
        ):
            return separator.model(part[None].to(separator.device))[0].cpu()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StudioError("stems-memory", device=separator.device) from error
