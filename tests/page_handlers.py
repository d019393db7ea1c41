"""The page without a browser: its widgets, and the handlers behind its buttons."""

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
    """The page without a browser: its widgets, and the handlers behind its buttons."""

    def __init__(self, studio: FakeStudio) -> None:
        self.studio = studio
        self.demo = build(studio)
        self.blocks = {
            b.elem_id: b for b in self.demo.blocks.values() if getattr(b, "elem_id", None)
        }

    def event(self, elem_id: str, does: str | None = None) -> Any:
        """What happens when the component is used."""
        wanted = self.blocks[elem_id]._id
        (found,) = (
            f
            for f in self.demo.fns.values()
            if f.fn and any(t[0] == wanted and does in (None, t[1]) for t in f.targets)
        )
        return found

    def inputs(self, mode: str) -> dict[str, Any]:
        """What a run is asked with, by knob; the region is picked on the song's picture."""
        found = {b.elem_id.removeprefix(f"{mode}-"): b for b in self.event(f"{mode}-run").inputs}
        return {name.replace("source-look", "region"): b for name, b in found.items()}

    def form(self, mode: str = "generate", **changes: Any) -> dict[str, Any]:
        """What the form holds, as the browser would send it: name to value."""
        at_first = {name: b.value for name, b in self.inputs(mode).items()}
        assert changes.keys() <= at_first.keys()
        return {**at_first, **changes}

    def event_named(self, does: str) -> Any:
        """The page's own event of this kind."""
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
        """Every update that pressing the component makes, by elem_id.

        Args:
            does: the event, where its handler takes only values.
            does_event: the event, where its handler is told who calls.
        """
        fn = self.event(elem_id, does or does_event).fn
        answer = fn(*values) if does else fn(caller(by), *values)
        updates = list(answer) if isinstance(answer, Iterator) else [answer]
        return [
            {block.elem_id: value for block, value in update.items()}
            if isinstance(update, dict) and all(hasattr(k, "_id") for k in update)
            else update
            for update in updates
        ]

    def make(self, mode: str, by: str = "one", **changes: Any) -> list[dict[Any, Any]]:
        return self.press(f"{mode}-run", *self.form(mode, **changes).values(), by=by)

    def generate(self, by: str = "one", **changes: Any) -> list[dict[Any, Any]]:
        return self.make("generate", by, **{"prompt": "a waltz", **changes})

    def ask(self, mode: str, **changes: Any) -> Request:
        """What the studio is asked for. The job is given up as soon as it is known."""
        already = len(self.studio.asked)
        running = self.event(f"{mode}-run").fn(caller(), *self.form(mode, **changes).values())
        while len(self.studio.asked) == already:
            assert next(running, None), "it was never asked for"
        running.close()
        return self.studio.asked[-1]
