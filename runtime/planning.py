"""What the planner does for a job: which planner, what it is asked for, and what comes of it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from audio import analysis, levels
from core.errors import StudioError
from core.params import Request, filled
from core.requests import EDITION, Edit, Generate, SongRequest, effective_lyrics
from core.results import Progress
from models import catalog, checkpoints, plan_format
from models.plan_format import requested_fields, requests_lyrics
from models.token_sampling import SamplingParams
from runtime import device
from runtime.job import Job
from runtime.model_cache import ModelCache


@dataclass
class PlannedSong:
    """What the transformer is to render, once the planner has done its part.

    Attributes:
        song: what the transformer reads.
        source: what describes the source of a morph.
        plan: what the planner wrote of a new song, or detected in an uploaded one.
        codes: the audio codes that it composed, five a second.
        lyrics: those that it detected in an uploaded song.
    """

    song: Generate
    source: Generate
    plan: plan_format.Plan = field(default_factory=plan_format.Plan)
    codes: list[int] = field(default_factory=list)
    lyrics: str = ""

    def plan_values(self) -> dict[str, Any]:
        """The plan as a take records it, with the lyrics that were detected."""
        return self.plan.fields() | ({"lyrics": self.lyrics} if self.lyrics else {})


def needs_planner(request: Request, edition: int = EDITION) -> bool:
    """Whether the planner has anything to do for `request`."""
    if isinstance(request, Edit) and request.kind == "extract":
        return False  # told what the song is, the model makes all of it again
    composes = isinstance(request, Generate) and bool(request.thinking)
    return composes or bool(requested_fields(request, edition)) or requests_lyrics(request)


def as_song(request: SongRequest, duration_s: float) -> Generate:
    """The parts of `request` that the transformer reads, with the length of the result.

    Not validated again: the style of an edit may be empty, and its length is what it comes to.
    """
    shared = {name: getattr(request, name) for name in SongRequest.model_fields}
    return Generate.model_construct(**shared, duration_s=duration_s, reference=None)


def plan_new_song(job: Job, models: ModelCache) -> Generator[Progress, None, PlannedSong]:
    """Plan a new song, and compose its codes if the request wants them.

    What a person set stays as it is.
    """
    request = job.request
    planned = _unplanned(job)
    if job.planner is None:
        return planned
    lyrics, sampling = effective_lyrics(request), SamplingParams.of(request)
    planner = yield from models.planner(job)
    given = plan_format.requested_values(request, job.duration_s)
    planned.plan = yield from planner.plan(
        request.prompt,
        lyrics,
        requested_fields(request, job.edition),
        given,
        sampling,
        request.seed,
        edition=job.edition,
    )
    planned.song, _ = plan_format.fill(planned.song, planned.plan, edition=job.edition)
    if request.thinking:
        (planned.codes,) = yield from planner.compose(
            request.prompt,
            lyrics,
            planned.plan,
            job.duration_s,
            sampling,
            [request.seed],
            request.lm_cfg_scale,
            request.lm_negative_prompt,
            edition=job.edition,
        )
    return planned


def plan_from_audio(job: Job, models: ModelCache) -> Generator[Progress, None, PlannedSong]:
    """Detect what the uploaded song is, and fill in what the request leaves open.

    What a person set stays as it is; a style that was written is not rewritten.
    """
    request = job.request
    planned = _unplanned(job)
    if job.planner is None:
        return planned
    plan, lyrics = yield from listen(job, models, SamplingParams.of(request))
    planned.plan, planned.lyrics = plan, lyrics
    if planned.song.prompt.strip() or not request.use_cot_caption:
        plan = replace(plan, caption=None)
    planned.song, _ = plan_format.fill(planned.song, plan, lyrics, job.edition)
    if isinstance(request, Edit):
        style = planned.source.prompt.strip() or planned.plan.caption or ""
        without_caption = replace(planned.plan, caption=None)
        filled, _ = plan_format.fill(planned.source, without_caption, lyrics, job.edition)
        planned.source = filled.model_copy(update={"prompt": style})
    return planned


def listen(
    job: Job, models: ModelCache, sampling: SamplingParams
) -> Generator[Progress, None, tuple[plan_format.Plan, str]]:
    """Detect what the job's source is, or its reference where there is no source.

    Returns:
        The plan, and the lyrics where the request asks for them.
    """
    import pipeline

    name = "source" if "source" in job.sounds else "reference"
    sound = job.sound(name)
    if levels.is_silent(sound):
        return plan_format.Plan(caption="silence"), ""
    engine = yield from models.engine(job)
    latents = yield from models.encoded(job, engine, name, pipeline.encode)
    codes = pipeline.extract_codes(engine, filled(latents))
    del engine, latents
    planner = yield from models.planner(job)
    plan, lyrics = yield from planner.understand(
        codes,
        sampling,
        job.request.seed,
        lyrics=requests_lyrics(job.request),
        fields=requested_fields(job.request, job.edition),
        edition=job.edition,
    )
    tempo = corrected_tempo(plan.bpm, *analysis.tempo(sound))
    return replace(plan, bpm=tempo), lyrics


def corrected_tempo(detected: int | None, measured: float | None, sure: bool) -> int | None:
    """The tempo that the planner detected, corrected by the measured one where that is sure.

    A tempo, its double and its half measure alike; among them the planner decides.
    """
    if detected is None or measured is None or not sure:
        return detected
    alike = [
        bpm for bpm in (measured, 2 * measured, measured / 2) if abs(detected / bpm - 1) < 0.04
    ]
    found = round((alike or [measured])[0])
    return found if 30 <= found <= 300 else detected


def find_planner(
    model: catalog.Model, place: device.Device, name: str = ""
) -> tuple[catalog.PlannerModel | None, str]:
    """The planner to use with `model` on `place`, or None and the reason in a clause.

    Args:
        name: one of `catalog.PLANNERS`, a folder in the original layout, "none", or empty: then the
            model's own, or the largest that the device has room for (on a bare CPU the smallest).

    Raises:
        StudioError: `model-unknown`.
    """
    if name == "none":
        return None, "it was turned off with --planner none"
    sizes = {size.name: size for size in catalog.PLANNERS}
    own = Path(name).expanduser() if name else (model.folder or Path()) / "planner"
    if name in sizes:
        return sizes[name], ""
    if (own / "config.json").is_file():
        whole = sum(f.stat().st_size for f in own.glob("*.safetensors"))
        title = f"{model.title} planner" if not name else own.resolve().name
        return catalog.PlannerModel(
            name=own.resolve().name,
            title=title,
            repo=name if name else f"{model.repo}/planner",
            folder=own.resolve(),
            size_bytes=whole,
        ), ""
    if name:
        raise StudioError("model-unknown", name=name[:80], known=", ".join([*sizes, "none"]))
    if model.name == "mini":
        return None, "the embedded model has none"
    here = checkpoints.locate(model)
    if here is not None and not checkpoints.codebook(here):
        return None, f"{model.title} was published without audio codes"
    memory = device.memory_gb(place.kind)
    best = catalog.largest_planner(memory)
    if best is None:
        least = catalog.PLANNERS[0].min_memory_gb
        return None, f"the smallest needs {least:g} GB of memory and there are {memory:.1f}"
    chosen = catalog.PLANNERS[0] if place.kind == "cpu" else best
    if model.name not in catalog.MODELS and checkpoints.locate(chosen) is None:
        return None, f"{chosen.title} is not on this computer; fetch it with: {chosen.command}"
    return chosen, ""


def _unplanned(job: Job) -> PlannedSong:
    """The song as the request alone describes it."""
    song = as_song(job.request, job.duration_s)
    source = song
    if isinstance(job.request, Edit):
        described = {"prompt": job.request.source_prompt, "lyrics": job.request.source_lyrics}
        source = song.model_copy(update=described)
    return PlannedSong(song, source)
