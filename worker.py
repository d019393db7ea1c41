"""A job on the device: load what it needs, think, make the sound, write the take.

On ZeroGPU `perform` runs in a forked process; elsewhere the same path runs in a thread.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import audio
import checkpoints
import grammar
import host
from errors import StudioError
from jobs import Job, lyrics_of, region_of, sung, wanted
from song import (
    HELPERS,
    SAMPLE_RATE,
    Cancelled,
    Cover,
    Edit,
    Event,
    Extend,
    Failed,
    Generate,
    Idea,
    ModelUsed,
    Progress,
    SeamHeard,
    Take,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline import Engine, Rendered
    from planner import Dice


TEMPERATURE = 0.85
"""At which the planner talks where no knob says otherwise. Source: the authors' default."""


@host.gpu(seconds=lambda job: job.gpu_seconds)
def perform(job: Job) -> Iterator[Event]:
    """Do the job on the device: progress, then one ending. On ZeroGPU, in a forked worker.

    Checks the stop flag wherever it yields.
    """
    watch = Watch()
    work = watch.over(_answer(job) if job.request.mode in HELPERS else _song(job, watch))
    try:
        for event in work:
            if job.stopped():
                work.close()
                host.free(job.place.device)
                yield Cancelled(stage=watch.stage, elapsed_s=watch.elapsed())
                return
            yield event
    except StudioError as error:
        host.free(job.place.device)
        yield Failed.by(error)
    except Exception as error:  # noqa: BLE001 - must not leave a ZeroGPU worker as an exception
        traceback.print_exc(file=sys.stderr)
        yield Failed.by(StudioError("internal", kind=type(error).__name__))


class Watch:
    """Seconds spent in each stage, from the events that go by."""

    def __init__(self) -> None:
        self.stage = "Loading"
        self._began = self._since = time.monotonic()
        self._spent: dict[str, float] = defaultdict(float)

    def over(self, events: Iterator[Event]) -> Iterator[Event]:
        """`events`, looked at. Closing this closes them."""
        try:
            for event in events:
                if isinstance(event, Progress) and event.stage != self.stage:
                    self._lap()
                    self.stage = event.stage
                yield event
        finally:
            events.close()

    def seconds(self) -> dict[str, float]:
        """By stage, up to now."""
        self._lap()
        return dict(self._spent)

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def _lap(self) -> None:
        now = time.monotonic()
        self._spent[self.stage] += now - self._since
        self._since = now


@dataclass
class Thoughts:
    """What a piece is to be once everything is known.

    `song` is what the engine reads; `told` describes the source of a morph.
    """

    song: Generate
    told: Generate
    plan: grammar.Plan = field(default_factory=grammar.Plan)
    codes: list[int] = field(default_factory=list)


def _song(job: Job, watch: Watch) -> Iterator[Event]:
    sounds = {name: _sound(path) for name, path in job.sounds.items()}
    thoughts = yield from _think(job, sounds)
    engine = yield from _engine(job)
    piece = yield from _made(job, engine, thoughts, sounds)
    yield Progress(stage="Writing", step=0, steps=1)
    audio.write(job.wav, piece.sound, SAMPLE_RATE)
    take = Take(
        id=job.id,
        path=str(job.wav),
        mode=job.request.mode,
        request=job.request.model_dump(mode="json"),
        model=used(job.model, job.source),
        planner=used(job.planner, job.planner_folder) if job.planner else None,
        device=job.place.used(),
        sample_rate=SAMPLE_RATE,
        samples=piece.sound.shape[1],
        peak_dbfs=piece.peak_dbfs,
        timings_s=watch.seconds(),
        notes=(*job.notes, *piece.notes),
        plan=thoughts.plan.said(),
        codes=tuple(thoughts.codes),
        files=job.files,
        changed_outside=piece.changed_outside,
        seams=tuple(_seam(piece, *edge) for edge in piece.edges),
        made_at=datetime.now(UTC),
        studio=studio_version(),
    )
    told = take.told().model_dump(mode="json")
    audio.write_text(job.wav.with_suffix(".json"), json.dumps(told, indent=2) + "\n")
    yield take


