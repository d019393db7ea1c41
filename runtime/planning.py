"""The planner's share of a job: to plan and compose a new piece, or to listen to what came in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio import analysis
from core.errors import StudioError
from core.params import Request
from core.requests import HELPERS, Edit, Generate, SongRequest, effective_lyrics
from core.results import Event, Idea, Progress
from models import catalog, checkpoints, plan_format
from models.plan_format import requested_fields, requests_lyrics
from models.token_sampling import SamplingParams
from runtime import device, model_cache
from runtime.job import Job

if TYPE_CHECKING:
    import numpy as np


def sung(request: SongRequest, duration_s: float) -> Generate:
    """The request as the engine reads it: words and knobs, and how long the piece is.

    Not checked again: the style of an edit may be empty, its length is what it comes to.
    """
    shared = {name: getattr(request, name) for name in SongRequest.model_fields}
    return Generate.model_construct(**shared, duration_s=duration_s, reference=None)


def thinks(request: Request) -> bool:
    """Whether the planner has anything to do for `request`."""
    if not isinstance(request, SongRequest):
        return request.mode in HELPERS
    composes = isinstance(request, Generate) and bool(request.thinking)
    return composes or bool(requested_fields(request)) or requests_lyrics(request)


TEMPERATURE = 0.85
"""At which the planner talks where no knob says otherwise. Source: the authors' default."""


@dataclass
class PlannedSong:
    """What a piece is to be once everything is known.

    `song` is what the engine reads; `told` describes the source of a morph.
    """

    song: Generate
    told: Generate
    plan: plan_format.Plan = field(default_factory=plan_format.Plan)
    codes: list[int] = field(default_factory=list)
    lyrics: str = ""
    """Those that the planner detected in the source."""

    def plan_values(self) -> dict[str, Any]:
        """The plan as a take records it, with the lyrics that were detected."""
        return self.plan.fields() | ({"lyrics": self.lyrics} if self.lyrics else {})


def think(job: Job, sounds: dict[str, np.ndarray]) -> Iterator[Progress]:
    """Let the planner write or listen, and fill in what the request left open (returns `PlannedSong`).

    What a person set stays. A style that was given is only rewritten where the piece is new.
    """
    request = job.request
    song = sung(request, job.duration_s)
    thoughts = PlannedSong(song, song)
    if isinstance(request, Edit):
        thoughts.told = song.model_copy(
            update={"prompt": request.source_prompt, "lyrics": request.source_lyrics}
        )
    if job.planner is None:
        return thoughts
    if isinstance(request, Generate):
        yield from _plan(job, thoughts)
        return thoughts
    plan, lyrics = yield from _listen(job, sounds, SamplingParams.of(request))
    thoughts.plan = kept = plan
    thoughts.lyrics = lyrics
    if song.prompt.strip() or not request.use_cot_caption:
        kept = replace(kept, caption=None)
    thoughts.song, _ = plan_format.fill(song, kept, lyrics)
    if isinstance(request, Edit):
        style = thoughts.told.prompt.strip() or thoughts.plan.caption or ""
        filled, _ = plan_format.fill(thoughts.told, replace(thoughts.plan, caption=None), lyrics)
        thoughts.told = filled.model_copy(update={"prompt": style})
    return thoughts


def _plan(job: Job, thoughts: PlannedSong) -> Iterator[Progress]:
    """Plan a new piece, and compose its codes if the request wants them."""
    request, song = job.request, thoughts.song
    lyrics, dice = effective_lyrics(request), SamplingParams.of(request)
    planner = yield from model_cache.planner(job)
    given = plan_format.requested_values(request, job.duration_s)
    plan = yield from planner.plan(
        request.prompt, lyrics, requested_fields(request), given, dice, request.seed
    )
    thoughts.plan = plan
    thoughts.song, _ = plan_format.fill(song, plan)
    if request.thinking:
        (thoughts.codes,) = yield from planner.compose(
            request.prompt,
            lyrics,
            plan,
            job.duration_s,
            dice,
            [request.seed],
            request.lm_cfg_scale,
            request.lm_negative_prompt,
        )


def _listen(job: Job, sounds: dict[str, np.ndarray], dice: SamplingParams) -> Iterator[Progress]:
    """Hear what the source is, or the reference where there is no source; returns its `Plan`
    and the lyrics, where the request asks for them."""
    import pipeline

    name = "source" if "source" in sounds else "reference"
    engine = yield from model_cache.engine(job)
    clean = yield from model_cache.encoded(job, engine, name, sounds, pipeline.encode)
    codes = pipeline.codes_of(engine, clean)
    del engine, clean
    planner = yield from model_cache.planner(job)
    plan, lyrics = yield from planner.understand(
        codes,
        dice,
        job.request.seed,
        lyrics=requests_lyrics(job.request),
        fields=requested_fields(job.request),
    )
    return replace(plan, bpm=_steadied(plan.bpm, *analysis.tempo(sounds[name]))), lyrics


def _steadied(heard: int | None, measured: float | None, sure: bool) -> int | None:
    """The tempo heard, corrected by the one measured where the measuring is sure of itself.

    What is heard decides between a tempo, its double and its half: those measure alike.
    """
    if heard is None or measured is None or not sure:
        return heard
    alike = [bpm for bpm in (measured, 2 * measured, measured / 2) if abs(heard / bpm - 1) < 0.04]
    found = round((alike or [measured])[0])
    return found if 30 <= found <= 300 else heard


def answer(job: Job) -> Iterator[Event]:
    """What the planner alone can tell: an idea for a song, fuller words, or what it hears."""
    request, lyrics, dice = job.request, "", SamplingParams(TEMPERATURE, 1.0, 0)
    if request.mode == "listen":
        plan, lyrics = yield from _listen(job, {"source": job.sound("source")}, dice)
    else:
        planner = yield from model_cache.planner(job)
        if request.mode == "inspire":
            plan, lyrics = yield from planner.inspire(
                request.idea,
                request.instrumental,
                dice,
                request.seed,
                request.vocal_language,
                int(job.model.longest_s),
            )
        else:
            spoken = request.vocal_language
            given = {} if spoken == "unknown" else {"language": spoken}
            plan, lyrics = yield from planner.rewrite(
                request.prompt, request.lyrics, given, dice, request.seed, int(job.model.longest_s)
            )
    yield Idea(
        prompt=plan_format.shorten_caption(plan.caption or ""),
        lyrics=lyrics,
        bpm=plan.bpm,
        keyscale=plan.keyscale or "",
        timesignature=plan.timesignature or "",
        vocal_language=plan.language or "unknown",
        duration_s=plan.duration_s,
    )


def find_planner(
    model: catalog.Model, place: device.Device, name: str = ""
) -> tuple[catalog.PlannerModel | None, str]:
    """The planner that goes with `model` at `place`, or None and the reason in a clause.

    Args:
        name: one of `planner.PLANNERS`, a folder in the original layout, "none", or empty: then the
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
    memory = device.memory_gb(place.device)
    best = catalog.largest_planner(memory)
    if best is None:
        least = catalog.PLANNERS[0].min_memory_gb
        return None, f"the smallest needs {least:g} GB of memory and there are {memory:.1f}"
    chosen = catalog.PLANNERS[0] if place.device == "cpu" else best
    if model.name not in catalog.MODELS and checkpoints.locate(chosen) is None:
        return None, f"{chosen.title} is not on this computer; fetch it with: {chosen.command}"
    return chosen, ""
