"""The jobs that make files of a finished song: another format, a set loudness, stems."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import post_process
from audio import encode, metadata, settings
from audio.tags import Tags
from core.requests import Master
from core.results import ExportedFiles, Progress
from models import demucs
from models.weights import Weights
from runtime.job import Job, JobFolder, Setup
from runtime.model_cache import ModelCache
from runtime.stage_timer import StageTimer
from runtime.uploads import Uploads

STAGES = {"export": "Writing", "master": "Setting the loudness", "stems": "Splitting into stems"}
"""The stage that takes the time."""


class ExportTask:
    """A song as another file, mastered first if that is asked for."""

    on_device = False

    def prepare(
        self, request: Any, setup: Setup, folder: JobFolder, uploads: Uploads
    ) -> Generator[Progress, None, Job]:
        """See `Task.prepare`.

        Raises:
            StudioError: those of `Uploads.copy_into`.
        """
        yield Progress(stage="Reading the file")
        files = uploads.copy_into(folder, request)
        return Job(
            request=request.model_copy(update=files.paths),
            folder=folder,
            device=setup.device,
            sounds=files.sounds,
            seconds=files.seconds,
            sha256s=files.sha256s,
            notes=files.notes,
        )

    def cost(self, job: Job, loaded: Callable[[Weights | None], bool]) -> dict[str, float]:
        """By the seconds of sound."""
        return {STAGES[job.request.mode]: job.seconds["source"]}

    def run(
        self, job: Job, models: ModelCache, timer: StageTimer
    ) -> Generator[Progress, None, ExportedFiles]:
        """See `Task.run`."""
        request = job.request
        sound, name, facts = job.sound("source"), request.source.stem[:80], {}
        stored, tags, notes = _settings_and_tags(job)
        stored = stored if request.settings else None
        if isinstance(request, Master):
            sound, loudness = yield from post_process.master(
                sound, request.target_lufs, request.ceiling_dbtp
            )
            name, facts = f"{name}-master", loudness.model_dump(mode="json")
            stored = settings.with_mastering(stored, request) if stored else None
        path = job.folder.path / f"{name}.{request.format}"
        yield from encode.save(sound, path, request.format, stored, tags)
        return ExportedFiles(mode=request.mode, paths=(str(path),), facts=facts, notes=notes)


class StemsTask(ExportTask):
    """A song split into vocals, drums, bass and the rest."""

    on_device = True

    def run(
        self, job: Job, models: ModelCache, timer: StageTimer
    ) -> Generator[Progress, None, ExportedFiles]:
        """See `Task.run`."""
        request = job.request
        separator = yield from models.separator(job)
        stems = yield from demucs.separate(separator, job.sound("source"))
        name = request.source.stem[:80]
        _, tags, notes = _settings_and_tags(job)
        files = yield from post_process.save_stems(stems, job.folder.path, name, tags)
        return ExportedFiles(
            mode=request.mode,
            paths=tuple(map(str, (files.zip, *files.wavs.values()))),
            facts={},
            notes=(*notes, demucs.LICENCE_NOTE),
        )


def _settings_and_tags(job: Job) -> tuple[dict[str, Any] | None, Tags, tuple[str, ...]]:
    """The settings inside the job's source, the tags of files made from it, and the job's notes.

    Neither settings nor tags that cannot be read stop the work; a note says so.
    """
    request = job.request
    stored, about_settings = settings.usable_settings(request.source)
    asked = getattr(request, "ai_generated", None)
    if "ai_generated" not in request.model_fields_set:
        asked = None
    tags, about_tags = metadata.tags_for(request.source, stored, job.folder.path, asked)
    return stored, tags, (*job.notes, *about_settings, *about_tags)