def _made(
    job: Job, engine: Engine, thoughts: Thoughts, sounds: dict[str, np.ndarray]
) -> Iterator[Progress]:
    """The operation that the request's mode asks for; returns the `Rendered` piece."""
    import edits

    request, song, source = job.request, thoughts.song, sounds.get("source")
    timbre = yield from _encoded(job, engine, "reference", sounds, edits.timbre_of)
    if source is None:
        return (yield from edits.compose(engine, song, codes=thoughts.codes, timbre=timbre))
    if isinstance(request, Extend):
        return (
            yield from edits.extend(
                engine, song, source, before_s=request.before_s, after_s=request.after_s
            )
        )
    clean = yield from _encoded(job, engine, "source", sounds, edits.encode)
    if isinstance(request, Cover):
        return (
            yield from edits.cover(
                engine,
                song,
                source,
                strength=request.strength,
                noise=request.noise,
                timbre=timbre,
                clean=clean,
            )
        )
    if request.kind == "morph":
        return (
            yield from edits.morph(
                engine,
                song,
                source,
                thoughts.told,
                n_min=request.n_min,
                n_max=request.n_max,
                n_avg=request.n_avg,
                clean=clean,
            )
        )
    grip = edits.Grip.of(request.repaint_mode, request.repaint_strength)
    region = region_of(request, source.shape[1])
    return (yield from edits.repaint(engine, song, source, [region], grip, clean))


def _think(job: Job, sounds: dict[str, np.ndarray]) -> Iterator[Progress]:
    """Let the planner write or listen, and fill in what the request left open (returns `Thoughts`).

    What a person set stays. A style that was given is only rewritten where the piece is new.
    """
    request = job.request
    song = sung(request, job.duration_s)
    thoughts = Thoughts(song, song)
    if isinstance(request, Edit):
        thoughts.told = song.model_copy(
            update={"prompt": request.source_prompt, "lyrics": request.source_lyrics}
        )
    if job.planner is None:
        return thoughts
    if isinstance(request, Generate):
        yield from _plan(job, thoughts)
        return thoughts
    from planner import Dice

    plan = yield from _listen(job, sounds, Dice.of(request))
    thoughts.plan = kept = plan
    if song.prompt.strip() or not request.use_cot_caption:
        kept = replace(kept, caption=None)
    thoughts.song, _ = grammar.fill(song, kept)
    if isinstance(request, Edit):
        style = thoughts.told.prompt.strip() or thoughts.plan.caption or ""
        filled, _ = grammar.fill(thoughts.told, replace(thoughts.plan, caption=None))
        thoughts.told = filled.model_copy(update={"prompt": style})
    return thoughts


def _plan(job: Job, thoughts: Thoughts) -> Iterator[Progress]:
    """Plan a new piece, and compose its codes if the request wants them."""
    from planner import Dice

    request, song = job.request, thoughts.song
    lyrics, dice = lyrics_of(request), Dice.of(request)
    planner = yield from _planner(job)
    given = grammar.given_by(request, job.duration_s)
    plan = yield from planner.plan(
        request.prompt, lyrics, wanted(request), given, dice, request.seed
    )
    thoughts.plan = plan
    thoughts.song, _ = grammar.fill(song, plan)
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


def _listen(job: Job, sounds: dict[str, np.ndarray], dice: Dice) -> Iterator[Progress]:
    """Hear what the source is, or the reference where there is no source; returns its `Plan`."""
    import edits

    name = "source" if "source" in sounds else "reference"
    engine = yield from _engine(job)
    clean = yield from _encoded(job, engine, name, sounds, edits.encode)
    codes = edits.codes_of(engine, clean)
    del engine, clean
    planner = yield from _planner(job)
    plan, _ = yield from planner.understand(
        codes, dice, job.request.seed, lyrics=False, wanted=wanted(job.request)
    )
    return plan


_latents: OrderedDict[tuple, torch.Tensor | None] = OrderedDict()
REMEMBERED = 8
"""Encoded files kept for the next take: 1.5 MB for the longest."""


