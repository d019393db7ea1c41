"""Request in, events out: the one way to a song for the page, the API and the command line.

Owns the loaded engine, the queue for the device, the cancel flags and the shelf of takes.
"""

from __future__ import annotations

import contextvars
import json
import queue
import re
import secrets
import shutil
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import audio
import checkpoints
import host
from errors import StudioError
from song import (
    MAX_SEED,
    SAMPLE_RATE,
    Cancelled,
    Card,
    Event,
    Failed,
    Generate,
    ModelUsed,
    Progress,
    Take,
)

if TYPE_CHECKING:
    from pipeline import Engine

SHELF = 10
"""Takes kept for each visitor."""

LONGEST_QUEUE = 16
"""Jobs that may wait for the device."""

HEARTBEAT_S = 1.0
"""A running job is heard from at least this often."""

STAGES = ("Loading", "Reading the words", "Denoising", "Decoding", "Writing")
"""What a song goes through once its turn has come and its model is on disk."""


Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """All that the GPU worker needs to know. Picklable: it may run in another process."""

    id: str
    request: Generate
    model: checkpoints.Model
    source: Path
    place: host.Place
    folder: Path  # the job's own, empty at first
    notes: tuple[str, ...]
    gpu_seconds: int

    @property
    def flag(self) -> Path:
        """The file whose existence means stop: the one signal that crosses processes."""
        return self.folder / "stop"

    @property
    def wav(self) -> Path:
        """Where the song goes, under a name that is worth downloading."""
        words = "-".join(re.findall(r"\w+", self.request.prompt.lower()))[:40].strip("-_")
        return self.folder / f"{words or self.request.mode}-{self.request.seed}.wav"

    def stopped(self) -> bool:
        return self.flag.exists()


