"""Request in, events out: the one way to a song for the page, the API and the command line.

Owns the queue for the device, the stop flags, the shelf of takes, and what files came in.
"""

from __future__ import annotations

import contextvars
import queue
import secrets
import shutil
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import lyrics
from core.errors import StudioError
from core.files import cache_folder, private_folder, write_error
from core.params import AdapterRef, Request
from core.requests import (
    EXPORTS,
    HELPERS,
    MAX_SEED,
    Edit,
    Extend,
    Generate,
    Lyrics,
    Musicgen,
    SongRequest,
)
from core.results import (
    AdapterInfo,
    AudioInfo,
    Cancelled,
    Event,
    ExportedFiles,
    Failed,
    ModelInfo,
    Progress,
    Take,
)
from models import catalog, checkpoints, demucs, musicgen
from pipeline import region_of
from runtime import device, estimates, job_adapters, model_cache, planning, runner
from runtime.device_queue import DeviceQueue
from runtime.estimates import cautious, work_of
from runtime.job import Job
from runtime.planning import thinks
from runtime.uploads import Uploads

SHELF = 10
"""Takes kept for each visitor."""

HEARTBEAT_S = 1.0
"""A running job is heard from at least this often."""

SOURCES = ("source", "reference")
"""Fields of requests that are files."""

OnEvent = Callable[[Event], None]