def _encoded(
    job: Job,
    engine: Engine,
    name: str,
    sounds: dict[str, np.ndarray],
    how: Callable[[Engine, np.ndarray], Iterator[Progress]],
) -> Iterator[Progress]:
    """Latents of the file that came in as `name`, made once; None if there is none (returned)."""
    import pipeline

    if name not in sounds:
        return None
    key = (job.source, job.place, job.files[name], how.__name__)
    if key not in _latents:
        with pipeline.memory(engine.device, job.model, job.duration_s):
            _latents[key] = yield from how(engine, sounds[name])
        while len(_latents) > REMEMBERED:
            _latents.popitem(last=False)
    _latents.move_to_end(key)
    return _latents[key]


def _answer(job: Job) -> Iterator[Event]:
    """What the planner alone can tell: an idea for a song, fuller words, or what it hears."""
    from planner import Dice

    request, lyrics, dice = job.request, "", Dice(TEMPERATURE, 1.0, 0)
    if request.mode == "listen":
        plan = yield from _listen(job, {"source": _sound(job.sounds["source"])}, dice)
    else:
        planner = yield from _planner(job)
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
        prompt=plan.caption or "",
        lyrics=lyrics,
        bpm=plan.bpm,
        keyscale=plan.keyscale or "",
        timesignature=plan.timesignature or "",
        vocal_language=plan.language or "unknown",
        duration_s=plan.duration_s,
    )


def _sound(path: Path) -> np.ndarray:
    import numpy as np

    return np.load(path)


def _seam(piece: Rendered, at: int, half_width: int) -> SeamHeard:
    heard = audio.seam(piece.sound, at, half_width, SAMPLE_RATE)
    return SeamHeard(at_s=at / SAMPLE_RATE, **heard._asdict())


def used(weights: checkpoints.Weights, folder: Path) -> ModelUsed:
    """Which weights made something, as a take records it."""
    return ModelUsed(
        name=weights.name,
        source=weights.repo,
        revision=checkpoints.revision(weights, folder),
        sha256=_fingerprints[folder],
        licence=weights.licence,
        may_sell=weights.may_sell,
    )


_resident: dict[tuple, Any] = {}
_fingerprints: dict[Path, str] = {}
_loading = threading.Lock()


def load(job: Job) -> Iterator[Progress]:
    """Bring the job's engine and planner into memory, if there is room for both."""
    yield from _engine(job)
    if job.planner and not job.in_turn:
        yield from _planner(job)


def is_loaded(weights: checkpoints.Weights | None) -> bool:
    """Whether `weights` are in memory already."""
    return any(key[0] == weights for key in list(_resident))


def _engine(job: Job) -> Iterator[Progress]:
    """The engine of the job's model, loaded if it is not there yet (returned)."""

    def load() -> Iterator[Progress]:
        from pipeline import Engine

        engine = yield from Engine.load(job.model, job.source, job.place.device, job.place.dtype)
        _fingerprints[job.source] = checkpoints.fingerprint(job.source)
        return engine

    return (yield from _held(job, job.model, job.source, "Loading", load))


def _planner(job: Job) -> Iterator[Progress]:
    """The job's planner, loaded if it is not there yet (returned)."""

    def load() -> Iterator[Progress]:
        from planner import Planner

        home = job.planner.home(job.planner_folder)
        dtype = job.place.dtype if job.place.device == "cuda" else "float32"
        planner = yield from Planner.load(
            home, checkpoints.codebook(job.source), job.place.device, dtype
        )
        _fingerprints[job.planner_folder] = checkpoints.fingerprint(home)
        return planner

    return (yield from _held(job, job.planner, job.planner_folder, "Loading the planner", load))


def _held(
    job: Job,
    weights: checkpoints.Weights,
    folder: Path,
    stage: str,
    load: Callable[[], Iterator[Any]],
) -> Iterator[Any]:
    """What is resident under these weights; where memory is short, everything else goes first."""
    key = (weights, folder, job.place)
    if key not in _resident:
        yield Progress(stage=stage)
        with _loading:
            host.settle(job.place)
            if job.in_turn:
                _resident.clear()
                host.free(job.place.device)
            _resident[key] = yield from load()
    return _resident[key]


def studio_version() -> str:
    """Of this studio, as a take records it."""
    try:
        return version("ace-music-studio")
    except PackageNotFoundError:
        return "source"
