"""The jobs that make a song with ACE-Step: Generate, Cover, Extend and Edit."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pipeline
from audio import decode
from core.errors import StudioError
from core.params import filled
from core.requests import (
    AUDIO_FIELDS,
    REGION_EDITS,
    TRACK_EDITS,
    Edit,
    Extend,
    Generate,
    SongRequest,
    effective_lyrics,
)
from core.results import LyricLine, Progress, Take
from models import lyric_attention, lyric_timing, sampler
from models.plan_format import requested_fields
from models.weights import Weights
from runtime import device, job_adapters, planning
from runtime.job import Job, JobFolder, Setup, with_seed
from runtime.model_cache import ModelCache
from runtime.planning import PlannedSong, needs_planner
from runtime.stage_timer import StageTimer
from runtime.takes import save_take
from runtime.uploads import JobFiles, Uploads

if TYPE_CHECKING:
    from models.acestep import Engine, RenderedAudio
    from models.catalog import Model

DRAFT = (
    "Draft: Fast preview estimated some of the steps. For the finished song, use these settings with"
    " Fast preview off."
)

log = logging.getLogger(__name__)

IGNORED_WHEN_LISTENING = ("lm_cfg_scale", "lm_negative_prompt")
"""Planner settings that only composing codes can use."""


class SongTask(ABC):
    """What the four song modes share."""

    on_device = True
    listens = True
    """Whether the planner listens to an uploaded song instead of planning a new one."""

    def prepare(
        self, request: Any, setup: Setup, folder: JobFolder, uploads: Uploads
    ) -> Generator[Progress, None, Job]:
        """See `Task.prepare`.

        Raises:
            StudioError: `song-too-long`, `planner-missing`; those of `job_adapters.take_in` and
                `Uploads.copy_into`; those of the mode's `check_files`.
        """
        notes: list[str] = []
        request = self.settle(with_seed(request), setup, notes)
        references, adapters = job_adapters.copy_into(folder, request.adapters, setup.model, notes)
        if any(getattr(request, name, None) for name in AUDIO_FIELDS):
            yield Progress(stage="Reading the file")
        files = uploads.copy_into(folder, request)
        request = request.model_copy(update={**files.paths, "adapters": references})
        self.check_files(request, files, setup)
        return Job(
            request=request,
            folder=folder,
            device=setup.device,
            model=setup.model,
            planner=setup.planner if needs_planner(request, setup.edition) else None,
            duration_s=self.duration_s(request, files),
            sounds=files.sounds,
            seconds=files.seconds,
            sha256s=files.sha256s,
            adapters=adapters,
            plan=setup.plan,
            edition=setup.edition,
            notes=(*notes, *files.notes),
        )

    def settle(self, request: SongRequest, setup: Setup, notes: list[str]) -> SongRequest:
        """`request` with the model's own defaults where it leaves something open.

        Raises:
            StudioError: `song-too-long`, `planner-missing`.
        """
        model = setup.model
        length = getattr(request, "duration_s", 0.0)
        if length > model.longest_s and getattr(request, "source", None) is None:
            raise StudioError(
                "song-too-long", model=model.title, limit=model.longest_s, asked=length
            )
        if request.thinking and setup.planner is None:
            raise StudioError("planner-missing", reason=setup.no_planner)
        guidance = _or(request.guidance_scale, model.guidance)
        if model.guidance == 1 and guidance != 1:
            notes.append(f"{model.title} has its guidance built in; Guidance was set to 1.")
            guidance = 1.0
        if self.listens and setup.planner:
            notes += _ignored_settings(request)
        preview, preview_note = self._preview(request, model)
        notes += preview_note
        return request.model_copy(
            update={
                "fast_preview": preview,
                "inference_steps": _or(request.inference_steps, model.steps),
                "guidance_scale": guidance,
                "shift": _or(request.shift, model.shift),
                "thinking": _or(request.thinking, self.thinks_by_default(setup)),
            }
        )

    def _preview(self, request: SongRequest, model: Model) -> tuple[bool, list[str]]:
        """Whether the song is a fast preview, and a note where a preview was requested."""
        if not request.fast_preview:
            return False, []
        if model.guidance == 1:
            return False, [f"{model.title} takes few steps as it is; Fast preview was turned off."]
        if not self.can_preview(request):
            return False, [
                "Fast preview was turned off: it works with the ODE sampler, and not in a morph."
            ]
        return True, [DRAFT]

    def can_preview(self, request: SongRequest) -> bool:
        """Whether steps can be estimated: only along the one path of Euler's method."""
        return request.infer_method == "ode"

    def thinks_by_default(self, setup: Setup) -> bool:
        """What `thinking` is where the request leaves it open."""
        return setup.planner is not None

    def check_files(self, request: SongRequest, files: JobFiles, setup: Setup) -> None:
        """Refuse files that the mode cannot use.

        Raises:
            StudioError: `source-too-long`.
        """
        limit = setup.model.longest_s
        if files.seconds.get("source", 0.0) > limit + decode.FRAME_SLACK_S:
            raise StudioError("source-too-long", name=files.paths["source"].name, limit=limit)

    def duration_s(self, request: Any, files: JobFiles) -> float:
        """Length of the result, in seconds."""
        return files.seconds.get("source", getattr(request, "duration_s", 0.0))

    def cost(self, job: Job, loaded: Callable[[Weights | None], bool]) -> dict[str, float]:
        """Loading, planning and reading count once; denoising by network rows times seconds of
        sound; the rest by seconds."""
        uploaded = sum(job.seconds.values())
        return {
            "Loading": float(not loaded(job.model)),
            "Encoding": uploaded,
            "Loading the planner": float(job.planner is not None and not loaded(job.planner)),
            **self.planning_cost(job),
            "Reading adapters": float(len(job.adapters)),
            "Reading the words": 1.0,
            "Denoising": sampler.evaluations(sampler.SamplerConfig.of(job.request))
            * job.duration_s,
            "Decoding": job.duration_s,
            lyric_attention.STAGE: job.duration_s * _can_be_timed(job, job.request),
            "Writing": job.duration_s,
        }

    def planning_cost(self, job: Job) -> dict[str, float]:
        """The stages in which the planner works: listening, by the seconds of sound."""
        return {"Listening": sum(job.seconds.values()) if job.planner else 0.0}

    def run(
        self, job: Job, models: ModelCache, timer: StageTimer
    ) -> Generator[Progress, None, Take]:
        """See `Task.run`."""
        planned = yield from self.plan(job, models)
        engine = yield from models.engine(job)
        adapters = yield from models.apply_adapters(job, engine)
        song = yield from self.render(job, models, engine, planned)
        times = yield from _time_lyrics(job, engine, planned, song)
        return (yield from save_take(job, models, timer, song, planned, adapters, times))

    def plan(self, job: Job, models: ModelCache) -> Generator[Progress, None, PlannedSong]:
        """Let the planner do its part."""
        return (yield from planning.plan_from_audio(job, models))

    @abstractmethod
    def render(
        self, job: Job, models: ModelCache, engine: Engine, planned: PlannedSong
    ) -> Generator[Progress, None, RenderedAudio]:
        """Make the sound: the music task of the mode."""


