"""Serve what is the same for every visitor from memory: compressed once, with an ETag.

Gradio copies the page's configuration, writes its JSON and fills in its template for each view,
and compresses every script each time it is sent.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import brotli
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

PAGES = ("/", "/config", "/gradio_api/info", "/theme.css", "/gradio_api/theme.css")
"""Paths whose answer depends on the address by which the server was reached."""

FILES = ("/assets/", "/static/")
"""Folders of Gradio's own files, which depend on the path alone."""

HASHED = "/assets/"
"""Here each file's name changes with its contents."""

COMPRESSED = (".js", ".css", ".svg", ".json")
"""Endings of the files that are compressed. Others are left to Gradio."""

ADDRESS_HEADERS = ("host", "x-forwarded-host", "x-forwarded-proto", "x-gradio-server")
"""What Gradio makes the page's own address from."""

OWN_PAGE_QUERY = ("deep_link", "page", "all_endpoints")
"""Parameters for which Gradio makes another answer."""

ADDRESSES_KEPT = 64
"""Answers kept for different addresses. Anyone can send any Host header."""

UNUSED_BY_THE_PAGE = ("api_info", "api_info_as_input", "api_info_as_output", "example_inputs")
"""Properties of a component that only clients of the API read, and they from /config."""

CONFIG_MARK = b"window.gradio_config = "

Key = tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A stored response.

    Attributes:
        bodies: the content by its encoding. The content itself is not kept, since it is large
            and few ask for it.
    """

    kind: str
    etag: str
    cache_control: str
    bodies: dict[str, bytes]


class PageCache:
    """ASGI middleware that answers requests for the page, its configuration and its scripts.

    An answer is made on the first request for it, in Gradio's worker threads and ours, and never on
    the event loop.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._pages: OrderedDict[Key, Answer] = OrderedDict()
        self._files: dict[Key, Answer] = {}
        self._in_progress: dict[Key, asyncio.Task[Answer | None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer from memory, or pass the request on."""
        key = _key(scope)
        if key is None:
            await self.app(scope, receive, send)
            return
        answer = self._stored(key)
        if answer is None:
            making = self._start(key, scope)
            if (scope["method"], scope["path"]) == ("HEAD", "/"):
                # Gradio asks this of itself at the start, and gives up after three seconds.
                await Response(media_type="text/html")(scope, receive, send)
                return
            # A visitor who goes away must not take the answer from the others who wait for it.
            answer = await asyncio.shield(making)
        if answer is None:
            await self.app(scope, receive, send)
        else:
            await _respond(answer, scope, send)

    def _stored(self, key: Key) -> Answer | None:
        if key in self._pages:
            self._pages.move_to_end(key)
        return self._pages.get(key) or self._files.get(key)

    def _start(self, key: Key, scope: Scope) -> asyncio.Task[Answer | None]:
        """Make an answer, unless that is going on already; None will come of a failure."""
        task = self._in_progress.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = asyncio.create_task(self._make(key, scope))
            self._in_progress[key] = task
            task.add_done_callback(lambda _: self._in_progress.pop(key, None))
        return task

    async def _make(self, key: Key, scope: Scope) -> Answer | None:
        status, headers, body = await _response_of(self.app, scope)
        if status != 200:
            return None
        answer = await asyncio.to_thread(_pack, key[0], headers.get("content-type", ""), body)
        if key[0] in PAGES:
            self._pages[key] = answer
            while len(self._pages) > ADDRESSES_KEPT:
                self._pages.popitem(last=False)
        else:
            self._files[key] = answer
        return answer


def _key(scope: Scope) -> Key | None:
    """What the answer to a request depends on; None for a request that is passed on."""
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return None
    path = scope["path"]
    headers = Headers(scope=scope)
    if path.startswith(FILES):
        # Without compression there is nothing to gain.
        return (path,) if path.endswith(COMPRESSED) and _encoding(headers) else None
    if path not in PAGES or any(k in OWN_PAGE_QUERY for k in QueryParams(scope["query_string"])):
        return None
    address = (headers.get(name, "") for name in ADDRESS_HEADERS)
    return (path, scope.get("scheme", ""), scope.get("root_path", ""), *address)


def _encoding(headers: Headers) -> str:
    """The best encoding that a client accepts, "" for none."""
    accepted = headers.get("accept-encoding", "")
    names = [
        name.strip()
        for name, _, weight in (part.partition(";") for part in accepted.split(","))
        if weight.replace(" ", "") not in ("q=0", "q=0.0")
    ]
    return next((name for name in ("br", "gzip") if name in names), "")


async def _response_of(app: ASGIApp, scope: Scope) -> tuple[int, Headers, bytes]:
    """The plain response to a request, stripped of everything that differs between visitors."""
    kept = [
        (name, value)
        for name, value in scope["headers"]
        if name.decode("latin-1").lower() in ADDRESS_HEADERS
    ]
    plain = {**scope, "method": "GET", "headers": kept, "query_string": b"", "state": {}}
    status, headers, body = 500, Headers(), bytearray()
    request_sent = False

    async def receive() -> Message:
        nonlocal request_sent
        if request_sent:
            await asyncio.Future()  # nobody disconnects
        request_sent = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], Headers(raw=message["headers"])
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))

    await app(plain, receive, send)
    return status, headers, bytes(body)


def _pack(path: str, kind: str, body: bytes) -> Answer:
    """Compress a response as well as can be done in under a second."""
    if path == "/":
        body = without_unused(body)
    return Answer(
        kind=kind,
        # Weak, since the same tag stands for every encoding.
        etag=f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',
        cache_control="public, max-age=31536000, immutable"
        if path.startswith(HASHED)
        else "no-cache",
        bodies={
            "gzip": gzip.compress(body, 9, mtime=0),
            "br": brotli.compress(body, quality=9),
        },
    )


def without_unused(page: bytes) -> bytes:
    """The page with a smaller configuration; unchanged where there is none to be found."""
    before, mark, after = page.partition(CONFIG_MARK)
    if not mark:
        return page
    text = after.decode("utf-8")
    try:
        config, end = json.JSONDecoder().raw_decode(text)
        for component in config["components"]:
            for name in UNUSED_BY_THE_PAGE:
                component.pop(name, None)
    except (ValueError, TypeError, KeyError):
        log.debug("The page's configuration was not found.", exc_info=True)
        return page
    return b"".join((before, mark, _for_script(config).encode(), text[end:].encode()))


def _for_script(value: Any) -> str:
    """JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


async def _respond(answer: Answer, scope: Scope, send: Send) -> None:
    """Send a stored answer, or 304 to a client that has it."""
    asked = Headers(scope=scope)
    encoding = _encoding(asked)
    headers = {
        "etag": answer.etag,
        "cache-control": answer.cache_control,
        "vary": "Accept-Encoding",
    }
    known = _is_known(answer.etag, asked.get("if-none-match", ""))
    body = b""
    if not known:
        if encoding:
            body = answer.bodies[encoding]
        else:
            body = await asyncio.to_thread(gzip.decompress, answer.bodies["gzip"])
        headers |= {"content-type": answer.kind, "content-length": str(len(body))}
        if encoding:
            headers["content-encoding"] = encoding
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 304 if known else 200, "headers": raw})
    sent = b"" if scope["method"] == "HEAD" else body
    await send({"type": "http.response.body", "body": sent, "more_body": False})


def _is_known(etag: str, if_none_match: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags
