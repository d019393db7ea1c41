"""Music for an editor: a queue of ten before the studio, and finished tracks kept on disk.

Everything that happens is told through one function, by the names that the wire has for it.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import StudioError
from core.results import Cancelled, Event, Failed, Progress, Take
from lofi.backends import Backends, OnEvent, TrackOrder
from lofi.config import Config
from lofi.track_cache import TrackCache

LONGEST_QUEUE = 10
"""Jobs that may wait beside the one that runs."""


EVERY_PERCENT = 5
"""How far a job gets between two messages."""


LAST_PERCENT = 99
"""What a job says while its sound is decoded and written."""


STOP_S = 1.5
"""How long the running job is waited for at the end."""


REMEMBERED = 1000
"""Ended jobs that are still known by name."""


MAIN_STAGES = ("Denoising", "Composing")
"""The stages whose steps are a job's progress."""


AFTER_STEPS = {"ace_step": 8, "musicgen": 0}
"""What comes after a job's last step, in steps, as long as it was never measured on this machine:
decoding and writing take as long as eight steps, and next to nothing beside tokens."""


NOT_LOADED = {"model-broken", "model-mismatch", "model-missing", "model-gated", "device-missing"}
"""Failures that mean a model cannot be played at all."""


@dataclass
class Job:
    """An order that waits or runs."""

    order: TrackOrder
    high: bool = False
    stopping: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    stage: str = ""
    done: int = 0
    told: int = 0
    began: float = 0.0
    first: tuple[int, float] = (0, 0.0)

    def progress(self, event: Progress, now: float) -> dict[str, Any] | None:
        """What is to be said of `event`: more whenever another 5 % are done, 99 instead of 100."""
        if event.stage != self.stage:
            self.stage, self.first = event.stage, (event.step, now)
        if event.stage not in MAIN_STAGES or not event.steps:
            return None
        total = self.order.total_steps
        self.done = min(total, round(event.step * total / event.steps))
        percent = 100 * self.done // total
        if percent // EVERY_PERCENT == self.told // EVERY_PERCENT or self.told == LAST_PERCENT:
            return None
        self.told = min(LAST_PERCENT, percent)
        said = {
            "track_id": self.order.track_id,
            "percent": self.told,
            "current_step": self.done,
            "total_steps": total,
            "eta_sec": round(self._left(event, now), 2),
        }
        if self.order.backend == "musicgen":
            said |= {"tokens_generated": self.done, "tokens_estimated": total}
        return said

    def _left(self, event: Progress, now: float) -> float:
        """Seconds to the end: the middle of what the studio expects, or by the steps alone."""
        if event.left_s:
            return sum(event.left_s) / 2
        step, since = self.first
        left = event.steps - event.step + AFTER_STEPS[self.order.backend]
        return (now - since) / max(1, event.step - step) * left