class Studio:
    """One model on one device, any number of visitors."""

    def __init__(self, model: checkpoints.Model, place: host.Place) -> None:
        self.model = model
        self.place = place
        self._rates = host.Rates(f"{place.speed_class}|{model.name}")
        self._turn = Turns()
        self._shelf: dict[str, deque[Take]] = defaultdict(deque)
        self._running: dict[str, set[Path]] = defaultdict(set)
        self._orphans: set[Path] = set()
        self._guard = threading.Lock()

    def card(self) -> Card:
        """What is playing, for the page's badge and its defaults."""
        place, model = self.place, self.model
        return Card(
            name=model.name,
            title=model.title,
            licence=model.licence,
            may_sell=model.may_sell,
            device=f"{host.device_name(place.device)} · {place.dtype}",
            hint=_hint(model, place),
            steps=model.steps,
            guidance=model.guidance,
            shift=model.shift,
            longest_s=model.longest_s,
            takes_guidance=model.guidance > 1,
        )

    def run(self, request: Generate, visitor: str) -> Iterator[Event]:
        """Make the song. Yields `Progress` at least once a second, then exactly one ending.

        Closing the iterator stops the work at its next step. Every failure is yielded, never
        raised.
        """
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        try:
            job = self._accept(request)
        except StudioError as error:
            yield Failed.by(error)
            return
        except OSError as error:
            yield Failed.by(audio.no_room(host.cache_folder(), error, 1 << 20))
            return
        clock = host.Clock(self._rates, self._work(job), time.monotonic)
        with self._guard:
            self._running[visitor].add(job.flag)
        threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._serve, job, visitor, inbox.put),
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
            for take in self._shelf.pop(visitor, ()):
                _discard(take)

    def takes(self, visitor: str) -> tuple[Take, ...]:
        """The visitor's takes, newest first, at most `SHELF`."""
        with self._guard:
            return tuple(self._shelf.get(visitor, ()))

    def warm(self) -> None:
        """Load the engine now. On ZeroGPU this must happen before the page is launched."""
        folder = checkpoints.locate(self.model)
        if folder is None:
            for _ in (fetching := _Returning(checkpoints.fetch(self.model))):
                pass
            folder = fetching.value
        for _ in _engine(self.model, folder, self.place):
            pass

    def _accept(self, request: Generate) -> Job:
        """Resolve what the request leaves open. What comes out is what the take records."""
        model, notes = self.model, []
        if request.duration_s > model.longest_s:
            raise StudioError(
                "song-too-long",
                model=model.title,
                limit=model.longest_s,
                asked=request.duration_s,
            )
        guidance = _given(request.guidance_scale, model.guidance)
        if model.guidance == 1 and guidance != 1:
            notes.append(f"{model.title} has its guidance built in; Guidance was set to 1.")
            guidance = 1.0
        resolved = request.model_copy(
            update={
                "seed": _given(request.seed, secrets.randbelow(MAX_SEED + 1)),
                "inference_steps": _given(request.inference_steps, model.steps),
                "guidance_scale": guidance,
                "shift": _given(request.shift, model.shift),
            }
        )
        name = secrets.token_hex(8)
        folder = host.private_folder() / name
        folder.mkdir(mode=0o700)
        return Job(
            id=name,
            request=resolved,
            model=model,
            source=Path(),
            place=self.place,
            folder=folder,
            notes=tuple(notes),
            gpu_seconds=0,
        )

    def _flag(self, visitor: str, only: Path | None = None) -> None:
        with self._guard:
            for flag in self._running.get(visitor, ()):
                if only in (None, flag):
                    flag.touch()

    def _work(self, job: Job) -> dict[str, float]:
        """The stages this job will go through on the device, with the units each will cost."""
        return work_of(job.request, loaded=_is_loaded(self.model))

    def _serve(self, job: Job, visitor: str, tell: Tell) -> None:
        """The job's own thread: wait, fetch, perform, put on the shelf."""
        ending: Event
        try:
            ending = self._perform(job, tell)
        except StudioError as error:
            ending = Failed.by(error)
        except Exception as error:  # noqa: BLE001 - the face of the studio: nothing gets past it
            traceback.print_exc(file=sys.stderr)
            ending = Failed.by(StudioError("internal", kind=type(error).__name__))
        with self._guard:
            self._running[visitor].discard(job.flag)
            if not self._running[visitor]:
                del self._running[visitor]
            if job.flag in self._orphans or not isinstance(ending, Take):
                self._orphans.discard(job.flag)
                shutil.rmtree(job.folder, ignore_errors=True)
            else:
                job.flag.unlink(missing_ok=True)
                shelf = self._shelf[visitor]
                shelf.appendleft(ending)
                while len(shelf) > SHELF:
                    _discard(shelf.pop())
        tell(ending)

    def _perform(self, job: Job, tell: Tell) -> Event:
        began = time.monotonic()

        def stopped_at(stage: str) -> Cancelled:
            return Cancelled(stage=stage, elapsed_s=time.monotonic() - began)

        with self._turn.wait(job.stopped, tell) as mine:
            if not mine:
                return stopped_at("Waiting")
            folder = checkpoints.locate(self.model)
            if folder is None or checkpoints.missing(folder):
                fetching = _Returning(checkpoints.fetch(self.model))
                for event in fetching:
                    tell(event)
                    if job.stopped():
                        fetching.close()
                        return stopped_at(event.stage)
                folder = fetching.value
            work = self._work(job)
            usual = self._rates.usual(work)
            guess = _cautious(work, self.model)
            for attempt in (1, 2):
                asked = host.gpu_seconds(usual, guess, attempt)
                try:
                    ending = self._listen(replace(job, source=folder, gpu_seconds=asked), tell)
                except Exception as error:
                    trouble = host.gpu_trouble(error)
                    if trouble is None:
                        raise
                    if trouble != "aborted":
                        raise StudioError("gpu-refused", reason=trouble) from error
                    continue
                if isinstance(ending, Take):
                    self._rates.learn(
                        {s: ending.timings_s[s] for s in STAGES if s in ending.timings_s}, work
                    )
                return ending
            raise StudioError("gpu-aborted")

    def _listen(self, job: Job, tell: Tell) -> Event:
        for event in perform(job):
            if not isinstance(event, Progress):
                return event
            tell(event)
        raise StudioError("internal", kind="NoEnding")


