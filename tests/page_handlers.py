"""The page without a browser: widgets by elem_id, event handlers called directly."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from fake_studio import FakeStudio

from core.params import Request
from web.page import build


def caller(name: str = "one") -> Any:
    return SimpleNamespace(session_hash=name)


class Page:
    """The page built on a fake studio, with its widgets and event handlers."""

    def __init__(self, studio: FakeStudio) -> None:
        self.studio = studio
        self.demo = build(studio)
        self.blocks = {
            b.elem_id: b for b in self.demo.blocks.values() if getattr(b, "elem_id", None)
        }

    def event(self, elem_id: str, does: str | None = None) -> Any:
        """The handler of the component's event; `does` picks one of several."""
        block_id = self.blocks[elem_id]._id
        (found,) = (
            f
            for f in self.demo.fns.values()
            if f.fn and any(t[0] == block_id and does in (None, t[1]) for t in f.targets)
        )
        return found

    def inputs(self, mode: str) -> dict[str, Any]:
        """Input widgets of a run by field name; the preview holds the repaint region."""
        found = {b.elem_id.removeprefix(f"{mode}-"): b for b in self.event(f"{mode}-run").inputs}
        return {name.replace("source-look", "region"): b for name, b in found.items()}

    def form(self, mode: str = "generate", **changes: Any) -> dict[str, Any]:
        """Form values by field name, as the browser would send them."""
        initial = {name: b.value for name, b in self.inputs(mode).items()}
        assert changes.keys() <= initial.keys()
        return {**initial, **changes}

    def event_named(self, does: str) -> Any:
        """The only handler of this event, whichever component it belongs to."""
        (found,) = (f for f in self.demo.fns.values() if any(t[1] == does for t in f.targets))
        return found

    def press(
        self,
        elem_id: str,
        *values: Any,
        by: str = "one",
        does: str | None = None,
        does_event: str | None = None,
    ) -> Any:
        """Run the component's event handler and return its updates by elem_id.

        Args:
            does: the event, if its handler takes only values.
            does_event: the event, if its handler also takes the caller.
        """
        fn = self.event(elem_id, does or does_event).fn
        result = fn(*values) if does else fn(caller(by), *values)
        updates = list(result) if isinstance(result, Iterator) else [result]
        return [
            {block.elem_id: value for block, value in update.items()}
            if isinstance(update, dict) and all(hasattr(k, "_id") for k in update)
            else update
            for update in updates
        ]

    def run_mode(self, mode: str, by: str = "one", **changes: Any) -> list[dict[Any, Any]]:
        return self.press(f"{mode}-run", *self.form(mode, **changes).values(), by=by)

    def generate(self, by: str = "one", **changes: Any) -> list[dict[Any, Any]]:
        return self.run_mode("generate", by, **{"prompt": "a waltz", **changes})

    def submit(self, mode: str, **changes: Any) -> Request:
        """The request that a run sends to the studio. The job is closed once it has arrived."""
        count = len(self.studio.requests)
        running = self.event(f"{mode}-run").fn(caller(), *self.form(mode, **changes).values())
        while len(self.studio.requests) == count:
            assert next(running, None), "no request was sent"
        running.close()
        return self.studio.requests[-1]
