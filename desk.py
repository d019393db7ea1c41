"""What page and API have in common: the studio as they see it, jobs they watch, files they accept.

Nothing here draws anything.
"""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal

from errors import StudioError
from knobs import Request
from song import Card, Event, Failed, Look, Take


class Studio(Protocol):
    """What the page needs to know of the backend."""

    def card(self) -> Card:
        """The model that is playing, its device and its defaults."""

    def run(self, request: Request, visitor: str) -> Iterator[Event]:
        """Do what is asked: progress at least once a second, then one ending. Closing it cancels."""

    def look(self, path: Path) -> Look:
        """Read a file somebody brought: its length, its picture. Takes a second or two."""

    def stop(self, visitor: str) -> None:
        """Let the visitor's running jobs end as `Cancelled`."""

    def takes(self, visitor: str) -> tuple[Take, ...]:
        """The visitor's takes, newest first."""

    def leave(self, visitor: str) -> None:
        """The visitor is gone: cancel and clean up."""


def watch(studio: Studio, ask: Callable[[], Request], visitor: str) -> Iterator[Event]:
    """Run what `ask` asks for. Whatever goes wrong comes out as an event, not as an exception."""
    try:
        with closing(studio.run(ask(), visitor)) as events:
            yield from events
    except StudioError as error:
        yield Failed.by(error)
    except Exception as error:  # noqa: BLE001 - the page is a face of the studio
        yield Failed.by(_internal(error))


def look(studio: Studio, given: Any) -> Look:
    """See what is in a file that came through the browser. Raises nothing but `StudioError`."""
    try:
        path = brought(given)
        if path is None:
            raise StudioError("source-missing", name="The file")
        return studio.look(path)
    except StudioError:
        raise
    except Exception as error:
        raise _internal(error) from error


def brought(given: Any) -> Path | None:
    """The file that `given` stands for: one that was uploaded here, or that this page has served.

    Gradio checks the folder of whatever carries its mark, and lets anything else through where a
    handler takes raw values. So the mark is required here, and the folder is looked at once more.

    Raises:
        StudioError: `file-not-uploaded` for every other path, `source-missing` for one that is
            gone. Neither repeats more of the path than its name.
    """
    if given is None or given == "":
        return None
    marked = isinstance(given, dict) and (given.get("meta") or {}) == {"_type": "gradio.FileData"}
    path = given.get("path") if marked else given
    name = path.replace("\\", "/").rpartition("/")[2][:80] if isinstance(path, str) else ""
    if not marked or not isinstance(path, str) or "\0" in path:
        raise StudioError("file-not-uploaded", name=name or "The file")
    if not is_in_or_equal(path, get_upload_folder()):
        raise StudioError("file-not-uploaded", name=name or "The file")
    if not Path(path).is_file():
        raise StudioError("source-missing", name=name or "The file")
    return Path(path)


def told(take: Take) -> dict[str, Any]:
    """A take for somebody else: all it knows but where files lie on this computer."""
    plain = take.model_dump(mode="json", exclude={"path"})
    for knob in take.again().knobs():
        if knob.type is Path and plain["request"].get(knob.name):
            plain["request"][knob.name] = Path(plain["request"][knob.name]).name
    return plain


def visitor_of(caller: gr.Request | None) -> str:
    """Who is asking: one browser tab."""
    return getattr(caller, "session_hash", None) or f"nobody-{uuid.uuid4().hex}"


def _internal(error: Exception) -> StudioError:
    traceback.print_exception(error)
    return StudioError("internal", kind=type(error).__name__)