class Studio:
    """One model on one device, any number of visitors."""

    def __init__(
        self,
        model: catalog.Model,
        place: device.Device,
        planner: str = "",
        musicgen_folder: str | Path = "",
    ) -> None:
        """One model, and MusicGen beside it.

        Args:
            planner: one of `planner.PLANNERS`, a folder, or "none"; empty for the best.
            musicgen_folder: a copy of MusicGen; empty for that in the hub's cache.
        """
        self.model = model
        self.place = place
        self.planner, self._no_planner = planning.find_planner(model, place, planner)
        self.writer = lyrics.choose(place.device)
        self.musicgen = musicgen.choose(musicgen_folder)
        self._rates = estimates.Rates(f"{place.speed_class}|{model.name}")
        self._turn = DeviceQueue()
        self._sources = Uploads()
        self._shelf: dict[str, deque[Take]] = defaultdict(deque)
        self._made: dict[str, deque[ExportedFiles]] = defaultdict(deque)
        self._running: dict[str, set[Path]] = defaultdict(set)
        self._orphans: set[Path] = set()
        self._guard = threading.Lock()

    def card(self) -> ModelInfo:
        """What is playing, for the page's badge and its defaults."""
        place, model = self.place, self.model
        return ModelInfo(
            name=model.name,
            title=model.title,
            licence=model.licence,
            may_sell=model.may_sell,
            device=f"{device.device_name(place.device)} · {place.dtype}",
            hint=_hint(model, place),
            steps=model.steps,
            guidance=model.guidance,
            shift=model.shift,
            longest_s=model.longest_s,
            takes_guidance=model.guidance > 1,
            planner=self.planner.title if self.planner else "",
            no_planner=self._no_planner,
            writer=self.writer.title,
            no_writer=_why_not(lambda: lyrics.find(self.writer)),
            stems=demucs.LICENCE_NOTE,
            no_stems=_why_not(demucs.find),
        )

    def look(self, path: Path) -> AudioInfo:
        """How long the file at `path` is and how it looks; what is read here is not read again.

        Raises:
            StudioError: `source-missing`, `source-unreadable`, `source-too-long`,
                `source-too-short`, `disk-full`, `not-writable`.
        """
        return self._sources.read(Path(path)).look

    def fit(self, worn: AdapterRef) -> AdapterInfo:
        """Judge an adapter before anything is made with it.

        Raises:
            StudioError: those of `adapters.judge`.
        """
        return job_adapters.seen(job_adapters.judge(worn, self.model))

    def run(self, request: Request, visitor: str) -> Iterator[Event]:
        """Do what is asked. Yields `Progress` at least once a second, then exactly one ending.

        Closing the iterator stops the work at its next step. Every failure is yielded, never
        raised.
        """
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        try:
            job = self._accept(request)
        except StudioError as error:
            yield Failed.from_error(error)
            return
        except OSError as error:
            yield Failed.from_error(write_error(cache_folder(), error, 1 << 20))
            return
        clock = estimates.TimeLeft(self._rates, {}, time.monotonic)
        with self._guard:
            self._running[visitor].add(job.flag)
        threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._serve, job, visitor, clock, inbox.put),
            daemon=True,
        ).start()
        ended = False
        try:
            while not ended:
                try:
                    event = inbox.get(timeout=HEARTBEAT_S)
                except queue.Empty:
                    event = clock.tick()
                else:
                    event = clock.tick(event) if isinstance(event, Progress) else event
                ended = not isinstance(event, Progress)
                yield event
        finally:
            if not ended:
                self._flag(visitor, job.flag)

    def stop(self, visitor: str) -> None:
        """Let every running job of `visitor` end as `Cancelled`."""
        self._flag(visitor)

    def leave(self, visitor: str) -> None:
        """The visitor is gone: stop their jobs, forget their takes and files."""
        self.stop(visitor)
        with self._guard:
            self._orphans |= self._running.get(visitor, set())
            for kept in (*self._shelf.pop(visitor, ()), *self._made.pop(visitor, ())):
                _discard(kept)

    def takes(self, visitor: str) -> tuple[Take, ...]:
        """The visitor's takes, newest first, at most `SHELF`."""
        with self._guard:
            return tuple(self._shelf.get(visitor, ()))

    def warm(self) -> None:
        """Load all that will be needed. On ZeroGPU this must happen before the page is launched."""
        job = self._job(Request(), ())
        try:
            for _ in (fetching := _Returning(self._ready(job))):
                pass
            for _ in runner.load(fetching.value):
                pass
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)

    def _accept(self, request: Request) -> Job:
        """Resolve what the request leaves open. What comes out is what the take records."""
        notes: list[str] = []
        changes = {}
        if hasattr(request, "seed"):
            changes["seed"] = _given(request.seed, secrets.randbelow(MAX_SEED + 1))
        if isinstance(request, SongRequest):
            changes |= self._resolved(request, notes)
        elif isinstance(request, Lyrics):
            lyrics.find(self.writer)
        elif request.mode in HELPERS and self.planner is None:
            raise StudioError("planner-missing", reason=self._no_planner)
        return self._job(request.model_copy(update=changes), tuple(notes))

    def _resolved(self, request: SongRequest, notes: list[str]) -> dict:
        model = self.model
        length = getattr(request, "duration_s", 0.0)
        if length > model.longest_s and getattr(request, "source", None) is None:
            raise StudioError(
                "song-too-long", model=model.title, limit=model.longest_s, asked=length
            )
        if request.thinking and self.planner is None:
            raise StudioError("planner-missing", reason=self._no_planner)
        guidance = _given(request.guidance_scale, model.guidance)
        if model.guidance == 1 and guidance != 1:
            notes.append(f"{model.title} has its guidance built in; Guidance was set to 1.")
            guidance = 1.0
        if not isinstance(request, Generate) and self.planner:
            deaf = [k for k in request.params() if k.name in ("lm_cfg_scale", "lm_negative_prompt")]
            notes += [
                f"{k.label} was left out: listening follows the song."
                for k in deaf
                if getattr(request, k.name) != k.default
            ]
        return {
            "inference_steps": _given(request.inference_steps, model.steps),
            "guidance_scale": guidance,
            "shift": _given(request.shift, model.shift),
            "thinking": _given(
                request.thinking,
                self.planner is not None
                and (model.uses_planner or not isinstance(request, Generate)),
            ),
        }

    def _job(self, request: Request, notes: tuple[str, ...]) -> Job:
        name = secrets.token_hex(8)
        folder = private_folder() / name
        folder.mkdir(mode=0o700)
        model, place = self.model, self.place
        if isinstance(request, Musicgen):
            model, place = self.musicgen, replace(place, dtype="float32")
        planner = self.planner if thinks(request) else None
        writer = self.writer if isinstance(request, Lyrics) else None
        weights = [each for each in (model, planner, writer) if each]
        return Job(
            id=name,
            request=request,
            model=model,
            source=Path(),
            place=place,
            folder=folder,
            notes=notes,
            planner=planner,
            writer=writer,
            in_turn=len(weights) > 1 and model_cache.short_of_memory(weights, place),
        )

    def _with_files(self, job: Job) -> Job:
        """The job with the files of its request read, and kept as its own.

        Raises:
            StudioError: those of `Uploads.lend`; `source-too-long`, `extended-too-long`,
                `region-outside`, `region-empty`.
        """
        changes, sounds, seconds, files, notes = {}, {}, {}, {}, list(job.notes)
        for field in SOURCES:
            path = getattr(job.request, field, None)
            if path is None:
                continue
            known, mine, sound = self._sources.lend(path, job.folder / field, job.stopped)
            sounds[field], seconds[field] = sound, known.look.seconds
            changes[field], files[field] = mine, known.sha256
            notes += known.look.notes
        source, limit = seconds.get("source", 0.0), self.model.longest_s
        if source > limit and isinstance(job.request, SongRequest):
            raise StudioError("source-too-long", name=changes["source"].name, limit=limit)
        if isinstance(job.request, Extend):
            whole = job.request.before_s + source + job.request.after_s
            if whole > limit:
                raise StudioError(
                    "extended-too-long",
                    model=self.model.title,
                    limit=limit,
                    asked=whole,
                    over=whole - limit,
                )
        if isinstance(job.request, Edit) and job.request.kind == "repaint":
            region_of(job.request, known.samples)
        return replace(
            job,
            request=job.request.model_copy(update=changes),
            sounds=sounds,
            seconds=seconds,
            files=files,
            notes=tuple(notes),
        )

    def _ready(self, job: Job) -> Iterator[Progress]:
        """Bring what is missing to disk; returns the job with the folders of its weights."""
        if job.request.mode in EXPORTS:
            return job
        needed = (job.writer,) if job.writer else (job.model, job.planner)
        found = {}
        for weights in filter(None, needed):
            folder = checkpoints.locate(weights)
            if folder is None or weights.missing(folder):
                folder = yield from checkpoints.fetch(weights)
            found[weights] = folder
        return replace(
            job,
            source=found.get(job.model, Path()),
            planner_folder=found.get(job.planner),
            writer_folder=found.get(job.writer),
        )

    def _flag(self, visitor: str, only: Path | None = None) -> None:
        with self._guard:
            for flag in self._running.get(visitor, ()):
                if only in (None, flag):
                    flag.touch()

    def _work(self, job: Job) -> dict[str, float]:
        """The stages this job will go through on the device, with the units each will cost."""
        return work_of(job, model_cache.is_loaded(job.model), model_cache.is_loaded(job.planner))

    def _serve(self, job: Job, visitor: str, clock: estimates.TimeLeft, tell: OnEvent) -> None:
        """The job's own thread: read the files, wait, fetch, perform, put on the shelf."""
        ending: Event
        try:
            ending = self._perform(job, clock, tell)
        except StudioError as error:
            ending = Failed.from_error(error)
        except Exception as error:  # noqa: BLE001 - the face of the studio: nothing gets past it
            traceback.print_exc(file=sys.stderr)
            ending = Failed.from_error(StudioError("internal", kind=type(error).__name__))
        with self._guard:
            self._running[visitor].discard(job.flag)
            if not self._running[visitor]:
                del self._running[visitor]
            if job.flag in self._orphans or not isinstance(ending, Take | ExportedFiles):
                self._orphans.discard(job.flag)
                shutil.rmtree(job.folder, ignore_errors=True)
            else:
                job.flag.unlink(missing_ok=True)
                for sound in job.folder.glob("*/sound.npy"):
                    sound.unlink()
                shelf = (self._shelf if isinstance(ending, Take) else self._made)[visitor]
                shelf.appendleft(ending)
                while len(shelf) > SHELF:
                    _discard(shelf.pop())
        tell(ending)

    def _perform(self, job: Job, clock: estimates.TimeLeft, tell: OnEvent) -> Event:
        began = time.monotonic()

        def stopped_at(stage: str) -> Cancelled:
            return Cancelled(stage=stage, elapsed_s=time.monotonic() - began)

        if getattr(job.request, "adapters", ()):
            job = job_adapters.dressed(job)
        if any(getattr(job.request, field, None) for field in SOURCES):
            tell(Progress(stage="Reading the file"))
            try:
                job = self._with_files(job)
            except StudioError:
                if job.stopped():
                    return stopped_at("Reading the file")
                raise
        clock.expect(self._work(job))
        if job.request.mode in EXPORTS and job.request.mode != "stems":
            return self._listen(runner.carry_out(job), tell)
        with self._turn.wait(job.stopped, tell) as mine:
            if not mine:
                return stopped_at("Waiting")
            fetching = _Returning(self._ready(job))
            for event in fetching:
                tell(event)
                if job.stopped():
                    fetching.close()
                    return stopped_at(event.stage)
            job = fetching.value
            work = self._work(job)
            clock.expect(work)
            usual, guess = self._rates.usual(work), cautious(work, self.model)
            for attempt in (1, 2):
                asked = estimates.gpu_seconds(usual, guess, attempt)
                try:
                    ending = self._listen(runner.perform(replace(job, gpu_seconds=asked)), tell)
                except Exception as error:
                    trouble = device.gpu_trouble(error)
                    if trouble is None:
                        raise
                    if trouble != "aborted":
                        raise StudioError("gpu-refused", reason=trouble) from error
                    continue
                if isinstance(ending, Take):
                    spent = ending.timings_s
                    self._rates.learn({s: spent[s] for s in work if s in spent}, work)
                return ending
            raise StudioError("gpu-aborted")

    def _listen(self, events: Iterator[Event], tell: OnEvent) -> Event:
        for event in events:
            if not isinstance(event, Progress):
                return event
            tell(event)
        raise StudioError("internal", kind="NoEnding")


