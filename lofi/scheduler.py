"""The daemon's job queue: one job runs, at most `MAX_QUEUED` wait, `high` before `normal`.

The studio has a queue of its own, first come, first served, for everyone who shares its device. It
never holds more than one job of the daemon: order, positions and priorities are decided here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import StudioError
from core.results import Event, Failed, Progress, Take
from lofi.backends import Backends
from lofi.jsonrpc import Notify
from lofi.track_cache import TrackCache
from lofi.track_request import TrackRequest

log = logging.getLogger(__name__)

MAX_QUEUED = 10
"""Jobs that may wait while another runs. One more is refused with QUEUE_FULL."""


PROGRESS_PERCENT = 5
"""A `generation_progress` is sent whenever another multiple of this is passed."""


LAST_PERCENT = 99
"""What a job reports while its audio is decoded and written."""


STOP_TIMEOUT_S = 1.5
"""How long `stop` waits for the running job to end."""


MAX_REMEMBERED = 1000
"""Ended jobs whose ids are kept, to answer a late `cancel` correctly."""


MAIN_STAGES = ("Denoising", "Composing")
"""The stages whose steps are a job's progress."""


STEPS_AFTER = {"ace_step": 8, "musicgen": 0}
"""Cost of decoding and writing, in denoising steps or tokens, until this machine has been measured:
as long as eight steps, and next to nothing compared with tokens."""


LOAD_FAILURES = {"model-broken", "model-mismatch", "model-missing", "model-gated", "device-missing"}
"""Error codes that mean the model cannot be used at all."""


class Submitted(NamedTuple):
    """The outcome of `Scheduler.submit`.

    Attributes:
        status: "cached", "generating" or "queued".
        position: how many jobs will finish first.
        cached: the sidecar of a cached track; the caller sends its notification.
    """

    status: str
    position: int
    cached: dict[str, Any] | None = None


@dataclass
class Job:
    """A track that is queued or being made."""

    track: TrackRequest
    high: bool = False
    stopping: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    stage: str = ""
    step: int = 0
    percent: int = 0
    started_at: float = 0.0
    stage_start: tuple[int, float] = (0, 0.0)

    def progress(self, event: Progress, now: float) -> dict[str, Any] | None:
        """Params of the `generation_progress` that `event` calls for; None if it calls for none.

        Percentages rise strictly, and `LAST_PERCENT` stands for the last step.
        """
        if event.stage != self.stage:
            self.stage, self.stage_start = event.stage, (event.step, now)
        if event.stage not in MAIN_STAGES or not event.steps:
            return None
        total = self.track.total_steps
        self.step = min(total, round(event.step * total / event.steps))
        percent = 100 * self.step // total
        passed = percent // PROGRESS_PERCENT != self.percent // PROGRESS_PERCENT
        if not passed or self.percent == LAST_PERCENT:
            return None
        self.percent = min(LAST_PERCENT, percent)
        params = {
            "track_id": self.track.track_id,
            "percent": self.percent,
            "current_step": self.step,
            "total_steps": total,
            "eta_sec": round(self._time_left_s(event, now), 2),
        }
        if self.track.backend == "musicgen":
            params |= {"tokens_generated": self.step, "tokens_estimated": total}
        return params

    def _time_left_s(self, event: Progress, now: float) -> float:
        """The middle of the studio's estimate, or an extrapolation from the steps so far."""
        if event.left_s:
            return sum(event.left_s) / 2
        first_step, since = self.stage_start
        left = event.steps - event.step + STEPS_AFTER[self.track.backend]
        return (now - since) / max(1, event.step - first_step) * left


