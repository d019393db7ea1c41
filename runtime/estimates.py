"""How long work takes: measured rates, the time left of a job, and the GPU time to ask for."""

from __future__ import annotations

import json
import logging
import math
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.files import cache_folder, replace_file
from core.results import Progress
from models import catalog, lyric_attention, musicgen, plan_format

log = logging.getLogger(__name__)

ZERO_SECONDS = (60, 300)
"""GPU seconds to ask for while nothing was measured, and the most to ask for."""


MARGIN = 1.2
"""GPU time to ask for, as a multiple of the median need."""


class Rates:
    """Measured seconds for one unit of each stage on one class of device.

    The last `KEEP` measurements of each stage are kept on disk. A unit is whatever makes the cost of
    a stage proportional: see `Task.cost`.
    """

    KEEP = 16

    def __init__(self, key: str, path: Path | None = None) -> None:
        self._key = key
        self._path = path or cache_folder() / "rates.json"
        self._lock = threading.Lock()
        self._seen: dict[str, list[float]] = defaultdict(list, self._read().get(key, {}))

    def learn(self, seconds: dict[str, float], work: dict[str, float]) -> None:
        """Record that `work` units of each stage took `seconds`."""
        with self._lock:
            for stage in seconds.keys() & work.keys():
                if work[stage] > 0:
                    self._seen[stage] = [*self._seen[stage], seconds[stage] / work[stage]]
                    self._seen[stage] = self._seen[stage][-self.KEEP :]
            everyone = {**self._read(), self._key: dict(self._seen)}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, [json.dumps(everyone).encode()])
        except OSError:
            log.info("Rates are not kept", exc_info=True)

    def predict(self, stage: str, work: float) -> tuple[float, float] | None:
        """Seconds that `work` units of `stage` will take, (least, most); None if unknown.

        Of many measurements the middle half counts, so that one slow song does not widen the next
        sixteen estimates.
        """
        seen = sorted(self._seen.get(stage, ()))
        aside = len(seen) // 4
        return (seen[aside] * work, seen[-1 - aside] * work) if seen else None

    def usual(self, work: dict[str, float]) -> float | None:
        """The median seconds for all of `work`, or None while any stage is unknown."""
        if any(not self._seen.get(stage) for stage in work):
            return None
        return sum(statistics.median(self._seen[stage]) * units for stage, units in work.items())

    def _read(self) -> dict[str, dict[str, list[float]]]:
        try:
            found = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            log.warning("%s is unreadable; estimates start afresh", self._path.name)
            return {}
        return (
            {key: _valid(rates) for key, rates in found.items()} if isinstance(found, dict) else {}
        )


def _valid(rates: Any) -> dict[str, list[float]]:
    """The stages of a file's entry that hold a list of seconds; another program may have written
    anything into it."""
    if not isinstance(rates, dict):
        return {}
    return {
        stage: seconds
        for stage, seconds in rates.items()
        if isinstance(seconds, list)
        and all(type(s) in (int, float) and 0 <= s < math.inf for s in seconds)
    }


def gpu_seconds(usual: float | None, guess: float, attempt: int = 1) -> int:
    """The GPU time to ask ZeroGPU for, in seconds.

    Args:
        usual: the median need, if it was ever measured here.
        guess: a cautious estimate for when it was not (see `cautious`).
        attempt: 2 after the first was aborted; it asks for twice as much.
    """
    low, high = ZERO_SECONDS
    wanted = usual * MARGIN if usual is not None else min(max(guess, low), high)
    return min(math.ceil(wanted * attempt), high)


class TimeLeft:
    """Estimates the time that a job still takes, from its own progress and from measured rates.

    Args:
        rates: measured so far.
        work: units of every stage ahead, in order.
        now: a clock, in seconds.
    """

    def __init__(self, rates: Rates, work: dict[str, float], now: Callable[[], float]) -> None:
        self._rates, self._work, self._now = rates, work, now
        self._began = now()
        self._stage, self._since = "", self._began
        self._first = self._newest = (0, self._began)
        self._last = Progress(stage="Waiting")

    def expect(self, work: dict[str, float]) -> None:
        """Set the units of every stage ahead, in order."""
        self._work = work

    def tick(self, event: Progress | None = None) -> Progress:
        """`event` (or the last one again) with the elapsed time and the range of time left."""
        now = self._now()
        if event is not None:
            if event.stage != self._stage:
                self._stage, self._since, self._first = event.stage, now, (event.step, now)
            elif event.step and not self._first[0]:
                self._first = (event.step, now)  # the first step also pays for warming up
            self._newest, self._last = (event.step, now), event
        return self._last.model_copy(
            update={"elapsed_s": now - self._began, "left_s": self._left(now)}
        )

    def _left(self, now: float) -> tuple[float, float] | None:
        event, stages = self._last, list(self._work)
        if event.stage not in stages:
            return None
        here = self._left_here(now)
        if here is None:
            return None
        low, high = here
        for stage in stages[stages.index(event.stage) + 1 :]:
            span = self._rates.predict(stage, self._work[stage])
            if span is None:
                return None
            low, high = low + span[0], high + span[1]
        return max(0.0, low * 0.9), max(0.0, high * 1.15)

    def _left_here(self, now: float) -> tuple[float, float] | None:
        event, (first, first_at), (newest, newest_at) = self._last, self._first, self._newest
        if first and newest > first:
            each = (newest_at - first_at) / (newest - first)
            left = max(0.0, each * (event.steps - newest) - (now - newest_at))
            return left, left
        span = self._rates.predict(event.stage, self._work[event.stage])
        gone = now - self._since
        return span and (max(0.0, span[0] - gone), max(0.0, span[1] - gone))


def cautious(work: Mapping[str, float], model: catalog.Model) -> float:
    """Seconds that a job may need on a GPU that was never measured: 20 s to start, then computed.

    XL takes 0.13 TFLOP for each network row and second of sound (27 guided steps of 240 s: 1.6
    PFLOP), here at 42 TFLOP/s, far below what such a card reaches; other models by their size. A
    planner writes at least 30 codes a second there, and a plan of 200 tokens; MusicGen 25 tokens a
    second.
    """
    share = model.size_bytes / catalog.MODELS["xl-sft"].size_bytes or 1.0
    planning = 10 * sum(stage in work for stage in ("Planning", "Listening", "Rewriting"))
    composing = work.get("Composing codes", 0.0) * plan_format.CODE_RATE / 30
    composing += 2 * work.get(musicgen.COMPOSING, 0.0)
    rendering = 0.003 * share * work.get("Denoising", 0.0) + 0.05 * work.get("Decoding", 0.0)
    rendering += 0.01 * work.get(lyric_attention.STAGE, 0.0)
    return 20 + rendering + planning + composing
