"""What the page and the API share: the Studio protocol, event settings, files and takes.

Nothing here draws anything.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import encode_file_path

from core.errors import StudioError
from core.params import AdapterRef, Request
from core.results import AdapterInfo, AudioInfo, Event, ModelEntry, ModelInfo, Take

Update = dict[Any, Any]
"""What a handler changes, by component. Components that are missing stay as they are."""

PRIVATE = {"api_visibility": "private", "show_progress": "hidden", "preprocess": False}
"""Settings of every event of the page. Values arrive raw: the request checks them and names the
parameter in its message, which Gradio's own checks would not."""

QUICK = {**PRIVATE, "queue": False}
"""Events that answer at once."""

WORK = {**PRIVATE, "concurrency_limit": None, "trigger_mode": "once"}
"""Events that may take long. The studio has its own queue."""


class Studio(Protocol):
    """What the page needs from the backend."""

    def model_info(self) -> ModelInfo:
        """The loaded model, its device and its defaults."""
        ...

    def models(self) -> tuple[ModelEntry, ...]:
        """Every model that the machine could run, with the state of its download."""
        ...

    def fetch(self, name: str) -> None:
        """Begin or resume a download. Raises `model-unknown`."""
        ...

    def stop_fetch(self, name: str) -> None:
        """Stop a download; what has arrived is kept."""
        ...

    def use(self, name: str) -> None:
        """Let later jobs use another model. Raises `model-unknown`."""
        ...

    def run(self, request: Request, visitor: str) -> Generator[Event, None, None]:
        """Run a request: progress at least once a second, then one result. Closing it cancels."""
        ...

    def inspect_audio(self, path: Path) -> AudioInfo:
        """Read an uploaded audio file: its length and waveform. Takes a second or two."""
        ...

    def check_adapter(self, adapter: AdapterRef) -> AdapterInfo:
        """Check an adapter by its header, and that it fits the loaded model."""
        ...

    def stop(self, visitor: str) -> None:
        """Cancel the visitor's running jobs; they end as `Cancelled`."""
        ...

    def takes(self, visitor: str) -> tuple[Take, ...]:
        """The visitor's takes, newest first."""
        ...

    def leave(self, visitor: str) -> None:
        """The visitor is gone: cancel the jobs and delete the takes."""
        ...


def inspect_upload(studio: Studio, value: Any) -> AudioInfo:
    """Read an audio file that was uploaded in the browser.

    Raises:
        StudioError: those of `uploaded_path` and `Studio.look`; `source-missing` for no file.
    """
    path = uploaded_path(value)
    if path is None:
        raise StudioError("source-missing", name="The file")
    return studio.inspect_audio(path)


def uploaded_path(value: Any) -> Path | None:
    """The path of an uploaded file, or of one that this page has served; None for no file.

    Gradio checks the folder of values marked as file data and accepts anything else where a handler
    takes raw values. So the mark is required here, and the folder is checked again.

    Raises:
        StudioError: `file-not-uploaded` for every other path, `source-missing` for a deleted file.
            Neither repeats more of the path than its name.
    """
    if value is None or value == "":
        return None
    marked = isinstance(value, dict) and (value.get("meta") or {}) == {"_type": "gradio.FileData"}
    path = value.get("path") if marked else value
    name = path.replace("\\", "/").rpartition("/")[2][:80] if isinstance(path, str) else ""
    if not marked or not isinstance(path, str) or "\0" in path:
        raise StudioError("file-not-uploaded", name=name or "The file")
    if not is_in_or_equal(path, get_upload_folder()):
        raise StudioError("file-not-uploaded", name=name or "The file")
    if not Path(path).is_file():
        raise StudioError("source-missing", name=name or "The file")
    return Path(path)


def serve_file(block: gr.blocks.Block, path: Path) -> tuple[Path, str]:
    """Copy one of the studio's files into the page's cache; returns its path and URL.

    The URL is relative to the page, so that it works behind a proxy with a path prefix.

    Raises:
        StudioError: `source-missing`.
    """
    if not path.is_file():
        raise StudioError("source-missing", name=path.name)
    cached = Path(block.move_resource_to_block_cache(path))
    return cached, f"{gr.routes.API_PREFIX}/file={encode_file_path(str(cached))}".lstrip("/")


def find_take(studio: Studio, visitor: str, take_id: str) -> Take:
    """The visitor's take with this id. Raises `take-gone`."""
    for take in studio.takes(visitor):
        if take.id == take_id:
            return take
    raise StudioError("take-gone")
