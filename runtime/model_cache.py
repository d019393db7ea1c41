"""Which models a job needs, and what is in memory: loaded once, where room is short one at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.results import ModelUsed, Progress
from models import checkpoints
from models.acestep import Engine
from models.catalog import MusicgenModel
from models.musicgen import LOADING as LOADING_MUSICGEN
from models.weights import Weights
from runtime import device
from runtime.job import Job

if TYPE_CHECKING:
    import numpy as np
    import torch


_resident: dict[tuple, Any] = {}


_fingerprints: dict[Path, str] = {}


_loading = threading.Lock()


def load(job: Job) -> Iterator[Progress]:
    """Bring the job's engine and planner into memory, if there is room for both."""
    yield from engine(job)
    if job.planner and not job.in_turn:
        yield from planner(job)


def is_loaded(weights: Weights | None) -> bool:
    """Whether `weights` are in memory already."""
    return any(key[0] == weights for key in list(_resident))


def engine(job: Job) -> Iterator[Progress]:
    """The engine of the job's model, loaded if it is not there yet (returned)."""

    def load() -> Iterator[Progress]:
        from models.acestep import Engine

        loaded = yield from Engine.load(job.model, job.source, job.place.device, job.place.dtype)
        _fingerprints[job.source] = checkpoints.fingerprint(job.source)
        return loaded

    return (yield from _held(job, job.model, job.source, "Loading", load))


def planner(job: Job) -> Iterator[Progress]:
    """The job's planner, loaded if it is not there yet (returned)."""

    def load() -> Iterator[Progress]:
        from models.planner import Planner

        home = job.planner.path_in(job.planner_folder)
        dtype = job.place.dtype if job.place.device == "cuda" else "float32"
        loaded = yield from Planner.load(
            home, checkpoints.codebook(job.source), job.place.device, dtype
        )
        _fingerprints[job.planner_folder] = checkpoints.fingerprint(home)
        return loaded

    return (yield from _held(job, job.planner, job.planner_folder, "Loading the planner", load))


def _held(
    job: Job,
    weights: Weights,
    folder: Path,
    stage: str,
    load: Callable[[], Iterator[Any]],
) -> Iterator[Any]:
    """What is resident under these weights.

    Everything else goes first where memory is too short for all of it, and where one is MusicGen and
    the other is not.
    """
    key = (weights, folder, job.place)
    if key not in _resident:
        yield Progress(stage=stage)
        with _loading:
            device.settle(job.place)
            musicgen, others = (
                isinstance(weights, MusicgenModel),
                [there for there, *_ in _resident],
            )
            short = job.in_turn or short_of_memory([*others, weights], job.place)
            if short or any(isinstance(there, MusicgenModel) != musicgen for there in others):
                _resident.clear()
                device.free(job.place.device, everything=True)
            _resident[key] = yield from load()
    return _resident[key]


def songwriter(job: Job) -> Iterator[Progress]:
    """The job's songwriter, loaded if it is not there yet (returned)."""

    def load() -> Iterator[Progress]:
        from lyrics import Songwriter

        writer = yield from Songwriter.load(job.writer, job.writer_folder, job.place.device)
        _fingerprints[job.writer_folder] = checkpoints.fingerprint(job.writer_folder)
        return writer

    return (yield from _held(job, job.writer, job.writer_folder, "Loading the songwriter", load))


def composer(job: Job) -> Iterator[Progress]:
    """The job's MusicGen, loaded if it is not there yet (returned)."""

    def load() -> Iterator[Progress]:
        from models.musicgen import MusicgenEngine

        loaded = yield from MusicgenEngine.load(job.model, job.source, job.place.device)
        _fingerprints[job.source] = checkpoints.fingerprint(job.source)
        return loaded

    return (yield from _held(job, job.model, job.source, LOADING_MUSICGEN, load))


def separator(job: Job) -> Iterator[Progress]:
    """The separator of stems, loaded if it is not there yet (returned)."""
    from models.catalog import HTDEMUCS
    from models.demucs import load as load_separator

    def load() -> Iterator[Progress]:
        return load_separator(HTDEMUCS, job.place.device)

    return (yield from _held(job, HTDEMUCS, Path(), f"Loading {HTDEMUCS.title}", load))


_latents: OrderedDict[tuple, torch.Tensor | None] = OrderedDict()


REMEMBERED = 8
"""Encoded files kept for the next take: 1.5 MB for the longest."""


def encoded(
    job: Job,
    by: Engine,
    name: str,
    sounds: dict[str, np.ndarray],
    how: Callable[[Engine, np.ndarray], Iterator[Progress]],
) -> Iterator[Progress]:
    """Latents of the file that came in as `name`, made once; None if there is none (returned)."""
    from models import loading

    if name not in sounds:
        return None
    key = (job.source, job.place, job.files[name], how.__name__)
    if key not in _latents:
        with loading.memory_errors(by.device, job.model, job.duration_s):
            _latents[key] = yield from how(by, sounds[name])
        while len(_latents) > REMEMBERED:
            _latents.popitem(last=False)
    _latents.move_to_end(key)
    return _latents[key]


def used(weights: Weights, folder: Path) -> ModelUsed:
    """Which weights made something, as a take records it."""
    return ModelUsed(
        name=weights.name,
        source=weights.repo,
        revision=checkpoints.revision(weights, folder),
        sha256=_fingerprints[folder],
        licence=weights.licence,
        may_sell=weights.may_sell,
    )


def short_of_memory(weights: Sequence[Weights], place: device.Device) -> bool:
    """Whether these must take turns: all of them with a tenth more, and 4 GB to work in."""
    whole = sum(each.size_bytes for each in weights)
    return 1.1 * whole / 1e9 + 4 > device.memory_gb(place.device)
