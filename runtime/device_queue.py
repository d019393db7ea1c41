"""The queue for the device: first come, first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.errors import StudioError
from core.results import Progress
from runtime import device

LONGEST_QUEUE = 16
"""Jobs that may wait for the device."""


OnEvent = Callable[[Progress], None]


class DeviceQueue:
    """A first-come-first-served queue for the device. On ZeroGPU everybody gets their own."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def wait(self, stopped: Callable[[], bool], tell: OnEvent) -> Iterator[bool]:
        """Entered when it is one's turn; False if `stopped` came first.

        Raises:
            StudioError: `queue-full`.
        """
        if device.ON_ZERO:
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