class Turns:
    """A first-come-first-served queue for the device. On ZeroGPU everybody gets their own."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def wait(self, stopped: Callable[[], bool], tell: Tell) -> Iterator[bool]:
        """Entered when it is one's turn; False if `stopped` came first.

        Raises:
            StudioError: `queue-full`.
        """
        if host.ON_ZERO:
            yield not stopped()
            return
        me = object()
        with self._moved:
            if len(self._line) > LONGEST_QUEUE:
                raise StudioError("queue-full", waiting=len(self._line) - 1)
            self._line.append(me)
        try:
            with self._moved:
                while self._line[0] is not me and not stopped():
                    tell(Progress(stage="Waiting", step=self._line.index(me)))
                    self._moved.wait(timeout=0.2)
            yield not stopped()
        finally:
            with self._moved:
                self._line.remove(me)
                self._moved.notify_all()


def work_of(request: Generate, loaded: bool) -> dict[str, float]:
    """How many units each stage of `request` costs: what `host.Rates` multiplies.

    Loading and reading count once; denoising by rows times seconds of sound; the rest by seconds.
    """
    import sampler

    rows = sampler.evaluations(sampler.Course.of(request))
    work = {
        "Loading": 0.0 if loaded else 1.0,
        "Reading the words": 1.0,
        "Denoising": rows * request.duration_s,
        "Decoding": request.duration_s,
        "Writing": request.duration_s,
    }
    return {stage: units for stage, units in work.items() if units}


def _cautious(work: dict[str, float], model: checkpoints.Model) -> float:
    """Seconds a job may need on a GPU nobody has measured: 20 s to get going, then by arithmetic.

    XL computes 0.13 TFLOP a row and second of sound (27 guided steps of 240 s: 1.6 PFLOP), taken
    at 42 TFLOP/s, far below what such a card reaches; other models by their size.
    """
    share = model.size_bytes / checkpoints.MODELS["xl-sft"].size_bytes or 1.0
    return 20 + 0.003 * share * work["Denoising"] + 0.05 * work["Decoding"]


@host.gpu(seconds=lambda job: job.gpu_seconds)
def perform(job: Job) -> Iterator[Event]:
    """Make the song on the device: progress, then one ending. On ZeroGPU, in a forked worker.

    Checks the stop flag wherever it yields.
    """
    began, stage = time.monotonic(), "Loading"
    song = _song(job)
    try:
        for event in song:
            stage = event.stage if isinstance(event, Progress) else stage
            if job.stopped():
                song.close()
                host.free(job.place.device)
                yield Cancelled(stage=stage, elapsed_s=time.monotonic() - began)
                return
            yield event
    except StudioError as error:
        host.free(job.place.device)
        yield Failed.by(error)
    except Exception as error:  # noqa: BLE001 - must not leave a ZeroGPU worker as an exception
        traceback.print_exc(file=sys.stderr)
        yield Failed.by(StudioError("internal", kind=type(error).__name__))


def _song(job: Job) -> Iterator[Event]:
    began = time.monotonic()
    engine = yield from _engine(job.model, job.source, job.place)
    loaded = time.monotonic()
    (piece,) = yield from engine.text_to_music(job.request, [job.request.seed])
    yield Progress(stage="Writing", step=0, steps=1)
    writing = time.monotonic()
    audio.write(job.wav, piece.sound, SAMPLE_RATE)
    take = Take(
        id=job.id,
        path=str(job.wav),
        mode=job.request.mode,
        request=job.request.model_dump(),
        model=ModelUsed(
            name=job.model.name,
            source=job.model.repo,
            revision=checkpoints.revision(job.model, job.source),
            sha256=_fingerprints[job.source],
            licence=job.model.licence,
            may_sell=job.model.may_sell,
        ),
        device=job.place.used(),
        sample_rate=SAMPLE_RATE,
        samples=piece.sound.shape[1],
        peak_dbfs=piece.peak_dbfs,
        timings_s={
            "Loading": loaded - began,
            **piece.timings_s,
            "Writing": time.monotonic() - writing,
        },
        notes=(*job.notes, *piece.notes),
        made_at=datetime.now(UTC),
        studio=_studio_version(),
    )
    # The file tells its own name, not the folder of the machine that made it.
    told = take.model_copy(update={"path": job.wav.name}).model_dump(mode="json")
    audio.write_text(job.wav.with_suffix(".json"), json.dumps(told, indent=2) + "\n")
    yield take


_engines: dict[tuple[Path, host.Place], Engine] = {}
_fingerprints: dict[Path, str] = {}
_loading = threading.Lock()


def _is_loaded(model: checkpoints.Model) -> bool:
    return any(engine.model == model for engine in list(_engines.values()))


def _engine(model: checkpoints.Model, folder: Path, place: host.Place) -> Iterator[Progress]:
    """The engine for `model`, loaded if it is not there yet (returned)."""
    key = (folder, place)
    if key not in _engines:
        yield Progress(stage="Loading")
        with _loading:
            from pipeline import Engine

            host.settle(place)
            _engines[key] = yield from Engine.load(model, folder, place.device, place.dtype)
            _fingerprints[folder] = checkpoints.fingerprint(folder)
    return _engines[key]


class _Returning:
    """Iterate a generator and keep what it returns in `value`."""

    def __init__(self, generator) -> None:
        self._generator = generator
        self.value = None

    def __iter__(self):
        self.value = yield from self._generator

    def close(self) -> None:
        self._generator.close()


def _given(value, default):
    return default if value is None else value


def _discard(take: Take) -> None:
    shutil.rmtree(Path(take.path).parent, ignore_errors=True)


def _hint(model: checkpoints.Model, place: host.Place) -> str | None:
    """The one sentence a person on a small machine should read."""
    big = checkpoints.MODELS["xl-sft"]
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


def _studio_version() -> str:
    try:
        return version("ace-music-studio")
    except PackageNotFoundError:
        return "source"
