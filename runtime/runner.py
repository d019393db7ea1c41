"""Runs prepared jobs on this machine's device, one after another.

On ZeroGPU the work happens in a forked process; elsewhere the same code runs in the job's thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from core.errors import StudioError
from core.results import Cancelled, Event, Failed, Progress, Take
from models import checkpoints
from runtime import device, estimates
from runtime.device_queue import DeviceQueue
from runtime.job import Job, JobFolder, Setup
from runtime.model_cache import ModelCache
from runtime.stage_timer import StageTimer
from runtime.tasks import TASKS, Result

T = TypeVar("T")

Ending = Result | Cancelled | Failed

Expect = Callable[[dict[str, float]], None]
"""Is told the units of work of every stage that lies ahead."""


class LocalRunner:
    """One device with its queue, its loaded models and its measured rates."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.models = ModelCache(setup.device)
        self.queue = DeviceQueue()
        plan = "" if setup.plan.plain else f":{setup.plan.precision}:{setup.plan.offload}"
        self.rates = estimates.Rates(f"{setup.device.speed_class}{plan}|{setup.model.name}")
        self._on_device = device.gpu(seconds=lambda job, seconds: seconds)(self.execute)

    def run(self, job: Job, expect: Expect) -> Generator[Progress, None, Ending]:
        """Wait for the device, fetch what is missing, and run the job.

        Raises:
            StudioError: `queue-full`, `gpu-refused`, `gpu-aborted`; those of `checkpoints.fetch`.
        """
        expect(self._cost(job))
        if not TASKS[job.request.mode].on_device:
            return (yield from _ending_of(self.execute(job, 0)))
        with self.queue.enter() as waiting:
            timer = StageTimer("Waiting")
            stopped = yield from stoppable(self._before(job, waiting), job.folder, timer)
            if stopped:
                return stopped
            work = self._cost(job)
            expect(work)
            return (yield from self._with_gpu_time(job, work))

    def execute(self, job: Job, seconds: int) -> Iterator[Event]:
        """Do the work: progress, then exactly one ending. Never raises.

        Only `gr.Error` survives as an exception on the way out of a ZeroGPU worker.

        Args:
            seconds: the GPU time that was asked for, which ZeroGPU reads from the arguments.
        """
        timer = StageTimer()
        try:
            work = self._work(job, timer)
            ending = yield from stoppable(work, job.folder, timer)
        except Exception as error:  # noqa: BLE001 - see above
            ending = Failed.from_error(error)
        device.free(job.device.kind)
        yield ending

    def _work(self, job: Job, timer: StageTimer) -> Generator[Progress, None, Result]:
        """The task's work, tried once more with a smaller plan where memory runs out.

        Raises:
            StudioError: those of the task.
        """
        task = TASKS[job.request.mode]
        try:
            return (yield from task.run(job, self.models, timer))
        except StudioError as error:
            smaller = job.plan.fallback
            if error.code != "out-of-memory" or smaller is None or job.folder.stopped():
                raise
        self.models.unload_all()
        note = (
            f"Memory ran out with {job.plan.title}; the song was made with {smaller.title}"
            f" and tiles of {smaller.tile} frames instead."
        )
        job = replace(
            job,
            plan=smaller,
            device=replace(job.device, dtype=smaller.dtype),
            notes=(*job.notes, note),
        )
        return (yield from task.run(job, self.models, timer))

    def preload(self, job: Job) -> Generator[Progress, None, None]:
        """Fetch the job's models and load them, so that the first song starts at once.

        Raises:
            StudioError: those of `checkpoints.fetch` and of loading.
        """
        yield from _fetch_missing(job)
        yield from self.models.preload(job)

    def _before(
        self, job: Job, waiting: Generator[Progress, None, None]
    ) -> Generator[Progress, None, None]:
        """Wait for the job's turn, then bring what is missing to disk."""
        yield from waiting
        yield from _fetch_missing(job)

    def _with_gpu_time(self, job: Job, work: dict[str, float]) -> Generator[Progress, None, Ending]:
        """Run the job with as much GPU time as it should need, twice as much if that ran out."""
        usual, guess = self.rates.usual(work), estimates.cautious(work, self._setup.model)
        for attempt in (1, 2):
            seconds = estimates.gpu_seconds(usual, guess, attempt)
            try:
                ending = yield from _ending_of(self._on_device(job, seconds))
            except Exception as error:
                trouble = device.gpu_trouble(error)
                if trouble is None:
                    raise
                if trouble != "aborted":
                    raise StudioError("gpu-refused", reason=trouble) from error
                continue
            if isinstance(ending, Take):
                spent = ending.timings_s
                self.rates.learn({s: spent[s] for s in work if s in spent}, work)
            return ending
        raise StudioError("gpu-aborted")

    def _cost(self, job: Job) -> dict[str, float]:
        cost = TASKS[job.request.mode].cost(job, self.models.holds)
        return {stage: units for stage, units in cost.items() if units}


def stoppable(
    work: Generator[Progress, None, T], folder: JobFolder, timer: StageTimer
) -> Generator[Progress, None, T | Cancelled]:
    """Pass on the progress and the result of `work`, and end it as `Cancelled` once the job's stop
    file exists. An error of a job that was told to stop counts as its ending, too."""
    with contextlib.closing(timer.watch(work)) as watched:
        try:
            while True:
                try:
                    event = next(watched)
                except StopIteration as end:
                    if folder.stopped():
                        break
                    return end.value
                if folder.stopped():
                    break
                yield event
        except StudioError:
            if not folder.stopped():
                raise
    return Cancelled(stage=timer.stage, elapsed_s=timer.elapsed())


def _fetch_missing(job: Job) -> Generator[Progress, None, None]:
    for weights in job.weights:
        folder = checkpoints.locate(weights)
        if folder is None or weights.missing(folder):
            yield from checkpoints.fetch(weights)


def _ending_of(events: Iterator[Any]) -> Generator[Progress, None, Ending]:
    """Pass on the progress among `events`, and return what follows it."""
    for event in events:
        if not isinstance(event, Progress):
            return event
        yield event
    raise StudioError("internal", kind="NoEnding")