class GenerateTask(SongTask):
    """A song from words."""

    listens = False

    def thinks_by_default(self, setup: Setup) -> bool:
        """Only where the model's planner writes codes worth following."""
        return setup.planner is not None and setup.model.uses_planner

    def planning_cost(self, job: Job) -> dict[str, float]:
        """Planning counts once; codes by the seconds of the song."""
        thinks = job.planner is not None
        return {
            "Planning": float(thinks and bool(requested_fields(job.request, job.edition))),
            "Composing codes": job.duration_s * (thinks and bool(job.request.thinking)),
        }

    def plan(self, job: Job, models: ModelCache) -> Generator[Progress, None, PlannedSong]:
        """Let the planner write metadata and codes."""
        return (yield from planning.plan_new_song(job, models))

    def duration_s(self, request: Generate, files: JobFiles) -> float:
        """Length of the result, in seconds."""
        return request.duration_s

    def render(
        self, job: Job, models: ModelCache, engine: Engine, planned: PlannedSong
    ) -> Generator[Progress, None, RenderedAudio]:
        """Text to music, with the planner's codes and the timbre of a reference if there is one."""
        timbre = yield from models.encoded(job, engine, "reference", pipeline.encode_timbre)
        return (
            yield from pipeline.text_to_music(
                engine, planned.song, codes=planned.codes, timbre=timbre, edition=job.edition
            )
        )


class CoverTask(SongTask):
    """A song in another style, or a new one with the timbre of a reference."""

    def render(
        self, job: Job, models: ModelCache, engine: Engine, planned: PlannedSong
    ) -> Generator[Progress, None, RenderedAudio]:
        """The cover, or text to music where there is only a reference."""
        request = job.request
        timbre = yield from models.encoded(job, engine, "reference", pipeline.encode_timbre)
        if "source" not in job.sounds:
            return (
                yield from pipeline.text_to_music(
                    engine, planned.song, timbre=timbre, edition=job.edition
                )
            )
        clean = yield from models.encoded(job, engine, "source", pipeline.encode)
        return (
            yield from pipeline.cover(
                engine,
                planned.song,
                job.sound("source"),
                follow=request.follow,
                strength=request.strength,
                noise=request.noise,
                timbre=timbre,
                clean=clean,
                edition=job.edition,
            )
        )


