"""Downloads that a person started from the page: one thread each, whoever is looking."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import closing

from core.results import Download, Failed
from models import hub
from models.weights import Weights

RATE_SPAN_S = 5.0
"""The rate is the mean of so many seconds."""


class Downloads:
    """At most one download for each name. Thread-safe."""

    def __init__(self) -> None:
        self._states: dict[str, Download] = {}
        self._lock = threading.Lock()

    def start(self, weights: Weights) -> None:
        """Download `weights`, from the last byte on disk, unless that is under way."""
        with self._lock:
            known = self._states.get(weights.name)
            if known and known.state in ("running", "stopping"):
                return
            self._states[weights.name] = Download(total=weights.size_bytes)
        threading.Thread(target=self._run, args=(weights,), daemon=True).start()

    def stop(self, name: str) -> None:
        """Stop a download that is under way; what has arrived stays on disk."""
        with self._lock:
            known = self._states.get(name)
            if known and known.state == "running":
                self._states[name] = known.model_copy(update={"state": "stopping"})

    def state(self, name: str) -> Download | None:
        """The last download of `name`; None where none was started."""
        return self._states.get(name)

    def _run(self, weights: Weights) -> None:
        arrived: deque[tuple[float, int]] = deque()
        try:
            with closing(hub.fetch(weights)) as steps:
                for step in steps:
                    now = time.monotonic()
                    if arrived and step.done < arrived[-1][1]:
                        arrived.clear()  # a file began again, or another repository
                    arrived.append((now, step.done))
                    while now - arrived[0][0] > RATE_SPAN_S:
                        arrived.popleft()
                    spent = now - arrived[0][0]
                    rate = (step.done - arrived[0][1]) / spent if spent > 0.2 else 0.0
                    if not self._report(weights.name, step.done, step.total, rate):
                        self._set(weights.name, state="stopped", rate=0.0)
                        return
            self._set(weights.name, state="done", rate=0.0)
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise it to
            self._set(weights.name, state="failed", rate=0.0, failed=Failed.from_error(error))

    def _report(self, name: str, done: int, total: int, rate: float) -> bool:
        """Keep how far a download is; whether it may go on."""
        with self._lock:
            known = self._states[name]
            update = {"done": done, "total": total or known.total, "rate": rate}
            self._states[name] = known.model_copy(update=update)
            return known.state == "running"

    def _set(self, name: str, **changes: object) -> None:
        with self._lock:
            self._states[name] = self._states[name].model_copy(update=changes)
