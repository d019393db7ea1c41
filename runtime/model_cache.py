"""The models in memory: loaded on first use, and one at a time where memory is short."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from core.errors import StudioError
from core.params import filled
from core.results import AdapterUsed, ModelUsed, Progress
from models import catalog, checkpoints, loading
from models.adapter_layers import AdapterStack
from models.catalog import MusicgenModel
from models.musicgen import LOADING as LOADING_MUSICGEN
from models.weights import Weights
from runtime import device
from runtime.job import Job
from runtime.memory_plan import MemoryPlan

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lyrics import Songwriter
    from models.acestep import Engine
    from models.demucs import Separator
    from models.musicgen import MusicgenEngine
    from models.planner import Planner

T = TypeVar("T")

ENCODED_KEPT = 8
"""Encoded uploads kept for the next take: 1.5 MB for the longest."""

LOCK_POLL_S = 0.2
"""How often a job that waits for another's loading reports that it does."""


class ModelCache:
    """Every model that was loaded on one device, and what was computed from uploads with them.

    Thread-safe. Models stay until memory is too short for the next one; MusicGen and ACE-Step are
    never in memory together.
    """

    def __init__(self, place: device.Device) -> None:
        self._device = place
        self._loaded: dict[tuple[Weights, Path], Any] = {}
        self._fingerprints: dict[Path, str] = {}
        self._adapters: WeakKeyDictionary[Engine, AdapterStack] = WeakKeyDictionary()
        self._latents: OrderedDict[Hashable, torch.Tensor | None] = OrderedDict()
        self._plan: MemoryPlan | None = None  # of the engine that was loaded last
        self._lock = threading.Lock()

    def holds(self, weights: Weights | None) -> bool:
        """Whether `weights` are in memory."""
        return any(loaded == weights for loaded, _ in list(self._loaded))

    def unload_all(self) -> None:
        """Unload every model and free its memory."""
        self._loaded.clear()
        device.free(self._device.kind, everything=True)

    def preload(self, job: Job) -> Generator[Progress, None, None]:
        """Load the job's engine, and its planner if both fit into memory."""
        yield from self.engine(job)
        if job.planner and not job.one_at_a_time:
            yield from self.planner(job)

    def engine(self, job: Job) -> Generator[Progress, None, Engine]:
        """The ACE-Step engine of the job's model.

        Raises:
            StudioError: those of `Engine.load`.
        """
        model = filled(job.model)
        folder = on_disk(model)
        if self._plan not in (None, job.plan):
            self.unload_all()

        def load() -> Generator[Progress, None, Engine]:
            from models.acestep import Engine

            engine = yield from Engine.load(
                model,
                folder,
                job.device.kind,
                job.device.dtype,
                quantized=job.plan.quantized,
                offload=job.plan.offload,
                tile=job.plan.tile,
            )
            self._plan = job.plan
            self._fingerprints[folder] = checkpoints.fingerprint(folder)
            return engine

        return (yield from self._get(job, model, folder, "Loading", load))

    def planner(self, job: Job) -> Generator[Progress, None, Planner]:
        """The job's planner.

        Raises:
            StudioError: those of `Planner.load`.
        """
        model, planner_model = filled(job.model), filled(job.planner)
        folder = on_disk(planner_model)

        def load() -> Generator[Progress, None, Planner]:
            from models.planner import Planner

            home = planner_model.path_in(folder)
            own_memory = device.has_own_memory(job.device.kind)
            dtype = job.device.dtype if own_memory else "float32"
            codebook = checkpoints.codebook(on_disk(model))
            planner = yield from Planner.load(home, codebook, job.device.kind, dtype)
            self._fingerprints[folder] = checkpoints.fingerprint(home)
            return planner

        return (yield from self._get(job, planner_model, folder, "Loading the planner", load))

    def songwriter(self, job: Job) -> Generator[Progress, None, Songwriter]:
        """The job's songwriter.

        Raises:
            StudioError: those of `Songwriter.load`.
        """
        weights = filled(job.songwriter)
        folder = on_disk(weights)

        def load() -> Generator[Progress, None, Songwriter]:
            from lyrics import Songwriter

            songwriter = yield from Songwriter.load(weights, folder, job.device.kind)
            self._fingerprints[folder] = checkpoints.fingerprint(folder)
            return songwriter

        return (yield from self._get(job, weights, folder, "Loading the songwriter", load))

    def musicgen(self, job: Job) -> Generator[Progress, None, MusicgenEngine]:
        """The job's MusicGen.

        Raises:
            StudioError: those of `MusicgenEngine.load`.
        """
        weights = filled(job.musicgen)
        folder = on_disk(weights)

        def load() -> Generator[Progress, None, MusicgenEngine]:
            from models.musicgen import MusicgenEngine

            composer = yield from MusicgenEngine.load(weights, folder, job.device.kind)
            self._fingerprints[folder] = checkpoints.fingerprint(folder)
            return composer

        return (yield from self._get(job, weights, folder, LOADING_MUSICGEN, load))

    def separator(self, job: Job) -> Generator[Progress, None, Separator]:
        """The model that splits a song into stems.

        Raises:
            StudioError: `stems-missing`, `stems-memory`, `model-broken`.
        """
        from models import demucs

        def load() -> Generator[Progress, None, Separator]:
            return (yield from demucs.load(catalog.HTDEMUCS, job.device.kind))

        return (
            yield from self._get(
                job, catalog.HTDEMUCS, Path(), f"Loading {catalog.HTDEMUCS.title}", load
            )
        )

    def apply_adapters(
        self, job: Job, engine: Engine
    ) -> Generator[Progress, None, tuple[AdapterUsed, ...]]:
        """Apply the job's adapters to `engine`, and no others.

        Raises:
            StudioError: those of `AdapterStack.apply`.
        """
        if engine not in self._adapters and job.adapters:
            self._adapters[engine] = AdapterStack(engine.pipe.transformer, engine.model.title)
        if engine not in self._adapters:
            return ()
        return (yield from self._adapters[engine].apply(job.adapters))

    def encoded(
        self,
        job: Job,
        engine: Engine,
        name: str,
        encode: Callable[[Engine, np.ndarray], Generator[Progress, None, torch.Tensor | None]],
    ) -> Generator[Progress, None, torch.Tensor | None]:
        """Latents of the file uploaded as `name`, computed once; None where there is no such file.

        Raises:
            StudioError: `out-of-memory`.
        """
        if name not in job.sounds:
            return None
        key = (engine.model, job.sha256s[name], encode.__name__)
        if key not in self._latents:
            with loading.memory_errors(engine.device, engine.model, job.duration_s):
                self._latents[key] = yield from encode(engine, job.sound(name))
            while len(self._latents) > ENCODED_KEPT:
                self._latents.popitem(last=False)
        self._latents.move_to_end(key)
        return self._latents[key]

    def used(self, weights: Weights) -> ModelUsed:
        """`weights` as a take records them, once they were loaded."""
        folder = on_disk(weights)
        return ModelUsed(
            name=weights.name,
            source=weights.repo,
            revision=checkpoints.revision(weights, folder),
            sha256=self._fingerprints[folder],
            licence=weights.licence,
            may_sell=weights.may_sell,
        )

    def _get(
        self,
        job: Job,
        weights: Weights,
        folder: Path,
        stage: str,
        load: Callable[[], Generator[Progress, None, T]],
    ) -> Generator[Progress, None, T]:
        """The model of these weights; `load` brings it into memory if it is not there."""
        key = (weights, folder)
        if key not in self._loaded:
            yield Progress(stage=stage)
            while not self._lock.acquire(timeout=LOCK_POLL_S):
                yield Progress(stage=stage)
            try:
                if key not in self._loaded:
                    self._prepare_memory(job, weights)
                    self._loaded[key] = yield from load()
            finally:
                self._lock.release()
        return self._loaded[key]

    def _prepare_memory(self, job: Job, weights: Weights) -> None:
        """Fix the thread count, and unload all models if they cannot stay beside `weights`."""
        device.set_threads(job.device)
        others = [loaded for loaded, _ in self._loaded]
        if {*others, weights} <= {job.model, job.planner}:
            short = job.one_at_a_time  # the plan has counted these two
        else:
            sizes = [each.size_bytes for each in (*others, weights)]
            short = device.exceed_memory(sizes, job.device.kind)
        is_musicgen = isinstance(weights, MusicgenModel)
        if short or any(isinstance(each, MusicgenModel) != is_musicgen for each in others):
            self.unload_all()


def on_disk(weights: Weights) -> Path:
    """The folder of `weights`.

    Raises:
        StudioError: `model-missing`.
    """
    folder = checkpoints.locate(weights)
    if folder is None:
        raise StudioError(
            "model-missing", model=weights.title, size=weights.size, command=weights.command
        )
    return folder
