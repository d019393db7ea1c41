"""The job that writes lyrics."""

from __future__ import annotations

from collections.abc import Callable, Generator
from datetime import UTC, datetime
from typing import Any

from core.params import filled
from core.results import Draft, Progress
from models import checkpoints
from models.weights import Weights
from runtime.job import Job, JobFolder, Setup, with_seed
from runtime.model_cache import ModelCache
from runtime.stage_timer import StageTimer
from runtime.takes import studio_version
from runtime.uploads import Uploads


class LyricsTask:
    """Lyrics written to a brief, or a draft repaired."""

    on_device = True

    def prepare(
        self, request: Any, setup: Setup, folder: JobFolder, uploads: Uploads
    ) -> Generator[Progress, None, Job]:
        """See `Task.prepare`.

        Raises:
            StudioError: `writer-missing`: a songwriter is fetched only when told to.
        """
        yield from ()
        checkpoints.find_songwriter(setup.songwriter)
        return Job(
            request=with_seed(request),
            folder=folder,
            device=setup.device,
            songwriter=setup.songwriter,
        )

    def cost(self, job: Job, loaded: Callable[[Weights | None], bool]) -> dict[str, float]:
        """Both stages count once."""
        return {"Loading the songwriter": 1.0, "Writing the words": 1.0}

    def run(
        self, job: Job, models: ModelCache, timer: StageTimer
    ) -> Generator[Progress, None, Draft]:
        """See `Task.run`."""
        request = job.request
        songwriter = yield from models.songwriter(job)
        if request.repair:
            written = yield from songwriter.repair(request, request.repair)
        else:
            written = yield from songwriter.write(request)
        return Draft(
            id=job.id,
            text=written.text,
            asked=written.requested,
            got=written.found,
            request=request.model_dump(mode="json"),
            model=models.used(filled(job.songwriter)),
            device=job.device.used(),
            timings_s=timer.seconds(),
            notes=(*job.notes, *written.notes),
            made_at=datetime.now(UTC),
            studio=studio_version(),
        )
