"""HTDemucs: splits a song into vocals, drums, bass and other.

The loop over windows is ours, since a generator that reports progress and can be closed cannot run
inside of demucs' `apply_model`; without random shifts the two are equal bit for bit.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio import levels
from core.errors import StudioError
from core.requests import SAMPLE_RATE
from core.results import Progress
from models import checkpoints
from models.catalog import HTDEMUCS, StemsModel
from models.loading import out_of_memory_as
from models.weights import broken

if TYPE_CHECKING:
    import numpy as np
    import torch


STEMS = ("vocals", "drums", "bass", "other")
"""In the order they are shown and zipped; the model's own order differs."""


SUM_ERROR_DBFS = -120.0
"""Largest difference between the sum of the stems and the mix: the rounding of 32-bit floats."""


OVERLAP = 0.25
"""Share of a window that overlaps with the next, as its authors chose."""


LICENCE_NOTE = (
    "Stems: HTDemucs weights, for research use; their author keeps them outside its licence."
)
"""Shown where stems are offered."""


@dataclass(frozen=True)
class Separator:
    """A loaded HTDemucs in float32 on its device."""

    model: torch.nn.Module
    device: str


def find(weights: StemsModel = HTDEMUCS) -> Path:
    """The folder of a separator's weights.

    Raises:
        StudioError: `stems-missing`, with the command that downloads them.
    """
    folder = checkpoints.locate(weights)
    if folder is None or weights.missing(folder):
        raise StudioError(
            "stems-missing", model=weights.title, size=weights.size, command=weights.command
        )
    return folder


def load(
    weights: StemsModel = HTDEMUCS, device: str = "cpu"
) -> Generator[Progress, None, Separator]:
    """Load a separator (returned). Nothing in its file is executed.

    The file must have the size and sha256 of the table. It names a class, which is only compared,
    and the arguments of that class.

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
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("klass") != f"{HTDemucs.__module__}.{HTDemucs.__qualname__}":
        raise broken(weights, path.name, "holds another kind of model")
    accepted = inspect.signature(HTDemucs).parameters
    settings = dict(zip(accepted, json.loads(metadata.get("args", "[]")), strict=False))
    settings |= json.loads(metadata["kwargs"], object_hook=_fraction)
    model = HTDemucs(**{name: value for name, value in settings.items() if name in accepted})
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise broken(weights, path.name, "lacks some of its tensors") from error
    if {*model.sources} != {*STEMS}:
        raise broken(weights, path.name, "splits into other stems")
    return Separator(model.eval().to(device), device)


def _fraction(value: dict[str, Any]) -> Any:
    """Decode fractions, such as the length of the model's window, 39/5 s."""
    from fractions import Fraction

    if value.get("_type") == "fraction":
        return Fraction(value["numerator"], value["denominator"])
    return value


def separate(
    separator: Separator, sound: np.ndarray
) -> Generator[Progress, None, dict[str, np.ndarray]]:
    """Split `sound` into its stems, one window at a time; closing the generator cancels.

    What the model assigns to no stem (content above 22 kHz, small errors) goes to "other", so that
    the stems sum to the mix within `SUM_ERROR_DBFS`, as long as none peaks above 16. The same sound
    gives the same bits on the same device.

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
    resampled = levels.resample(sound, SAMPLE_RATE, rate, math.ceil(samples * rate / SAMPLE_RATE))
    # Normalised as in training: by the mean and standard deviation of the mono mix.
    mono = resampled.mean(0, dtype=np.float64)
    mean, deviation = np.float32(mono.mean()), np.float32(mono.std() + 1e-8)
    parts = yield from _windows(separator, torch.from_numpy((resampled - mean) / deviation))
    stems = {}
    for name in STEMS[:-1]:
        part = parts[separator.model.sources.index(name)].numpy() * deviation + mean
        stems[name] = levels.resample(part, rate, SAMPLE_RATE, samples)
    rest = sound.astype(np.float64)
    for part in stems.values():
        rest -= part
    return {**stems, STEMS[-1]: rest.astype(np.float32)}


def _windows(separator: Separator, mix: torch.Tensor) -> Generator[Progress, None, torch.Tensor]:
    """Run the model over `mix` [2, n] in overlapping windows with triangular weights.

    A short last window is padded with what precedes it and with silence after it, as its authors
    do it.
    Returns float32 [stems, 2, n] on the CPU, the stems in the model's order.
    """
    import torch
    from torch.nn.functional import pad

    model, length = separator.model, mix.shape[1]
    window = int(model.samplerate * model.segment)
    starts = range(0, length, int((1 - OVERLAP) * window))
    ramp = torch.arange(1, window // 2 + 1)
    weight = torch.cat([ramp, torch.arange(window - window // 2, 0, -1)])
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
        stems = _run_model(separator, part)[..., early : early + end - start]
        total[..., start:end] += weight[: end - start] * stems
        weights[start:end] += weight[: end - start]
    yield Progress(stage="Splitting into stems", step=len(starts), steps=len(starts))
    return total / weights


def _run_model(separator: Separator, part: torch.Tensor) -> torch.Tensor:
    """One window [2, n] through the model: [stems, 2, n] on the CPU."""
    import torch

    with (
        out_of_memory_as(StudioError("stems-memory", device=separator.device)),
        torch.inference_mode(),
        torch.backends.cudnn.flags(benchmark=False, deterministic=True),
    ):
        return separator.model(part[None].to(separator.device))[0].cpu()