class ExtendTask(SongTask):
    """A song made longer at its beginning, its end, or both."""

    def check_files(self, request: Extend, files: JobFiles, setup: Setup) -> None:
        """Refuse a source that is too long, or that would become too long.

        Raises:
            StudioError: `source-too-long`, `extended-too-long`.
        """
        super().check_files(request, files, setup)
        limit, whole = setup.model.longest_s, self.duration_s(request, files)
        if whole > limit:
            raise StudioError(
                "extended-too-long",
                model=setup.model.title,
                limit=limit,
                asked=whole,
                over=whole - limit,
            )

    def duration_s(self, request: Extend, files: JobFiles) -> float:
        """Length of the result, in seconds."""
        return request.before_s + files.seconds["source"] + request.after_s

    def render(
        self, job: Job, models: ModelCache, engine: Engine, planned: PlannedSong
    ) -> Generator[Progress, None, RenderedAudio]:
        """The source with new music before and after it."""
        request = job.request
        return (
            yield from pipeline.extend(
                engine,
                planned.song,
                job.sound("source"),
                before_s=request.before_s,
                after_s=request.after_s,
                edition=job.edition,
            )
        )


class EditTask(SongTask):
    """A song with a region or all of it changed, or with its tracks added to or taken apart."""

    def settle(self, request: Any, setup: Setup, notes: list[str]) -> SongRequest:
        """See `SongTask.settle`. A track's name stands in for a style that was left open.

        Raises:
            StudioError: as there; `tracks-need-base`.
        """
        if request.kind in TRACK_EDITS and not setup.model.edits_tracks:
            raise StudioError("tracks-need-base", model=setup.model.title)
        if request.kind in ("add_track", "extract") and not request.prompt.strip():
            request = request.model_copy(update={"prompt": request.track.replace("_", " ")})
        return super().settle(request, setup, notes)

    def can_preview(self, request: Edit) -> bool:
        """A morph draws new noise in every step, and so has no one path."""
        return super().can_preview(request) and request.kind != "morph"

    def check_files(self, request: Edit, files: JobFiles, setup: Setup) -> None:
        """Refuse a source that is too long, and a region outside of it.

        Raises:
            StudioError: `source-too-long`, `region-outside`, `region-empty`.
        """
        super().check_files(request, files, setup)
        if request.kind in REGION_EDITS:
            pipeline.region_of(request, files.samples["source"])

    def render(
        self, job: Job, models: ModelCache, engine: Engine, planned: PlannedSong
    ) -> Generator[Progress, None, RenderedAudio]:
        """The edit of the kind that was asked for."""
        request = job.request
        source = job.sound("source")
        clean = yield from models.encoded(job, engine, "source", pipeline.encode)
        if request.kind == "morph":
            return (
                yield from pipeline.morph(
                    engine,
                    planned.song,
                    source,
                    planned.source,
                    n_min=request.n_min,
                    n_max=request.n_max,
                    n_avg=request.n_avg,
                    clean=clean,
                    edition=job.edition,
                )
            )
        if request.kind == "extract":
            return (yield from pipeline.extract(engine, planned.song, source, request.track, clean))
        if request.kind == "accompany":
            tracks = request.tracks.split(", ") if request.tracks else []
            return (yield from pipeline.accompany(engine, planned.song, source, tracks, clean))
        settings = pipeline.RepaintSettings.of(request.repaint_mode, request.repaint_strength)
        region = pipeline.region_of(request, source.shape[1])
        return (
            yield from pipeline.repaint(
                engine,
                planned.song,
                source,
                [region],
                settings,
                clean,
                edition=job.edition,
                track=request.track if request.kind == "add_track" else "",
            )
        )


def _can_be_timed(job: Job, song: SongRequest) -> bool:
    """Whether a song has lyrics, and a model that sings them."""
    lyrics = effective_lyrics(song, job.edition)
    return filled(job.model).sings and lyric_timing.has_lines(lyrics)


def _time_lyrics(
    job: Job, engine: Engine, planned: PlannedSong, song: RenderedAudio
) -> Generator[Progress, None, tuple[LyricLine, ...]]:
    """When each line is sung; none where that is not known. A failure here never costs the song."""
    if song.latents is None or song.conditions is None or not _can_be_timed(job, planned.song):
        return ()
    try:
        lines, note = yield from lyric_attention.time_lyrics(
            engine,
            song.conditions,
            song.latents,
            effective_lyrics(planned.song, job.edition),
            planned.song.vocal_language,
            filled(job.request.inference_steps),
            song.lyric_regions,
        )
    except Exception:
        log.exception("The lyrics could not be timed")
        device.free(job.device.kind)
        lines, note = (), lyric_attention.FAILED
    song.notes += [note] if note else []
    return lines


def _ignored_settings(request: SongRequest) -> list[str]:
    """A note for each setting of `request` that listening cannot use."""
    return [
        f"{param.label} was ignored: here the planner only analyses the song."
        for param in request.params()
        if param.name in IGNORED_WHEN_LISTENING and getattr(request, param.name) != param.default
    ]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
