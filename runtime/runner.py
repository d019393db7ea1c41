"""A job on the device: make the sound, the words or the files, and say how it went.

On ZeroGPU `perform` runs in a forked process; elsewhere the same path runs in a thread.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from audio import analysis, encode, settings, splice
from audio.tags import Tags
from core.errors import StudioError
from core.files import write_text
from core.requests import (
    EDITION,
    EXPORTS,
    HELPERS,
    SAMPLE_RATE,
    Cover,
    Extend,
    Generate,
    Lyrics,
    Musicgen,
)
from core.results import Cancelled, Draft, Event, ExportedFiles, Failed, Progress, SeamCheck, Take
from models.acestep import Engine, RenderedAudio
from runtime import device, job_adapters, model_cache, planning
from runtime.job import Job

if TYPE_CHECKING:
    import numpy as np


def carry_out(job: Job) -> Iterator[Event]:
    """Do the job: progress, then one ending. Checks the stop flag wherever it yields."""
    ending = yield from _ended(job)
    device.free(job.place.device)
    yield ending


def _ended(job: Job) -> Iterator[Progress]:
    """The job's progress; what it came to is returned, and nothing of it is held any more."""
    watch = StageTimer()
    work = watch.over(_work(job, watch))
    try:
        for event in work:
            if job.stopped():
                work.close()
                return Cancelled(stage=watch.stage, elapsed_s=watch.elapsed())
            if not isinstance(event, Progress):
                return event
            yield event
    except StudioError as error:
        return Failed.from_error(error)
    except Exception as error:  # noqa: BLE001 - must not leave a ZeroGPU worker as an exception
        traceback.print_exc(file=sys.stderr)
        return Failed.from_error(StudioError("internal", kind=type(error).__name__))


@device.gpu(seconds=lambda job: job.gpu_seconds)
def perform(job: Job) -> Iterator[Event]:
    """`carry_out` on the device. On ZeroGPU, in a forked worker."""
    yield from carry_out(job)


def load(job: Job) -> Iterator[Progress]:
    """Bring the job's engine and planner into memory, if there is room for both."""
    yield from model_cache.engine(job)
    if job.planner and not job.in_turn:
        yield from model_cache.planner(job)


def _work(job: Job, watch: StageTimer) -> Iterator[Event]:
    request = job.request
    if request.mode in HELPERS:
        return planning.answer(job)
    if request.mode in EXPORTS:
        return _finished(job)
    return _words(job, watch) if isinstance(request, Lyrics) else _song(job, watch)


class StageTimer:
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


def _song(job: Job, watch: StageTimer) -> Iterator[Event]:
    how = _composed if isinstance(job.request, Musicgen) else _rendered
    piece, thoughts, playing = yield from how(job)
    yield Progress(stage="Writing", step=0, steps=1)
    check = analysis.check(piece.sound, thoughts.song).model_dump(mode="json")
    take = Take(
        id=job.id,
        path=str(job.wav),
        mode=job.request.mode,
        request=job.request.model_dump(mode="json"),
        model=model_cache.used(job.model, job.source),
        planner=model_cache.used(job.planner, job.planner_folder) if job.planner else None,
        device=job.place.used(),
        sample_rate=SAMPLE_RATE,
        samples=piece.sound.shape[1],
        peak_dbfs=piece.peak_dbfs,
        timings_s=watch.seconds(),
        notes=(*job.notes, *piece.notes),
        plan=thoughts.plan_values(),
        codes=tuple(thoughts.codes),
        files=job.files,
        changed_outside=piece.changed_outside,
        seams=tuple(_seam(piece, *edge) for edge in piece.crossfades),
        adapters=tuple(each.model_dump() for each in playing),
        check=check,
        edition=EDITION,
        made_at=datetime.now(UTC),
        studio=studio_version(),
    )
    told, licence = settings.settings_of(take), job.model.licence
    tags = Tags(_title(take.request["prompt"] or job.wav.stem), job.model.title, licence)
    yield from encode.save(piece.sound, job.wav, "wav", told, tags)
    write_text(job.wav.with_suffix(".json"), json.dumps(told, indent=2) + "\n")
    yield take.model_copy(update={"timings_s": watch.seconds()})


def _composed(job: Job) -> Iterator[Progress]:
    """MusicGen's piece; nobody thinks first, and no adapter plays (all three returned)."""
    composer = yield from model_cache.composer(job)
    piece = yield from composer.generate(job.request)
    asked = Generate.model_construct(prompt=job.request.prompt)
    return piece, planning.PlannedSong(asked, asked), ()


