"""The API's faces: one function a request, with the request's own names, types and defaults."""

from __future__ import annotations

import inspect
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypedDict

import fastapi
import gradio as gr
from fastapi.responses import JSONResponse

import tooltips as words
from core.errors import StudioError
from core.params import AdapterRef, Param, Request
from core.requests import EXPORTS, HELPERS, MODES, Lyrics
from core.results import Cancelled, ExportedFiles, Failed, Take
from web.handlers import Studio, brought, told, watch

Answer = Callable[..., Iterator[Any]]


class AdapterFile(TypedDict):
    """A `AdapterRef` as it is sent. A file alone plays at its full strength."""

    file: gr.FileData
    strength: float


RETURNS = {
    **dict.fromkeys(MODES, words.RETURNS_SONG),
    **dict.fromkeys(HELPERS, words.RETURNS_IDEA),
    **dict.fromkeys(EXPORTS, words.RETURNS_FILES),
    Lyrics.mode: words.RETURNS_DRAFT,
}


def publish(demo: gr.Blocks, studio: Studio, request: type[Request]) -> None:
    """Put the endpoint of `request` on the page's API, told in the words of the page."""
    event = gr.api(endpoint(studio, request), api_name=request.mode, concurrency_limit=None)
    for param, box in zip(request.params(), demo.fns[event["id"]].inputs, strict=True):
        box.label = words.label(param)
        box._api_info |= {"additional_description": _told(request.mode, param)}


def endpoint(studio: Studio, request: type[Request]) -> Answer:
    """A function with the signature of `request` that streams progress, then the ending.

    A song comes as two values, the file and its take, and so do the files made of one, as a list;
    while they are made the first is None and the second says what is going on. What a helper found
    comes as one value.
    """
    params, sings = request.params(), request.mode in (*MODES, *EXPORTS)

    def ask(values: tuple[Any, ...]) -> Request:
        given = {}
        for param, value in zip(params, values, strict=True):
            given[param.name] = _received(param, value)
        return request.of({k.name: given[k.name] for k in params if not _missing(k, given[k.name])})

    def answer(*values: Any) -> Iterator[Any]:
        visitor = f"api-{uuid.uuid4().hex}"
        try:
            with closing(watch(studio, lambda: ask(values), visitor)) as events:
                for event in events:
                    if isinstance(event, Failed):
                        raise _spoken(event)
                    if isinstance(event, Cancelled):
                        raise gr.Error(words.CANCELLED, print_exception=False)
                    if isinstance(event, Take):
                        # A client takes whatever has a "path" for a file to fetch.
                        yield _sent(event.path), told(event)
                    elif isinstance(event, ExportedFiles):
                        yield [*map(_sent, event.paths)], event.model_dump(exclude={"paths"})
                    else:
                        plain = event.model_dump(mode="json")
                        yield (None, plain) if sings else plain
        finally:
            # The file has been copied for the caller by now, so nothing needs to stay.
            studio.leave(visitor)

    return _signed(answer, request, sings)


def _sent(path: str) -> dict[str, Any]:
    return gr.FileData(path=path, orig_name=Path(path).name).model_dump()


def _received(param: Param, value: Any) -> Any:
    """A value as the request wants it: of files, where they lie."""
    if param.type is Path:
        return brought(value)
    if param.type is not AdapterRef or not isinstance(value, list | tuple):
        return value
    files = {k.name for k in AdapterRef.params() if k.type is Path}
    return [
        {k: brought(v) if k in files else v for k, v in worn.items()}
        if isinstance(worn, dict) and "path" not in worn
        else {"file": brought(worn)}
        for worn in value
    ]


def _signed(answer: Answer, request: type[Request], sings: bool) -> Answer:
    """Gradio reads names, types, defaults and descriptions from the function itself."""
    params = request.params()
    hints = {k.name: _hint(k) for k in params}
    answer.__name__ = request.mode
    answer.__annotations__ = hints
    answer.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                k.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if k.required else k.default,
                annotation=hints[k.name],
            )
            for k in params
        ],
        return_annotation=_returned(request.mode),
    )
    answer.__doc__ = "\n".join(
        [
            (request.__doc__ or "").strip(),
            "",
            "Args:",
            *(f"    {k.name}: {_told(request.mode, k)}" for k in params),
            "",
            "Returns:",
            f"    {RETURNS[request.mode]}",
        ]
    )
    return answer


def _returned(mode: str) -> Any:
    told = dict[str, Any]
    if mode in EXPORTS:
        return tuple[list[gr.FileData], told]
    return tuple[gr.FileData, told] if mode in MODES else told


def _hint(param: Param) -> Any:
    if param.type is Path:
        # Not `| None`: Gradio's MCP face finds a file only where its type says nothing else.
        return gr.FileData
    if param.type is AdapterRef:
        return list[AdapterFile]
    kind = Literal[param.choices] if param.choices else param.type
    return kind | None if param.optional else kind


def _told(mode: str, param: Param) -> str:
    options = f" One of: {', '.join(map(repr, param.choices))}." if param.choices else ""
    return words.tip(mode, param) + options


def _missing(param: Param, value: Any) -> bool:
    """No file where one is needed: the request says so in its own words."""
    return param.type is Path and param.required and value is None


def _spoken(trouble: Failed) -> gr.Error:
    return gr.Error(
        f"{trouble.message} {trouble.action}", title=words.FAILED, print_exception=False
    )


async def misnamed(request: fastapi.Request, error: TypeError) -> JSONResponse:
    """Say which name is wrong when the API is called by names. Gradio would answer with a 500."""
    wrong = re.search(r"Parameter `(.*)` is not a valid|required argument: (.*)", str(error))
    mode = (MODES | HELPERS | EXPORTS | {Lyrics.mode: Lyrics}).get(
        request.url.path.rsplit("/", 1)[-1]
    )
    if wrong is None or mode is None:
        raise error
    needed = {k.name: "-" for k in mode.params() if k.required}
    given = {} if wrong[1] is None else {**needed, wrong[1]: None}
    try:
        mode.of(given)
    except StudioError as trouble:
        return JSONResponse({"code": trouble.code, "error": str(trouble)}, status_code=422)
    raise error
