"""How long each stage of a job took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

from core.results import Progress

T = TypeVar("T")


class StageTimer:
    """Seconds spent in each stage, measured from the progress that passes through."""

    def __init__(self, stage: str = "Loading") -> None:
        self.stage = stage
        self._began = self._since = time.monotonic()
        self._spent: dict[str, float] = defaultdict(float)

    def watch(self, work: Generator[Progress, None, T]) -> Generator[Progress, None, T]:
        """Pass on the progress and the result of `work`. Closing this closes `work`."""
        with closing(work):
            while True:
                try:
                    event = next(work)
                except StopIteration as end:
                    return end.value
                if event.stage != self.stage:
                    self._lap()
                    self.stage = event.stage
                yield event

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, up to now."""
        self._lap()
        return dict(self._spent)

    def elapsed(self) -> float:
        """Seconds since the timer was made."""
        return time.monotonic() - self._began

    def _lap(self) -> None:
        now = time.monotonic()
        self._spent[self.stage] += now - self._since
        self._since = now