def _rendered(job: Job) -> Iterator[Progress]:
    """ACE-Step's piece, what was thought before it, and the adapters that played (returned)."""
    sounds = {name: job.sound(name) for name in job.sounds}
    thoughts = yield from planning.think(job, sounds)
    engine = yield from model_cache.engine(job)
    playing = yield from job_adapters.play(job, engine)
    piece = yield from _made(job, engine, thoughts, sounds)
    return piece, thoughts, playing


def _made(
    job: Job, engine: Engine, thoughts: planning.PlannedSong, sounds: dict[str, np.ndarray]
) -> Iterator[Progress]:
    """The operation that the request's mode asks for; returns the `RenderedAudio` piece."""
    import pipeline
    from pipeline import region_of

    request, song, source = job.request, thoughts.song, sounds.get("source")
    timbre = yield from model_cache.encoded(job, engine, "reference", sounds, pipeline.timbre_of)
    if source is None:
        return (yield from pipeline.compose(engine, song, codes=thoughts.codes, timbre=timbre))
    if isinstance(request, Extend):
        return (
            yield from pipeline.extend(
                engine, song, source, before_s=request.before_s, after_s=request.after_s
            )
        )
    clean = yield from model_cache.encoded(job, engine, "source", sounds, pipeline.encode)
    if isinstance(request, Cover):
        return (
            yield from pipeline.cover(
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
            yield from pipeline.morph(
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
    grip = pipeline.RepaintSettings.of(request.repaint_mode, request.repaint_strength)
    region = region_of(request, source.shape[1])
    return (yield from pipeline.repaint(engine, song, source, [region], grip, clean))


def _seam(piece: RenderedAudio, at: int, half_width: int) -> SeamCheck:
    heard = splice.measure_seam(piece.sound, at, half_width, SAMPLE_RATE)
    return SeamCheck(at_s=at / SAMPLE_RATE, **heard._asdict())


def _words(job: Job, watch: StageTimer) -> Iterator[Event]:
    """Write a song's words, or write a broken draft again."""
    request = job.request
    writer = yield from model_cache.songwriter(job)
    if request.repair:
        written = yield from writer.repair(request, request.repair)
    else:
        written = yield from writer.write(request)
    yield Draft(
        id=job.id,
        text=written.text,
        asked=written.asked,
        got=written.got,
        request=request.model_dump(mode="json"),
        model=model_cache.used(job.writer, job.writer_folder),
        device=job.place.used(),
        timings_s=watch.seconds(),
        notes=(*job.notes, *written.notes),
        made_at=datetime.now(UTC),
        studio=studio_version(),
    )


def _finished(job: Job) -> Iterator[Event]:
    """Make files of a finished take: another format, a set loudness, or stems."""
    import post_process
    from models import demucs

    request, sound, notes = job.request, job.sound("source"), job.notes
    name = request.source.stem[:80]
    if request.mode == "stems":
        separator = yield from model_cache.separator(job)
        stems = yield from demucs.separate(separator, sound)
        files = yield from post_process.save_stems(stems, job.folder, name)
        paths, facts, notes = (files.zip, *files.wavs.values()), {}, (*notes, demucs.LICENCE_NOTE)
    else:
        told, facts = settings.read_settings(request.source) if request.settings else None, {}
        if request.mode == "master":
            sound, loud = yield from post_process.master(
                sound, request.target_lufs, request.ceiling_dbtp
            )
            name, facts = f"{name}-master", loud.model_dump(mode="json")
            told = told and settings.with_mastering(told, request)
        paths = (job.folder / f"{name}.{request.format}",)
        tags = _tags(request.source, request.ai_generated)
        yield from encode.save(sound, paths[0], request.format, told, tags)
    yield ExportedFiles(mode=request.mode, paths=tuple(map(str, paths)), facts=facts, notes=notes)


def _tags(source: Path, ai_generated: bool = True) -> Tags:
    """What players are to show of a file made from `source`, by the settings it holds."""
    told = settings.read_settings(source) or {}
    model = told.get("model", {})
    title = _title(told.get("request", {}).get("prompt") or source.stem)
    licence = model.get("licence", "unknown")
    return Tags(title, model.get("name", "unknown"), licence, ai_generated)


def _title(words: str) -> str:
    """The first words of a style, as a title."""
    kept = " ".join(words.split())
    return kept if len(kept) <= 60 else kept[:60].rpartition(" ")[0] or kept[:60]


def studio_version() -> str:
    """Of this studio, as a take records it."""
    try:
        return version("ace-music-studio")
    except PackageNotFoundError:
        return "source"
