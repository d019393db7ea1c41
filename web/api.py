"""The named API endpoints: one per request, with the request's own names, types and defaults.

A failed call carries the error's code, message and action as data. Gradio's error event has no
field for that and its Python client accepts no further ones, so the data travels as JSON in `title`
(`json.loads(error.title)` in gradio_client); `unpack_errors` makes fields of it for plain HTTP.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypedDict

import fastapi
import gradio as gr
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import tooltips
from core.errors import StudioError
from core.params import AdapterRef, Param, Request
from core.requests import EXPORTS, HELPERS, MODES, Lyrics
from core.results import Cancelled, Event, ExportedFiles, Failed, Progress, Take
from web.handlers import Studio, uploaded_path

Endpoint = Callable[..., Iterator[Any]]

REQUESTS: dict[str, type[Request]] = {**MODES, **HELPERS, **EXPORTS, Lyrics.mode: Lyrics}
"""Every request with an endpoint, by its name."""

WITH_FILES = (*MODES, *EXPORTS)
"""Endpoints that return a file, or files, before their data."""

RETURNS = {
    **dict.fromkeys(MODES, tooltips.RETURNS_SONG),
    **dict.fromkeys(HELPERS, tooltips.RETURNS_IDEA),
    **dict.fromkeys(EXPORTS, tooltips.RETURNS_FILES),
    Lyrics.mode: tooltips.RETURNS_DRAFT,
}

CANCELLED = "cancelled"
"""The code of a call that was stopped."""


class AdapterFile(TypedDict):
    """An `AdapterRef` as it is sent. A file alone is applied at full strength."""

    file: gr.FileData
    strength: float


class ApiError(gr.Error):
    """A failure with its code, message and action as JSON in `title`."""

    def __init__(self, code: str, message: str, action: str = "") -> None:
        data = json.dumps({"code": code, "message": message, "action": action})
        super().__init__(f"{message} {action}".strip(), title=data, print_exception=False)


class Blocks(gr.Blocks):
    """Gradio's blocks, with an `ApiError` for an API call that sends too few values.

    Attributes:
        studio: for the routes of the server besides Gradio's.
    """

    studio: Studio

    def launch(self, *args: Any, **options: Any) -> Any:
        """Launch; with `quiet` without the lines about MCP, which Gradio 6.31 prints even so."""
        if not options.get("quiet"):
            return super().launch(*args, **options)
        with contextlib.redirect_stdout(io.StringIO()):
            return super().launch(*args, **options)

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Check the number of values of a call.

        Raises:
            ApiError: an API call has too few.
        """
        needed, name = len(block_fn.inputs), block_fn.api_name
        if name in REQUESTS and len(inputs) < needed:
            error = StudioError(
                "value-out-of-range",
                label=f"/{name}",
                problem=tooltips.TOO_FEW_VALUES.format(needed=needed, given=len(inputs)),
                fix=tooltips.SEND_BY_NAME.format(name=name),
            )
            raise ApiError(error.code, error.message, error.action)
        super().validate_inputs(block_fn, inputs)


def publish(demo: gr.Blocks, studio: Studio, request: type[Request]) -> None:
    """Add the endpoint of `request` to the page's API, with the page's labels and help texts."""
    event = gr.api(endpoint(studio, request), api_name=request.mode, concurrency_limit=None)
    function = demo.fns[event["id"]]
    function.tracks_progress = True
    for param, box in zip(request.params(), function.inputs, strict=True):
        box.label = tooltips.label(param)
        box._api_info |= {"additional_description": _help(request.mode, param)}


def endpoint(studio: Studio, request: type[Request]) -> Endpoint:
    """A function with the signature of `request` that streams progress, then the result.

    A song is returned as two values, the file and its take; exported files likewise, as a list.
    During the work the first is None and the second is the progress. Other results are one value.
    Progress is also told in Gradio's own way, which is all that reaches clients of MCP.
    """
    params = request.params()
    with_files = request.mode in WITH_FILES

    def answer(*values: Any) -> Iterator[Any]:
        progress = gr.Progress()
        visitor = f"api-{uuid.uuid4().hex}"
        try:
            asked = _request_from(request, dict(zip(params, values, strict=True)))
            with closing(studio.run(asked, visitor)) as events:
                for event in events:
                    if isinstance(event, Progress):
                        progress((event.step, event.steps or None), desc=event.stage)
                    yield _answer_to(event, with_files)
        except gr.Error:
            raise
        except Exception as error:
            failed = Failed.from_error(error)
            raise ApiError(failed.code, failed.message, failed.action) from error
        finally:
            # Gradio has copied the file for the caller by now.
            studio.leave(visitor)

    return _with_signature(answer, request)


