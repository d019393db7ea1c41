"""Jobs that the planner alone does: an idea for a song, a fuller style and lyrics, listening."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, ClassVar

from core.errors import StudioError
from core.params import filled
from core.results import Idea, Progress
from models.plan_format import Plan, shorten_caption
from models.token_sampling import SamplingParams
from models.weights import Weights
from runtime.job import Job, JobFolder, Setup, with_seed
from runtime.model_cache import ModelCache
from runtime.planning import listen
from runtime.stage_timer import StageTimer
from runtime.uploads import Uploads

TEMPERATURE = 0.85
"""The planner's temperature where no parameter sets it. Source: the authors' default."""


class InspireTask:
    """A whole song thought up from one idea, or from none."""

    on_device = True
    stage: ClassVar[str] = "Thinking of a song"

    def prepare(
        self, request: Any, setup: Setup, folder: JobFolder, uploads: Uploads
    ) -> Generator[Progress, None, Job]:
        """See `Task.prepare`.

        Raises:
            StudioError: `planner-missing`; those of `Uploads.copy_into`.
        """
        if setup.planner is None:
            raise StudioError("planner-missing", reason=setup.no_planner)
        request = with_seed(request)
        if getattr(request, "source", None):
            yield Progress(stage="Reading the file")
        files = uploads.copy_into(folder, request)
        return Job(
            request=request.model_copy(update=files.paths),
            folder=folder,
            device=setup.device,
            model=setup.model,
            planner=setup.planner,
            plan=setup.plan,
            sounds=files.sounds,
            seconds=files.seconds,
            sha256s=files.sha256s,
            notes=files.notes,
        )

    def cost(self, job: Job, loaded: Callable[[Weights | None], bool]) -> dict[str, float]:
        """Loading counts once; listening by the seconds of sound."""
        seconds = job.seconds.get("source", 0.0)
        return {
            "Loading": float(bool(seconds) and not loaded(job.model)),
            "Encoding": seconds,
            "Loading the planner": float(not loaded(job.planner)),
            self.stage: 1.0 + seconds,
        }

    def run(
        self, job: Job, models: ModelCache, timer: StageTimer
    ) -> Generator[Progress, None, Idea]:
        """See `Task.run`."""
        plan, lyrics = yield from self.answer(job, models, SamplingParams(TEMPERATURE, 1.0, 0))
        return Idea(
            prompt=shorten_caption(plan.caption or ""),
            lyrics=lyrics,
            bpm=plan.bpm,
            keyscale=plan.keyscale or "",
            timesignature=plan.timesignature or "",
            vocal_language=plan.language or "unknown",
            duration_s=plan.duration_s,
        )

    def answer(
        self, job: Job, models: ModelCache, sampling: SamplingParams
    ) -> Generator[Progress, None, tuple[Plan, str]]:
        """The plan and the lyrics that make the answer."""
        request = job.request
        planner = yield from models.planner(job)
        return (
            yield from planner.inspire(
                request.idea,
                request.instrumental,
                sampling,
                request.seed,
                request.vocal_language,
                int(filled(job.model).longest_s),
            )
        )


class RewriteTask(InspireTask):
    """Style and lyrics in the form that the model was trained on."""

    stage = "Rewriting"

    def answer(
        self, job: Job, models: ModelCache, sampling: SamplingParams
    ) -> Generator[Progress, None, tuple[Plan, str]]:
        """The plan and the lyrics that make the answer."""
        request = job.request
        language = request.vocal_language
        given = {} if language == "unknown" else {"language": language}
        planner = yield from models.planner(job)
        return (
            yield from planner.rewrite(
                request.prompt,
                request.lyrics,
                given,
                sampling,
                request.seed,
                int(filled(job.model).longest_s),
            )
        )


class ListenTask(InspireTask):
    """Style, tempo, key, time signature and language detected in an uploaded song."""

    stage = "Listening"

    def answer(
        self, job: Job, models: ModelCache, sampling: SamplingParams
    ) -> Generator[Progress, None, tuple[Plan, str]]:
        """The plan and the lyrics that make the answer."""
        return (yield from listen(job, models, sampling))
