"""The queue for the device: first come, first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from core.errors import StudioError
from core.results import Progress
from runtime import device

MAX_WAITING = 16
"""Jobs that may wait for the device."""

POLL_S = 0.2
"""How often a waiting job reports its place."""


class DeviceQueue:
    """A first-come-first-served queue for one device. On ZeroGPU nobody waits here."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def enter(self) -> Iterator[Generator[Progress, None, None]]:
        """Join the queue, and leave it at the end of the `with` block.

        Yields:
            A generator that reports the number of jobs ahead until it is this job's turn.

        Raises:
            StudioError: `queue-full`.
        """
        if device.ON_ZERO:
            yield _no_wait()
            return
        ticket = object()
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

    def _wait(self, ticket: object) -> Generator[Progress, None, None]:
        while (ahead := self._ahead(ticket)) > 0:
            yield Progress(stage="Waiting", step=ahead)
            with self._moved:
                if self._waiting[0] is not ticket:
                    self._moved.wait(timeout=POLL_S)

    def _ahead(self, ticket: object) -> int:
        with self._moved:
            return self._waiting.index(ticket)


def _no_wait() -> Generator[Progress, None, None]:
    """A generator that ends at once."""
    yield from ()
