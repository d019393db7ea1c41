"""The queue for the device: first come, first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from core.errors import StudioError
from core.results import Progress
from runtime import device

MAX_WAITING = 16
"""Jobs that may wait for the device."""

POLL_S = 0.2
"""How often a waiting job reports its place."""


@dataclass(eq=False)
class _Ticket:
    """A place in the queue. What waits right behind one with a stage reports that stage."""

    stage: str


class DeviceQueue:
    """A first-come-first-served queue for one device. On ZeroGPU nobody waits here."""

    def __init__(self) -> None:
        self._waiting: deque[_Ticket] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def enter(self, stage: str = "") -> Iterator[Generator[Progress, None, None]]:
        """Join the queue, and leave it at the end of the `with` block.

        Args:
            stage: what the next in the queue waits for, if not for another's job.

        Yields:
            A generator that reports the number of jobs ahead until it is this job's turn.

        Raises:
            StudioError: `queue-full`.
        """
        if device.ON_ZERO:
            yield _no_wait()
            return
        ticket = _Ticket(stage)
        with self._moved:
            if len(self._waiting) > MAX_WAITING:
                raise StudioError("queue-full", waiting=len(self._waiting) - 1)
            self._waiting.append(ticket)
        try:
            yield self._wait(ticket)
        finally:
            with self._moved:
                self._waiting.remove(ticket)
                self._moved.notify_all()

    def _wait(self, ticket: _Ticket) -> Generator[Progress, None, None]:
        while event := self._event(ticket):
            yield event
            with self._moved:
                if self._waiting[0] is not ticket:
                    self._moved.wait(timeout=POLL_S)

    def _event(self, ticket: _Ticket) -> Progress | None:
        """What the holder of `ticket` waits for; None once it is its turn."""
        with self._moved:
            ahead, stage = self._waiting.index(ticket), self._waiting[0].stage
        if ahead == 1 and stage:
            return Progress(stage=stage)
        return Progress(stage="Waiting", step=ahead) if ahead else None


def _no_wait() -> Generator[Progress, None, None]:
    """A generator that ends at once."""
    yield from ()
