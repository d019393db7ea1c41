"""What every kind of job provides, and the table of all of them.

A new kind of request needs one new file with a `Task`, and one line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

from core.results import Draft, ExportedFiles, Idea, Progress, Take
from models.weights import Weights
from runtime.export_task import ExportTask, StemsTask
from runtime.job import Job, JobFolder, Setup
from runtime.lyrics_task import LyricsTask
from runtime.model_cache import ModelCache
from runtime.musicgen_task import MusicgenTask
from runtime.planner_task import InspireTask, ListenTask, RewriteTask
from runtime.song_task import CoverTask, EditTask, ExtendTask, GenerateTask
from runtime.stage_timer import StageTimer
from runtime.uploads import Uploads

Result = Take | Draft | Idea | ExportedFiles
"""What a job that ran to its end yields last."""


class Task(Protocol):
    """One kind of job: how a request becomes a job, what it costs, and how it is run."""

    on_device: bool
    """Whether `run` needs the device, and so a turn in its queue."""

    def prepare(
        self, request: Any, setup: Setup, folder: JobFolder, uploads: Uploads
    ) -> Generator[Progress, None, Job]:
        """Check `request` and settle everything that it leaves open.

        Raises:
            StudioError: the request cannot be run with this setup.
        """
        ...

    def cost(self, job: Job, loaded: Callable[[Weights | None], bool]) -> dict[str, float]:
        """How many units each stage will cost, in order: what `estimates.Rates` multiplies.

        Args:
            loaded: whether weights are in memory already, so that loading them costs nothing.
        """
        ...

    def run(
        self, job: Job, models: ModelCache, timer: StageTimer
    ) -> Generator[Progress, None, Result]:
        """Do the work; every yield is a point at which the job can be stopped.

        Raises:
            StudioError: the work failed.
        """
        ...


TASKS: dict[str, Task] = {
    "generate": GenerateTask(),
    "cover": CoverTask(),
    "extend": ExtendTask(),
    "edit": EditTask(),
    "musicgen": MusicgenTask(),
    "lyrics": LyricsTask(),
    "inspire": InspireTask(),
    "rewrite": RewriteTask(),
    "listen": ListenTask(),
    "export": ExportTask(),
    "master": ExportTask(),
    "stems": StemsTask(),
}
"""By `Request.mode`."""
