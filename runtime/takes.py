"""A finished song as a take: measured, described, and written with its settings."""

from __future__ import annotations

import json
from collections.abc import Generator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from audio import analysis, encode, lyric_files, settings, splice
from audio.metadata import title_of
from audio.tags import Tags
from core.files import atomic_write
from core.params import filled
from core.requests import SAMPLE_RATE
from core.results import AdapterUsed, LyricLine, Progress, SeamCheck, Take
from runtime.job import Job
from runtime.model_cache import ModelCache
from runtime.planning import PlannedSong
from runtime.stage_timer import StageTimer

if TYPE_CHECKING:
    from models.acestep import RenderedAudio


def save_take(
    job: Job,
    models: ModelCache,
    timer: StageTimer,
    song: RenderedAudio,
    planned: PlannedSong,
    adapters: tuple[AdapterUsed, ...] = (),
    lyric_times: tuple[LyricLine, ...] = (),
) -> Generator[Progress, None, Take]:
    """Measure `song`, and write it into the job's folder as a WAV with its settings inside, a JSON
    file beside it, and the times of its lyrics as LRC and SRT where they are known.

    Raises:
        StudioError: `sound-not-finite`, `disk-full`, `not-writable`.
    """
    yield Progress(stage="Writing", step=0, steps=1)
    weights = job.musicgen or filled(job.model)
    check = analysis.check(song.sound, planned.song).model_dump(mode="json")
    take = Take(
        id=job.id,
        path=str(job.song_path),
        mode=job.request.mode,
        request=job.request.model_dump(mode="json"),
        model=models.used(weights),
        planner=models.used(job.planner) if job.planner else None,
        device=job.device.used().model_copy(update={"implementation": song.implementation}),
        sample_rate=SAMPLE_RATE,
        samples=song.sound.shape[1],
        peak_dbfs=song.peak_dbfs,
        timings_s=timer.seconds(),
        notes=(*job.notes, *song.notes),
        plan=planned.plan_values(),
        codes=tuple(planned.codes),
        files=job.sha256s,
        changed_outside=song.changed_outside,
        seams=tuple(_seam_check(song, *edge) for edge in song.crossfades),
        adapters=tuple(each.model_dump() for each in adapters),
        check=check,
        lyric_times=lyric_times,
        memory_plan=job.plan.settings() if job.model else {},
        edition=job.edition,
        made_at=datetime.now(UTC),
        studio=studio_version(),
    )
    stored = settings.settings_of(take)
    title = title_of(job.request.prompt) or job.song_path.stem
    tags = Tags(title, weights.title, weights.licence)
    yield from encode.save(song.sound, job.song_path, "wav", stored, tags)
    atomic_write(job.song_path.with_suffix(".json"), json.dumps(stored, indent=2) + "\n")
    if take.lyric_times:
        lyric_files.write(take.lyric_times, job.song_path, lyric_files.FORMATS)
    return take.model_copy(update={"timings_s": timer.seconds()})


def studio_version() -> str:
    """The version of this studio, as a take records it."""
    try:
        return version("ace-music-studio")
    except PackageNotFoundError:
        return "source"


def _seam_check(song: RenderedAudio, at: int, half_width: int) -> SeamCheck:
    seam = splice.measure_seam(song.sound, at, half_width, SAMPLE_RATE)
    return SeamCheck(at_s=at / SAMPLE_RATE, **seam._asdict())
