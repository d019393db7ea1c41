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
from gradio_client.utils import encode_file_path

from core.errors import StudioError
from core.params import AdapterRef, Request, with_file_names
from core.requests import SONGS
from core.results import AdapterInfo, AudioInfo, Event, Failed, ModelInfo, Take

Update = dict[Any, Any]
"""What a handler changes, by component; what is not in it stays as it is."""


GLUE = {"api_visibility": "private", "show_progress": "hidden", "preprocess": False}


QUICK = {**GLUE, "queue": False}


WORK = {**GLUE, "concurrency_limit": None, "trigger_mode": "once"}
"""How the page's own events run. Values arrive raw: the request checks them and names the knob,
Gradio's controls would not."""


class Studio(Protocol):
    """What the page needs to know of the backend."""

    def card(self) -> ModelInfo:
        """The model that is playing, its device and its defaults."""

    def run(self, request: Request, visitor: str) -> Iterator[Event]:
        """Do what is asked: progress at least once a second, then one ending. Closing it cancels."""

    def look(self, path: Path) -> AudioInfo:
        """Read a file somebody brought: its length, its picture. Takes a second or two."""

    def fit(self, worn: AdapterRef) -> AdapterInfo:
        """Judge an adapter by its header, and whether it fits the model."""

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
        yield Failed.from_error(error)
    except Exception as error:  # noqa: BLE001 - the page is a face of the studio
        yield Failed.from_error(_internal(error))


def look(studio: Studio, given: Any) -> AudioInfo:
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


def serve(block: gr.blocks.Block, path: Path) -> tuple[Path, str]:
    """Put a file of the studio's own among those of this page: where it is, and its address.

    The address is relative to the page, wherever a proxy puts it.

    Raises:
        StudioError: `source-missing`.
    """
    if not path.is_file():
        raise StudioError("source-missing", name=path.name)
    kept = Path(block.move_resource_to_block_cache(path))
    return kept, f"{gr.routes.API_PREFIX}/file={encode_file_path(str(kept))}".lstrip("/")


def take_of(studio: Studio, visitor: str, chosen: str) -> Take:
    """The visitor's take with the id `chosen`. Raises `take-gone`."""
    for take in studio.takes(visitor):
        if take.id == chosen:
            return take
    raise StudioError("take-gone")


def told(take: Take) -> dict[str, Any]:
    """A take for somebody else: all it knows but where files lie on this computer."""
    plain = take.model_dump(mode="json", exclude={"path"})
    return {**plain, "request": with_file_names(SONGS[take.mode], plain["request"])}


def visitor_of(caller: gr.Request | None) -> str:
    """Who is asking: one browser tab."""
    return getattr(caller, "session_hash", None) or f"nobody-{uuid.uuid4().hex}"


def _internal(error: Exception) -> StudioError:
    traceback.print_exception(error)
    return StudioError("internal", kind=type(error).__name__)