def _request_from(request: type[Request], values: dict[Param, Any]) -> Request:
    given = {param.name: _received(param, value) for param, value in values.items()}
    missing = {
        param.name
        for param in values
        if param.type is Path and param.required and given[param.name] is None
    }
    # Gradio fills in the default of a switch that was not sent. For this one it matters who set it.
    missing |= {name for name in ("ai_generated",) if given.get(name) is True}
    return request.of({name: value for name, value in given.items() if name not in missing})


def _answer_to(event: Event, with_files: bool) -> Any:
    """What is sent for an event. Raises `ApiError` for one that ends without a result."""
    if isinstance(event, Failed):
        raise ApiError(event.code, event.message, event.action)
    if isinstance(event, Cancelled):
        raise ApiError(CANCELLED, tooltips.CANCELLED)
    if isinstance(event, Take):
        # The take's `path` is left out: a client fetches whatever has one.
        return _file_data(event.path), event.for_sharing().model_dump(mode="json", exclude={"path"})
    if isinstance(event, ExportedFiles):
        return [*map(_file_data, event.paths)], event.model_dump(exclude={"paths"})
    data = event.model_dump(mode="json")
    return (None, data) if with_files else data


def _file_data(path: str) -> dict[str, Any]:
    return gr.FileData(path=path, orig_name=Path(path).name).model_dump()


def _received(param: Param, value: Any) -> Any:
    """A received value as the request takes it: paths in place of uploaded files."""
    if param.type is Path:
        return uploaded_path(value)
    if param.type is not AdapterRef or not isinstance(value, list | tuple):
        return value
    files = {k.name for k in AdapterRef.params() if k.type is Path}
    return [
        {k: uploaded_path(v) if k in files else v for k, v in adapter.items()}
        if isinstance(adapter, dict) and "path" not in adapter
        else {"file": uploaded_path(adapter)}
        for adapter in value
    ]


def _with_signature(answer: Endpoint, request: type[Request]) -> Endpoint:
    """`answer` with the names, types, defaults and docstring that Gradio reads from a function."""
    params = request.params()
    hints = {k.name: _hint(k) for k in params}
    answer.__name__ = request.mode
    answer.__annotations__ = hints
    answer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                k.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if k.required else k.default,
                annotation=hints[k.name],
            )
            for k in params
        ],
        return_annotation=_return_hint(request.mode),
    )
    answer.__doc__ = "\n".join(
        [
            (request.__doc__ or "").strip(),
            "",
            "Args:",
            *(f"    {k.name}: {_help(request.mode, k)}" for k in params),
            "",
            "Returns:",
            f"    {RETURNS[request.mode]}",
        ]
    )
    return answer


def _return_hint(mode: str) -> Any:
    data = dict[str, Any]
    if mode in EXPORTS:
        return tuple[list[gr.FileData], data]
    return tuple[gr.FileData, data] if mode in MODES else data


def _hint(param: Param) -> Any:
    if param.type is Path:
        # Not `| None`: Gradio's MCP server recognises a file only by this exact type.
        return gr.FileData
    if param.type is AdapterRef:
        return list[AdapterFile]
    kind: Any = Literal[param.choices] if param.choices else param.type
    return kind | None if param.optional else kind


def _help(mode: str, param: Param) -> str:
    options = f" One of: {', '.join(map(repr, param.choices))}." if param.choices else ""
    return tooltips.help_text(mode, param) + options


async def wrong_names(request: fastapi.Request, error: TypeError) -> JSONResponse:
    """Answer a call by names that has a wrong or missing name. Gradio would answer with a 500."""
    wrong = re.search(r"Parameter `(.*)` is not a valid|required argument: (.*)", str(error))
    called = REQUESTS.get(request.url.path.rsplit("/", 1)[-1])
    if wrong is None or called is None:
        raise error
    required = {k.name: "-" for k in called.params() if k.required}
    try:
        called.of({} if wrong[1] is None else {**required, wrong[1]: None})
    except StudioError as found:
        data = {"code": found.code, "message": found.message, "action": found.action}
        return JSONResponse({**data, "error": str(found)}, status_code=422)
    raise error


class UnpackErrors:
    """Middleware that gives error events of plain HTTP calls the fields code, message, action."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; of a call's event stream, rewrite the error events."""
        if scope["type"] != "http" or f"{gr.routes.API_PREFIX}/call/" not in scope["path"]:
            await self.app(scope, receive, send)
            return

        async def unpacked(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": unpack_error(message.get("body", b""))}
            await send(message)

        await self.app(scope, receive, unpacked)


def unpack_error(chunk: bytes) -> bytes:
    """An event of a stream; an error event whose title holds data gets it as fields.

    Gradio sends each event as one chunk.
    """
    head, mark, data = chunk.partition(b"event: error\ndata: ")
    if head or not mark:
        return chunk
    try:
        event = json.loads(data)
        fields = json.loads(event["title"])
        fields = {name: fields[name] for name in ("code", "message", "action")}
    except (ValueError, TypeError, KeyError):
        return chunk
    return mark + json.dumps({**event, "title": tooltips.FAILED, **fields}).encode() + b"\n\n"
