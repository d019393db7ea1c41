"""The job that makes a song with MusicGen."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from core.requests import Generate
from core.results import Progress, Take
from models import musicgen
from models.weights import Weights
from runtime.job import Job, JobFolder, Setup, with_seed
from runtime.model_cache import ModelCache
from runtime.planning import PlannedSong
from runtime.stage_timer import StageTimer
from runtime.takes import save_take
from runtime.uploads import Uploads


class MusicgenTask:
    """A song without words by MusicGen, always in float32."""

    on_device = True

    def prepare(
        self, request: Any, setup: Setup, folder: JobFolder, uploads: Uploads
    ) -> Generator[Progress, None, Job]:
        """See `Task.prepare`."""
        yield from ()
        request = with_seed(request)
        return Job(
            request=request,
            folder=folder,
            device=replace(setup.device, dtype="float32"),
            musicgen=setup.musicgen,
            duration_s=request.duration_s,
        )

    def cost(self, job: Job, loaded: Callable[[Weights | None], bool]) -> dict[str, float]:
        """Loading counts once, everything else by the seconds of the song."""
        return {
            musicgen.LOADING: float(not loaded(job.musicgen)),
            musicgen.COMPOSING: job.duration_s,
            musicgen.RENDERING: job.duration_s,
            "Writing": job.duration_s,
        }

    def run(
        self, job: Job, models: ModelCache, timer: StageTimer
    ) -> Generator[Progress, None, Take]:
        """See `Task.run`."""
        engine = yield from models.musicgen(job)
        song = yield from engine.generate(job.request)
        asked = Generate.model_construct(prompt=job.request.prompt)
        return (yield from save_take(job, models, timer, song, PlannedSong(asked, asked)))