class Scheduler:
    """The queue, its worker, and what the two backends are doing.

    Args:
        tell: gets the name of a notification and its fields, from any thread.
    """

    def __init__(self, config: Config, tell: OnEvent) -> None:
        self.config, self._tell = config, tell
        self.tracks = TrackCache(
            config.cache / "tracks", config.cache_max_mb * 10**6, config.cache_max_tracks
        )
        self._guard = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._past: OrderedDict[str, None] = OrderedDict()
        self.backends: Backends | None = None

    def prepare(self) -> None:
        """Find the backends and start to work. Once, before anything else is asked."""
        self.backends = Backends(self.config, self._tell)
        threading.Thread(target=self._work, daemon=True).start()

    def accept(
        self, order: TrackOrder, high: bool = False
    ) -> tuple[str, int, dict[str, Any] | None]:
        """Put `order` in the queue, unless its track is there or on its way.

        Returns:
            "cached", "generating" or "queued", how many tracks come before it, and the facts of a
            cached track. The caller tells those once it has answered.

        Raises:
            StudioError: `queue-full`.
        """
        if facts := self.tracks.find(order.track_id):
            return "cached", 0, facts
        with self._guard:
            if self._running and self._running.order.track_id == order.track_id:
                return "generating", 0, None
            known = [job for job in self._waiting if job.order.track_id == order.track_id]
            if not known and self._running is None:
                self._running = Job(order, high)
                self._guard.notify_all()
                return "generating", 0, None
            if not known and len(self._waiting) >= LONGEST_QUEUE:
                raise StudioError("queue-full", waiting=len(self._waiting))
            job = known[0] if known else Job(order, high)
            if not known or (high and not job.high):
                job.high = high
                self._waiting = [other for other in self._waiting if other is not job]
                before = sum(other.high for other in self._waiting) if high else len(self._waiting)
                self._waiting.insert(before, job)
            return "queued", self._waiting.index(job) + 1, None

    def cancel(self, track: str) -> bool:
        """Stop the job of `track`; whether it was the running one. Its end is told later.

        Raises:
            StudioError: `track-unknown`, `track-complete`.
        """
        with self._guard:
            running = self._running
            if running and running.order.track_id == track:
                running.stopping = True
                self.backends.studio.stop(track)
                return True
            dropped = [job for job in self._waiting if job.order.track_id == track]
            for job in dropped:
                self._waiting.remove(job)
                self._remember(job)
        for job in dropped:
            self._cancelled(job)
        if dropped:
            return False
        ended = track in self._past or self.tracks.find(track, use=False)
        raise StudioError("track-complete" if ended else "track-unknown", track=track[:40])

    def loading(self) -> str:
        """The backend that is being loaded; empty if none is."""
        with self._guard:
            job = self._running
        return job.order.backend if job and job.stage.startswith("Loading") else ""

    def stop(self) -> None:
        """End all jobs, the running one at its next step or after `STOP_S` at the latest."""
        with self._guard:
            dropped, self._waiting = self._waiting, []
            if running := self._running:
                running.stopping = True
                self.backends.studio.stop(running.order.track_id)
        for job in dropped:
            self._cancelled(job)
        if running and not running.ended.wait(STOP_S):
            self._cancelled(running)

    def _work(self) -> None:
        """The worker's thread: one job after the other, for ever."""
        while True:
            with self._guard:
                while self._running is None:
                    self._guard.wait()
                job = self._running
            try:
                self._play(job)
            except StudioError as error:
                self._failed(job, Failed.from_error(error))
            except Exception as error:  # noqa: BLE001 - the next job is to be played all the same
                traceback.print_exc(file=sys.stderr)
                self._failed(
                    job, Failed.from_error(StudioError("internal", kind=type(error).__name__))
                )
            finally:
                self.backends.studio.leave(job.order.track_id)
                job.ended.set()

    def _play(self, job: Job) -> None:
        order, job.began = job.order, time.monotonic()
        if self.backends.no_device:
            raise self.backends.no_device
        if self.backends.home(order.backend) is None:  # the studio would fetch it, unasked
            raise self.backends.missing(order.backend)
        ending: Event | None = None
        studio = self.backends.studio
        for event in studio.run(order.request, order.track_id):
            if job.stopping:
                studio.stop(order.track_id)  # the first time may have been too early
            if not isinstance(event, Progress):
                ending = event
            elif said := job.progress(event, time.monotonic()):
                self._tell("generation_progress", said)
        if isinstance(ending, Take):
            self._finish(job, ending)
        elif isinstance(ending, Cancelled) or job.stopping:
            self._over(job)
            self._cancelled(job)
        else:
            self._failed(job, ending)

    def _finish(self, job: Job, take: Take) -> None:
        """Bring the take among the tracks, unless the job is stopped before it is there."""
        from audio import encode
        from audio.tags import Tags

        order = job.order
        weights = self.backends.weights[order.backend]
        licence = weights.licence
        if weights.may_sell is False:
            licence += ", not for commercial use"
        tags = Tags(order.prompt, weights.title, licence)
        staged = self.tracks.stage(order.track_id, encode.short(Path(take.path), tags))
        spent = round(time.monotonic() - job.began, 3)
        with self._guard:
            if not job.stopping:
                facts = self.tracks.publish(
                    order.track_id,
                    staged,
                    {
                        "backend": order.backend,
                        "model_version": order.model_version,
                        "prompt": order.prompt,
                        "seed": order.seed,
                        "requested_duration_sec": order.duration_sec,
                        "duration_sec": take.duration_s,
                        "params": order.params,
                        "sample_rate": take.sample_rate,
                        "channels": 2,
                        "generation_time_sec": spent,
                        "licence": licence,
                        "commercial_use": weights.may_sell,
                        "request": take.request,
                        "device": take.device.model_dump(mode="json"),
                        "model_sha256": take.model.sha256,
                    },
                    {waiting.order.track_id for waiting in self._waiting},
                )
            self._over(job)
        if job.stopping:
            staged.path.unlink(missing_ok=True)
            self._cancelled(job)
            return
        self.backends.fault(order.backend, None)
        self._tell("generation_complete", self.complete(facts, spent))

    def complete(self, facts: dict[str, Any], spent: float | None = None) -> dict[str, Any]:
        """The fields that tell of a track that took `spent` seconds; None if it was there."""
        names = ("track_id", "duration_sec", "sample_rate", "channels", "prompt", "seed")
        return {
            **{name: facts[name] for name in (*names, "model_version", "backend")},
            "path": str(self.tracks.path(facts["track_id"])),
            "generation_time_sec": spent or 0.0,
            "cached": spent is None,
        }

    def _over(self, job: Job) -> None:
        """`job` is not running any more; the next one is."""
        with self._guard:
            if self._running is job:
                self._remember(job)
                self._running = self._waiting.pop(0) if self._waiting else None

    def _remember(self, job: Job) -> None:
        self._past[job.order.track_id] = None
        while len(self._past) > REMEMBERED:
            self._past.popitem(last=False)

    def _cancelled(self, job: Job) -> None:
        order = job.order
        self._tell(
            "generation_cancelled",
            {"track_id": order.track_id, "at_step": job.done, "total_steps": order.total_steps},
        )

    def _failed(self, job: Job, failed: Failed) -> None:
        self._over(job)
        if job.stopping:
            self._cancelled(job)
            return
        said = f"{failed.message} {failed.action}"
        code = "MODEL_INFERENCE_FAILED"
        if failed.code == "backend-missing":
            code = "MODEL_NOT_FOUND"
        elif failed.code in NOT_LOADED or job.stage.startswith("Loading"):
            code = "MODEL_LOAD_FAILED"
            self.backends.fault(job.order.backend, said)
        self._tell(
            "generation_error", {"track_id": job.order.track_id, "code": code, "message": said}
        )
