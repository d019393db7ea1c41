"""The studio: accept a request, run it, keep the results. One way for page, API and command line."""

from __future__ import annotations

import contextvars
import logging
import queue
import shutil
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from core.errors import StudioError
from core.files import cache_folder, write_error
from core.params import AdapterRef, Request
from core.requests import EDITION
from core.results import (
    AdapterInfo,
    AudioInfo,
    Event,
    ExportedFiles,
    Failed,
    ModelEntry,
    ModelInfo,
    Progress,
    Take,
)
from models import catalog, checkpoints, demucs, musicgen
from runtime import device, estimates, job_adapters, memory_choice, model_list, planning
from runtime.downloads import Downloads
from runtime.job import Job, JobFolder, Setup
from runtime.runner import Ending, LocalRunner, stoppable
from runtime.stage_timer import StageTimer
from runtime.tasks import TASKS
from runtime.uploads import Uploads

log = logging.getLogger(__name__)

RESULTS_KEPT = 10
"""Takes, and exported files, kept for each visitor."""

HEARTBEAT_S = 1.0
"""A running job yields an event at least this often."""


class Studio:
    """One model on one device, for any number of visitors."""

    def __init__(
        self,
        model: catalog.Model,
        place: device.Device,
        planner: str = "",
        musicgen_folder: str | Path = "",
        *,
        precision: str = "",
        offload: str = "",
    ) -> None:
        """Choose the models that go with `model`. Nothing is loaded yet.

        Args:
            planner: one of `catalog.PLANNERS`, a folder, or "none"; empty for the best.
            musicgen_folder: a copy of MusicGen; empty for that in the hub's cache.
            precision, offload: see `memory_choice.choose`.

        Raises:
            StudioError: `model-unknown`, `value-out-of-range`.
        """
        chosen, no_planner = planning.find_planner(model, place, planner)
        plan = memory_choice.choose(model, place, chosen, precision, offload)
        self.setup = Setup(
            model=model,
            device=replace(place, dtype=plan.dtype),
            plan=plan,
            planner=chosen,
            no_planner=no_planner,
            songwriter=checkpoints.choose_songwriter(place.kind, device.memory_gb(place.kind)),
            musicgen=musicgen.choose(musicgen_folder),
        )
        self.runner = LocalRunner(self.setup)
        self._uploads = Uploads()
        self._downloads = Downloads()
        self._results: dict[tuple[str, type], deque[Take | ExportedFiles]] = defaultdict(deque)
        self._running: dict[str, set[JobFolder]] = defaultdict(set)
        self._abandoned: set[JobFolder] = set()
        self._loading: threading.Thread | None = None
        self._lock = threading.Lock()

    def model_info(self) -> ModelInfo:
        """The chosen model with its defaults, for the page's badge and its form."""
        setup, model = self.setup, self.setup.model
        return ModelInfo(
            name=model.name,
            title=model.title,
            licence=model.licence,
            may_sell=model.may_sell,
            device=f"{device.device_name(setup.device.kind)} · {setup.plan.title}",
            hint=_hint(model, setup.device),
            steps=model.steps,
            guidance=model.guidance,
            shift=model.shift,
            longest_s=model.longest_s,
            takes_guidance=model.guidance > 1,
            edits_tracks=model.edits_tracks,
            sings=model.sings,
            planner=setup.planner.title if setup.planner else "",
            no_planner=setup.no_planner,
            writer=setup.songwriter.title,
            no_writer=_problem(lambda: checkpoints.find_songwriter(setup.songwriter)),
            stems=demucs.LICENCE_NOTE,
            no_stems=_problem(demucs.find),
            memory=setup.plan.reason,
        )

    def models(self) -> tuple[ModelEntry, ...]:
        """Every model that this machine could run, with the state of its download."""
        return model_list.list_models(self.setup, self._downloads)

    def fetch(self, name: str) -> None:
        """Begin to download a model, or resume it; `models` reports how far it is.

        Raises:
            StudioError: `model-unknown`; also on a Space, where nothing may be fetched.
        """
        if not self._entry(name).on_disk:
            self._downloads.start(catalog.BY_NAME[name])

    def stop_fetch(self, name: str) -> None:
        """Stop a download; what has arrived stays on disk, and `fetch` resumes it."""
        self._downloads.stop(name)

    def use(self, name: str) -> None:
        """Let later jobs use another songwriter or planner. Running jobs keep theirs.

        Raises:
            StudioError: `model-unknown`, also for a model that cannot be chosen here.
        """
        self._entry(name)
        planners = {planner.name: planner for planner in catalog.PLANNERS}
        if name in catalog.SONGWRITERS:
            self.setup = replace(self.setup, songwriter=catalog.SONGWRITERS[name])
        elif name in planners and self.setup.planner:
            self.setup = replace(self.setup, planner=planners[name])
        else:
            known = ", ".join((*catalog.SONGWRITERS, *planners))
            raise StudioError("model-unknown", name=name, known=known)

    def _entry(self, name: str) -> ModelEntry:
        """The list's entry for a model that a visitor may change."""
        known = {each.name: each for each in self.models()}
        if name not in known or name not in catalog.BY_NAME or device.ON_SPACE:
            raise StudioError("model-unknown", name=name[:80], known=", ".join(known))
        return known[name]

    def inspect_audio(self, path: Path) -> AudioInfo:
        """Length and waveform of the file at `path`, which is then decoded for its jobs, too.

        Raises:
            StudioError: `source-missing`, `source-unreadable`, `source-too-long`,
                `source-too-short`, `disk-full`, `not-writable`.
        """
        return self._uploads.read(Path(path)).info

    def check_adapter(self, adapter: AdapterRef) -> AdapterInfo:
        """Check an adapter against the model before anything is made with it.

        Raises:
            StudioError: those of `job_adapters.judge`.
        """
        return job_adapters.info(job_adapters.judge(adapter, self.setup.model))

    def run(
        self, request: Request, visitor: str, edition: int = EDITION
    ) -> Generator[Event, None, None]:
        """Run `request`. Yields `Progress` at least once a second, then exactly one ending.

        Closing the iterator stops the work at its next step. Every failure is yielded, never
        raised.

        Args:
            edition: of the rules by which songs are made; an older one to replay an old file.
        """
        try:
            folder = JobFolder.create()
        except OSError as error:
            yield Failed.from_error(write_error(cache_folder(), error, 1 << 20))
            return
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        time_left = estimates.TimeLeft(self.runner.rates, {}, time.monotonic)
        with self._lock:
            self._running[visitor].add(folder)
        threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._serve, request, edition, folder, visitor, time_left, events.put),
            daemon=True,
        ).start()
        ended = False
        try:
            while not ended:
                try:
                    event = events.get(timeout=HEARTBEAT_S)
                except queue.Empty:
                    event = time_left.tick()
                else:
                    event = time_left.tick(event) if isinstance(event, Progress) else event
                ended = not isinstance(event, Progress)
                yield event
        finally:
            if not ended:
                self._stop(visitor, folder)

    def stop(self, visitor: str) -> None:
        """End every running job of `visitor` as `Cancelled`."""
        self._stop(visitor)

    def leave(self, visitor: str) -> None:
        """The visitor is gone: stop their jobs, delete their takes and files."""
        self.stop(visitor)
        with self._lock:
            self._abandoned |= self._running.get(visitor, set())
            for kind in (Take, ExportedFiles):
                for kept in self._results.pop((visitor, kind), ()):
                    _delete(kept)

    def takes(self, visitor: str) -> tuple[Take, ...]:
        """The visitor's takes, newest first, at most `RESULTS_KEPT`."""
        with self._lock:
            kept = self._results.get((visitor, Take), ())
            return tuple(take for take in kept if isinstance(take, Take))

    def warm(self) -> None:
        """On ZeroGPU, load all that a song needs, which must happen before the page is launched.

        Elsewhere `load_in_background` does it, or the first job.
        """
        if device.ON_ZERO:
            for _ in self.runner.preload(self._songs_models(self.setup.planner)):
                pass

    def load_in_background(self) -> None:
        """Load what a song needs in a thread of its own, so that the next job starts at once.

        A job that comes meanwhile waits for this load. What is not on disk is left to the job that
        needs it, and so is reporting a failure. Does nothing on ZeroGPU, where `warm` does it.
        """
        if not device.ON_ZERO:
            self._loading = threading.Thread(target=self._load, daemon=True)
            self._loading.start()

    def is_loading(self) -> bool:
        """Whether a load in the background is under way, or waits for the device."""
        return self._loading is not None and self._loading.is_alive()

    def _load(self) -> None:
        setup = self.setup
        try:
            if checkpoints.locate(setup.model) is None:
                return
            planner = setup.planner if setup.planner and checkpoints.locate(setup.planner) else None
            with self.runner.queue.enter("Loading") as waiting:
                for _ in waiting:
                    pass
                for _ in self.runner.models.preload(self._songs_models(planner)):
                    pass
        except Exception:  # the job that needs the model loads it again and reports
            log.debug("The model was not loaded in the background.", exc_info=True)

    def _songs_models(self, planner: catalog.PlannerModel | None) -> Job:
        """A job that stands for the models of a song."""
        setup = self.setup
        return Job(
            request=None,
            folder=JobFolder(Path()),
            device=setup.device,
            model=setup.model,
            planner=planner,
            plan=setup.plan,
        )

    def _serve(
        self,
        request: Request,
        edition: int,
        folder: JobFolder,
        visitor: str,
        time_left: estimates.TimeLeft,
        emit: Callable[[Event], None],
    ) -> None:
        """The job's own thread: run it, then keep its result or delete its folder."""
        work = self._work(request, edition, folder, time_left)
        try:
            while True:
                try:
                    emit(next(work))
                except StopIteration as end:
                    ending: Event = end.value
                    break
        except Exception as error:  # noqa: BLE001 - the studio yields failures, it raises none
            ending = Failed.from_error(error)
        self._keep(ending, folder, visitor)
        emit(ending)

    def _work(
        self, request: Request, edition: int, folder: JobFolder, time_left: estimates.TimeLeft
    ) -> Generator[Progress, None, Ending]:
        """Prepare the job, then run it."""
        setup = replace(self.setup, edition=edition)
        preparing = TASKS[request.mode].prepare(request, setup, folder, self._uploads)
        timer = StageTimer("Reading the file")
        job = yield from stoppable(preparing, folder, timer)
        if not isinstance(job, Job):
            return job
        return (yield from self.runner.run(job, time_left.expect))

    def _keep(self, ending: Event, folder: JobFolder, visitor: str) -> None:
        """Put a take or exported files among the visitor's; delete the folder of anything else."""
        with self._lock:
            self._running[visitor].discard(folder)
            if not self._running[visitor]:
                del self._running[visitor]
            if folder in self._abandoned or not isinstance(ending, Take | ExportedFiles):
                self._abandoned.discard(folder)
                folder.remove()
                return
            folder.stop_file.unlink(missing_ok=True)
            for sound in folder.path.glob("*/sound.npy"):
                sound.unlink()
            kept = self._results[visitor, type(ending)]
            kept.appendleft(ending)
            while len(kept) > RESULTS_KEPT:
                _delete(kept.pop())

    def _stop(self, visitor: str, only: JobFolder | None = None) -> None:
        with self._lock:
            for folder in self._running.get(visitor, ()):
                if only in (None, folder):
                    folder.stop_file.touch()


def _problem(find: Callable[[], object]) -> str:
    """Why what `find` looks for is missing; empty where it is not."""
    try:
        find()
    except StudioError as error:
        return str(error)
    return ""


def _delete(kept: Take | ExportedFiles) -> None:
    path = kept.path if isinstance(kept, Take) else kept.paths[0]
    shutil.rmtree(Path(path).parent, ignore_errors=True)


def _hint(model: catalog.Model, place: device.Device) -> str | None:
    """One sentence for people whose machine runs a small model, or runs a big one slowly."""
    big = catalog.MODELS["xl-sft"]
    if model.name == "mini":
        return (
            "This is the small embedded model: simple instrumental sketches in seconds, on any "
            f"machine; for full songs with vocals run {big.title} ({big.size}) on a GPU: "
            "python app.py --model xl-sft."
        )
    if place.kind == "cpu":
        return (
            f"{model.title} runs on the processor here and takes many minutes a song; "
            "python app.py --model mini makes a song in seconds."
        )
    return None
