"""An HTTP face in the manner of OpenAI's: `/v1/models`, `/v1/audio/music`, `/v1/audio/speech`.

JSON goes in and a sound file comes out, or a stream of events. The fields are those of `Generate`,
checked by it. Errors are in OpenAI's envelope, with the studio's codes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from core.errors import StudioError
from core.music import LANGUAGES
from core.params import AdapterRef, Request
from core.requests import Export, Generate
from core.results import Cancelled, Event, ExportedFiles, Failed, ModelInfo, Progress, Take
from web.handlers import Studio

KEY_VARIABLE = "ACE_API_KEY"
"""Environment variable that holds the key. Without one, nobody is asked for a key."""

MUSIC, SPEECH = "/v1/audio/music", "/v1/audio/speech"

KINDS = {"mp3": "audio/mpeg", "wav": "audio/wav", "flac": "audio/flac"}
"""Media types by format. The first is the default, as with OpenAI."""

SONG_FIELDS = tuple(
    param.name
    for param in Generate.params()
    if param.type is not Path and param.type is not AdapterRef
)
"""Fields that JSON can hold: all but the files."""

OWN_FIELDS = ("model", "response_format", "stream", "stream_format")
FIELDS = {
    MUSIC: ("input", *OWN_FIELDS, *SONG_FIELDS),
    SPEECH: ("input", "instructions", "voice", *OWN_FIELDS, *SONG_FIELDS),
}

INSTRUMENTAL, ANY_VOICE = "instrumental", ("", "auto", "unknown")
"""Values of `voice` besides the languages."""

MAX_BODY_BYTES = 256 * 1024
"""The longest lyrics fit, with each character escaped."""

EVENT_BYTES = 384 * 1024
"""Bytes of sound in one event. Divisible by three, so that the parts of the text join."""

RETRY_AFTER_S = 10

STATUS = {
    "api-key-wrong": 401,
    "endpoint-unknown": 404,
    "model-not-loaded": 404,
    "queue-full": 429,
    "cancelled": 503,
    **dict.fromkeys(("model-missing", "model-gated", "hub-unknown", "download-failed"), 503),
    **dict.fromkeys(("gpu-refused", "gpu-aborted", "cache-read-only", "planner-missing"), 503),
    **dict.fromkeys(("out-of-memory", "sound-not-finite", "internal", "disk-full"), 500),
    **dict.fromkeys(("not-writable", "model-broken", "model-mismatch", "device-missing"), 500),
}
"""HTTP status by error code; 400 for all others."""


class Order(NamedTuple):
    """What a call asks for."""

    song: Request
    format: str
    stream: bool


def routes() -> list[Route]:
    """The routes, for the server of the page, whose blocks hold the `studio`."""
    return [
        Route("/v1/models", _guarded(_models), methods=["GET"]),
        Route("/v1/models/{name:path}", _guarded(_model), methods=["GET"]),
        Route(MUSIC, _guarded(_make), methods=["POST"]),
        Route(SPEECH, _guarded(_make), methods=["POST"]),
        Route("/v1/{path:path}", _guarded(_unknown), methods=["GET", "POST", "PUT", "DELETE"]),
    ]


def _guarded(answer: Callable[[HttpRequest, Studio], Any]) -> Callable[[HttpRequest], Any]:
    """`answer` behind the key, with its errors in OpenAI's envelope."""

    async def guarded(request: HttpRequest) -> Response:
        try:
            check_key(request.headers.get("authorization", ""))
            return await answer(request, request.app.get_blocks().studio)
        except Exception as error:  # noqa: BLE001 - none may leave without the envelope
            return _failure(Failed.from_error(error))

    return guarded


def check_key(authorization: str) -> None:
    """Compare the header of a call with the key, in constant time.

    Raises:
        StudioError: `api-key-wrong`.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    scheme, _, given = authorization.partition(" ")
    # Headers arrive as Latin-1, whatever was sent.
    right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    if key and not (right and scheme.lower() == "bearer"):
        raise StudioError("api-key-wrong")


async def _models(_: HttpRequest, studio: Studio) -> Response:
    return JSONResponse({"object": "list", "data": [_described(studio.model_info())]})


async def _model(request: HttpRequest, studio: Studio) -> Response:
    info = studio.model_info()
    _check_model(request.path_params["name"], info)
    return JSONResponse(_described(info))


def _described(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": int(STARTED),
        "owned_by": "ace-step",
        "title": info.title,
        "licence": info.licence,
        "longest_s": info.longest_s,
    }


STARTED = time.time()
"""When the models were first offered, which OpenAI's clients expect to be told."""