class _Returning:
    """Iterate a generator and keep what it returns in `value`."""

    def __init__(self, generator) -> None:
        self._generator = generator
        self.value = None

    def __iter__(self):
        self.value = yield from self._generator

    def close(self) -> None:
        self._generator.close()


def _why_not(find: Callable[[], object]) -> str:
    """Why what `find` looks for is not here; empty where it is."""
    try:
        find()
    except StudioError as error:
        return str(error)
    return ""


def _given(value, default):
    return default if value is None else value


def _discard(kept: Take | ExportedFiles) -> None:
    path = kept.path if isinstance(kept, Take) else kept.paths[0]
    shutil.rmtree(Path(path).parent, ignore_errors=True)


def _hint(model: catalog.Model, place: device.Device) -> str | None:
    """The one sentence a person on a small machine should read."""
    big = catalog.MODELS["xl-sft"]
    if model.name == "mini":
        return (
            "You hear the small embedded model: simple instrumental sketches in seconds, on any "
            f"machine; for full songs with vocals run {big.title} ({big.size}) on a GPU: "
            "python app.py --model xl-sft."
        )
    if place.device == "cpu":
        return (
            f"{model.title} runs on the processor here and takes many minutes a song; "
            "python app.py --model mini plays in seconds."
        )
    return None