class Scheduler:
    """Runs jobs one at a time, on a thread of its own, and reports them through `notify`.

    Every accepted job ends with exactly one of `generation_complete`, `generation_error` and
    `generation_cancelled`.

    Args:
        notify: sends a notification; called from several threads.
    """

    def __init__(self, backends: Backends, cache: TrackCache, notify: Notify) -> None:
        self._backends, self._cache, self._notify = backends, cache, notify
        self._condition = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._ended: OrderedDict[str, None] = OrderedDict()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, track: TrackRequest, high: bool = False) -> Submitted:
        """Queue `track`, unless it is cached, queued or running already.

        A repeated request with `high` moves a queued normal job forward. Cached and repeated
        tracks are accepted even when the queue is full.

        Raises:
            StudioError: `queue-full`.
        """
        if sidecar := self._cache.find(track.track_id):
            return Submitted("cached", 0, sidecar)
        with self._condition:
            if self._running and self._running.track.track_id == track.track_id:
                return Submitted("generating", 0)
            queued = [job for job in self._waiting if job.track.track_id == track.track_id]
            if not queued and self._running is None:
                self._running = Job(track, high)
                self._condition.notify_all()
                return Submitted("generating", 0)
            if not queued and len(self._waiting) >= MAX_QUEUED:
                raise StudioError("queue-full", waiting=len(self._waiting))
            job = queued[0] if queued else Job(track, high)
            if not queued or (high and not job.high):
                job.high = high
                self._waiting = [other for other in self._waiting if other is not job]
                ahead = sum(other.high for other in self._waiting) if high else len(self._waiting)
                self._waiting.insert(ahead, job)
            return Submitted("queued", self._waiting.index(job) + 1)

    def cancel(self, track_id: str) -> bool:
        """Cancel a job; returns whether it was the running one. Its notification follows.

        Raises:
            StudioError: `track-unknown`, `track-complete`.
        """
        with self._condition:
            running = self._running
            if running and running.track.track_id == track_id:
                running.stopping = True
                self._backends.studio.stop(track_id)
                return True
            dropped = [job for job in self._waiting if job.track.track_id == track_id]
            for job in dropped:
                self._waiting.remove(job)
                self._remember(job)
        for job in dropped:
            self._notify_cancelled(job)
        if dropped:
            return False
        ended = track_id in self._ended or self._cache.find(track_id, use=False)
        raise StudioError("track-complete" if ended else "track-unknown", track=track_id[:40])

    def loading(self) -> str:
        """The backend that is being loaded; empty if none is."""
        with self._condition:
            job = self._running
        return job.track.backend if job and job.stage.startswith("Loading") else ""

    def stop(self) -> None:
        """Cancel all jobs and wait for the running one, at most `STOP_TIMEOUT_S`."""
        with self._condition:
            dropped, self._waiting = self._waiting, []
            if running := self._running:
                running.stopping = True
                self._backends.studio.stop(running.track.track_id)
        for job in dropped:
            self._notify_cancelled(job)
        if running and not running.ended.wait(STOP_TIMEOUT_S):
            self._notify_cancelled(running)

    def completed(self, sidecar: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """Params of `generation_complete`.

        Args:
            seconds: how long the track took; None if it came from the cache.
        """
        names = ("track_id", "duration_sec", "sample_rate", "channels", "prompt", "seed")
        return {
            **{name: sidecar[name] for name in (*names, "model_version", "backend")},
            "path": str(self._cache.path(sidecar["track_id"])),
            "generation_time_sec": seconds or 0.0,
            "cached": seconds is None,
        }

    def _work(self) -> None:
        """Body of the worker thread."""
        while True:
            with self._condition:
                while self._running is None:
                    self._condition.wait()
                job = self._running
            try:
                self._run(job)
            except StudioError as error:
                self._fail(job, Failed.from_error(error))
            except Exception as error:
                log.exception("A job failed unexpectedly.")
                self._fail(
                    job, Failed.from_error(StudioError("internal", kind=type(error).__name__))
                )
            finally:
                self._backends.studio.leave(job.track.track_id)
                job.ended.set()

    def _run(self, job: Job) -> None:
        track, job.started_at = job.track, time.monotonic()
        if self._backends.device_error:
            raise self._backends.device_error
        if self._backends.installed_folder(track.backend) is None:
            # The studio would download it, which only download_backend may do.
            raise self._backends.not_installed(track.backend)
        ending: Event | None = None
        studio = self._backends.studio
        for event in studio.run(track.request, track.track_id):
            if job.stopping:
                studio.stop(track.track_id)  # the first call may have come before the job existed
            if not isinstance(event, Progress):
                ending = event
            elif params := job.progress(event, time.monotonic()):
                self._notify("generation_progress", params)
        if isinstance(ending, Take):
            self._finish(job, ending)
        elif isinstance(ending, Failed) and not job.stopping:
            self._fail(job, ending)
        else:
            self._start_next(job)
            self._notify_cancelled(job)

    def _finish(self, job: Job, take: Take) -> None:
        """Put the take into the cache, unless the job is cancelled first."""
        from audio import encode
        from audio.tags import Tags

        track = job.track
        weights = self._backends.weights[track.backend]
        licence = weights.licence
        if weights.may_sell is False:
            licence += ", not for commercial use"
        tags = Tags(track.prompt, weights.title, licence)
        staged = self._cache.stage(track.track_id, encode.wav_16_bit(Path(take.path), tags))
        seconds = round(time.monotonic() - job.started_at, 3)
        sidecar = None
        with self._condition:
            if not job.stopping:
                sidecar = self._cache.publish(
                    track.track_id,
                    staged,
                    {
                        "backend": track.backend,
                        "model_version": track.model_version,
                        "prompt": track.prompt,
                        "seed": track.seed,
                        "requested_duration_sec": track.duration_sec,
                        "duration_sec": take.duration_s,
                        "params": track.params,
                        "sample_rate": take.sample_rate,
                        "channels": 2,
                        "generation_time_sec": seconds,
                        "licence": licence,
                        "commercial_use": weights.may_sell,
                        "request": take.request,
                        "device": take.device.model_dump(mode="json"),
                        "model_sha256": take.model.sha256,
                    },
                    keep={waiting.track.track_id for waiting in self._waiting},
                )
            self._start_next(job)
        if sidecar is None:
            staged.path.unlink(missing_ok=True)
            self._notify_cancelled(job)
            return
        self._backends.set_error(track.backend, None)
        self._notify("generation_complete", self.completed(sidecar, seconds))

    def _start_next(self, job: Job) -> None:
        """Let the next job run, if `job` is still the running one."""
        with self._condition:
            if self._running is job:
                self._remember(job)
                self._running = self._waiting.pop(0) if self._waiting else None

    def _remember(self, job: Job) -> None:
        self._ended[job.track.track_id] = None
        while len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def _notify_cancelled(self, job: Job) -> None:
        track = job.track
        self._notify(
            "generation_cancelled",
            {"track_id": track.track_id, "at_step": job.step, "total_steps": track.total_steps},
        )

    def _fail(self, job: Job, failed: Failed) -> None:
        self._start_next(job)
        if job.stopping:
            self._notify_cancelled(job)
            return
        message = f"{failed.message} {failed.action}"
        code = "MODEL_INFERENCE_FAILED"
        if failed.code == "backend-missing":
            code = "MODEL_NOT_FOUND"
        elif failed.code in LOAD_FAILURES or job.stage.startswith("Loading"):
            code = "MODEL_LOAD_FAILED"
            self._backends.set_error(job.track.backend, message)
        self._notify(
            "generation_error",
            {"track_id": job.track.track_id, "code": code, "message": message},
        )