def _check_model(name: object, info: ModelInfo) -> None:
    if name not in (None, "", info.name):
        raise StudioError("model-not-loaded", name=str(name)[:80], known=info.name)


async def _unknown(request: HttpRequest, _: Studio) -> Response:
    known = ", ".join(("GET /v1/models", f"POST {MUSIC}", f"POST {SPEECH}"))
    raise StudioError("endpoint-unknown", path=request.url.path[:80], known=known)


async def _make(request: HttpRequest, studio: Studio) -> Response:
    """Make a song: the file, or with `stream` the events."""
    path = MUSIC if request.url.path.endswith(MUSIC) else SPEECH
    order = read_order(await _body(request), path, studio.model_info())
    visitor = f"v1-{uuid.uuid4().hex}"
    if order.stream:
        return StreamingResponse(
            _stream(studio, order, visitor),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
    making = asyncio.create_task(_file(studio, order, visitor))
    leaving = asyncio.create_task(_disconnected(request))
    await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not making.done():
        making.cancel()  # this closes the job
        with contextlib.suppress(asyncio.CancelledError):
            await making
        return Response(status_code=499)  # nobody reads it
    ending, sound = making.result()
    if not isinstance(ending, Take):
        return _failure(ending)
    headers = {"content-disposition": f'attachment; filename="{_file_name(ending, order.format)}"'}
    return Response(sound, media_type=KINDS[order.format], headers=headers)


async def _body(request: HttpRequest) -> dict[str, Any]:
    """The JSON object of a call.

    Raises:
        StudioError: it is too large, or none.
    """
    problem = "is not a JSON object"
    body = bytearray()
    async for part in request.stream():
        body.extend(part)
        if len(body) > MAX_BODY_BYTES:
            problem = f"is larger than {MAX_BODY_BYTES // 1024} KB"
            break
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Other kinds can be sent by any web page that a person visits, without asking first.
    if kind == "application/json" and len(body) <= MAX_BODY_BYTES:
        try:
            given = json.loads(bytes(body))
        except (ValueError, RecursionError):
            given = None
        if isinstance(given, dict):
            return given
    fix = "Send a JSON object with the header Content-Type: application/json"
    raise StudioError("value-out-of-range", label="The body", problem=problem, fix=fix)


def read_order(given: Mapping[str, Any], path: str, info: ModelInfo) -> Order:
    """Check a call.

    `input` is the style for `/v1/audio/music`, and the lyrics for `/v1/audio/speech`, where
    `instructions` is the style.

    Raises:
        StudioError: names the first field that does not fit.
    """
    fields = FIELDS[path]
    for name in given:
        if name not in fields:
            raise StudioError("unknown-field", name=name[:80], mode=path, known=", ".join(fields))
    _check_model(given.get("model"), info)
    stream = _choice(given, "stream", (False, True))
    events = _choice(given, "stream_format", ("audio", "sse")) == "sse"
    format_ = _choice(given, "response_format", tuple(KINDS))
    song = {name: value for name, value in given.items() if name in SONG_FIELDS}
    aliases = (
        {"input": "prompt"} if path == MUSIC else {"input": "lyrics", "instructions": "prompt"}
    )
    for alias, name in aliases.items():
        if alias in given and name in song:
            raise StudioError(
                "value-out-of-range",
                label=alias,
                problem=f"and {name} mean the same",
                fix="Send one of them",
            )
        if alias in given:
            song[name] = given[alias]
    song |= _voice(given.get("voice"))
    return Order(Generate.of(song), format_, stream or events)


def _choice(given: Mapping[str, Any], name: str, choices: tuple[Any, ...]) -> Any:
    """The value of a field, or the first choice where it was not sent."""
    value = given.get(name)
    value = choices[0] if value is None else value
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise StudioError(
            "value-out-of-range",
            label=name,
            problem=f"cannot be {json.dumps(value)[:40]}",
            fix=f"Choose one of {', '.join(map(json.dumps, choices))}",
        )
    return value


def _voice(voice: object) -> dict[str, Any]:
    """The fields that a `voice` stands for."""
    if voice is None or voice in ANY_VOICE:
        return {}
    if voice == INSTRUMENTAL:
        return {"instrumental": True}
    if voice in LANGUAGES:
        return {"vocal_language": voice}
    raise StudioError(
        "value-out-of-range",
        label="voice",
        problem=f"cannot be {str(voice)[:40]!r}",
        fix=f"Choose auto, {INSTRUMENTAL}, or the code of a language, such as en",
    )


async def _events(studio: Studio, request: Request, visitor: str) -> AsyncGenerator[Event, None]:
    """The events of a job, run in a thread of its own. Closing the iterator stops the job."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Event] = asyncio.Queue()
    closed = threading.Event()

    def emit(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(arrived.put_nowait, event)

    def work() -> None:
        try:
            with closing(studio.run(request, visitor)) as events:
                for event in events:
                    emit(event)
                    if closed.is_set():
                        return
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
            emit(Failed.from_error(error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            event = await arrived.get()
            yield event
            if not isinstance(event, Progress):
                return
    finally:
        closed.set()


async def _song(studio: Studio, order: Order, visitor: str) -> AsyncGenerator[Event | bytes, None]:
    """Progress, then the sound in the format of the order and its take, or what went wrong.

    At the end, or when it is closed, the visitor leaves: their job stops and their files go.
    """
    try:
        ending: Event | None = None
        async with aclosing(_events(studio, order.song, visitor)) as events:
            async for ending in events:
                if isinstance(ending, Progress):
                    yield ending
        take = ending
        if isinstance(take, Take) and order.format != "wav":
            export = Export.of({"source": take.path, "format": order.format})
            async with aclosing(_events(studio, export, visitor)) as events:
                async for ending in events:
                    if isinstance(ending, Progress):
                        yield ending
        path = ending.paths[0] if isinstance(ending, ExportedFiles) else getattr(take, "path", "")
        if isinstance(take, Take) and isinstance(ending, Take | ExportedFiles):
            yield await asyncio.to_thread(Path(path).read_bytes)
            yield take
        elif ending is not None:
            yield ending
    finally:
        threading.Thread(target=studio.leave, args=(visitor,), daemon=True).start()


async def _file(studio: Studio, order: Order, visitor: str) -> tuple[Event, bytes]:
    """Make a song without telling of its progress: its take and its bytes, or what went wrong."""
    sound = b""
    ending: Event | None = None
    async with aclosing(_song(studio, order, visitor)) as parts:
        async for part in parts:
            if isinstance(part, bytes):
                sound = part
            else:
                ending = part
    assert ending is not None
    return ending, sound


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(studio: Studio, order: Order, visitor: str) -> AsyncGenerator[str, None]:
    """The events of a call as text. When the client goes away, the server closes this iterator."""
    async with aclosing(_song(studio, order, visitor)) as parts:
        async for part in parts:
            if isinstance(part, Progress):
                yield _event("progress", part.model_dump(mode="json", exclude={"kind", "text"}))
            elif isinstance(part, bytes):
                for at in range(0, len(part), EVENT_BYTES):
                    piece = part[at : at + EVENT_BYTES]
                    yield _event("speech.audio.delta", {"audio": base64.b64encode(piece).decode()})
            elif isinstance(part, Take):
                take = part.for_sharing().model_dump(mode="json", exclude={"path"})
                name = _file_name(part, order.format)
                yield _event("speech.audio.done", {"file": name, "take": take})
            else:
                yield _event("error", _envelope(_as_failed(part)))


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def _file_name(take: Take, format_: str) -> str:
    return f"song-{take.request.get('seed')}.{format_}"


def _as_failed(ending: Event) -> Failed:
    if isinstance(ending, Failed):
        return ending
    if isinstance(ending, Cancelled):
        text = "The call was stopped before the song was finished."
        return Failed(code="cancelled", message=text, action="Send it again.")
    raise TypeError(type(ending).__name__)


def _envelope(failed: Failed) -> dict[str, Any]:
    status = STATUS.get(failed.code, 400)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": f"{failed.message} {failed.action}".strip(),
            "type": kind,
            "param": None,
            "code": failed.code,
            "action": failed.action,
        }
    }


def _failure(ending: Event) -> Response:
    """The response to a call that failed."""
    failed = _as_failed(ending)
    status = STATUS.get(failed.code, 400)
    # OpenAI's client repeats a call that failed on the server, which would make the song again.
    headers = {"x-should-retry": "true" if status == 429 else "false"}
    if status == 429:
        headers["retry-after"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(_envelope(failed), status_code=status, headers=headers)
