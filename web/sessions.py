"""Visitors of the page: a reloaded browser tab keeps its visitor, and with it its takes.

Gradio gives each page load a session hash of its own. A page also gets a random token, which the
browser keeps in the tab's session storage; the next load sends it back.
"""

from __future__ import annotations

import secrets
import threading
import time
import uuid

import gradio as gr

from core.results import Take
from web.handlers import Studio

KEEP_S = 300
"""Seconds for which the takes of a closed tab are kept, in case it was only reloaded."""

MAX_KEPT = 20
"""Closed tabs whose takes are kept at a time. The oldest go first: takes are large."""


class Sessions:
    """Which visitor each open page belongs to. Thread-safe."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._lock = threading.Lock()
        self._visitors: dict[str, str] = {}  # open page to visitor
        self._tokens: dict[str, str] = {}  # visitor to token
        self._closed: dict[str, float] = {}  # visitor without a page to its deadline, oldest first
        self._timer: threading.Timer | None = None

    def visitor(self, caller: gr.Request | None) -> str:
        """The visitor behind a request of the page."""
        page = getattr(caller, "session_hash", None) or f"unknown-{uuid.uuid4().hex}"
        with self._lock:
            return self._visitors.get(page, page)

    def resume(self, caller: gr.Request, token: object) -> str:
        """Register a page that has loaded, as the visitor that `token` was given to if it is known.

        Returns:
            The token for the browser to keep.
        """
        page = caller.session_hash or ""
        with self._lock:
            known = {token: visitor for visitor, token in self._tokens.items()}
            visitor = known.get(token, page) if isinstance(token, str) else page
            self._visitors[page] = visitor
            self._closed.pop(visitor, None)
            return self._tokens.setdefault(visitor, secrets.token_urlsafe(24))

    def takes(self, caller: gr.Request | None) -> tuple[Take, ...]:
        """The takes of the visitor behind a request, newest first."""
        return self.studio.takes(self.visitor(caller))

    def close(self, caller: gr.Request) -> None:
        """Handle a closed page: stop its visitor's jobs unless another page of theirs is open.

        The takes are kept for `KEEP_S`.
        """
        page = caller.session_hash or ""
        with self._lock:
            visitor = self._visitors.pop(page, page)
            if visitor in self._visitors.values():
                return
            if keep := visitor in self._tokens:
                self._closed[visitor] = time.monotonic() + KEEP_S
        if keep and self.studio.takes(visitor):
            self.studio.stop(visitor)
        else:
            self._forget(visitor)
        if visitor != page:
            self.studio.leave(page)  # what it may have made before it was registered
        self._sweep()

    def _forget(self, visitor: str) -> None:
        with self._lock:
            self._closed.pop(visitor, None)
            self._tokens.pop(visitor, None)
        self.studio.leave(visitor)

    def _sweep(self) -> None:
        """Delete what is kept too long or too much, and come back when the next deadline is due."""
        now = time.monotonic()
        with self._lock:
            spare = len(self._closed) - MAX_KEPT
            expired = [
                visitor
                for i, (visitor, deadline) in enumerate(self._closed.items())
                if i < spare or deadline <= now
            ]
        for visitor in expired:
            self._forget(visitor)
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._closed:
                wait_s = max(0.0, min(self._closed.values()) - time.monotonic())
                self._timer = threading.Timer(wait_s, self._sweep)
                self._timer.daemon = True
                self._timer.start()
