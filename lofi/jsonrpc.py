"""JSON-RPC 2.0 on standard input and output, one message per line.

Only this module writes to the real standard output: whatever libraries print goes to standard
error. Writing never blocks the caller, and a notification never precedes the response it belongs
to.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 4 << 20
"""The longest accepted message. Real ones have a few thousand bytes."""


FLUSH_S = 0.5
"""How long `flush` waits for a slow reader."""


ERRORS = {
    "PARSE_ERROR": (-32700, "Parse error"),
    "INVALID_REQUEST": (-32600, "Invalid request"),
    "METHOD_NOT_FOUND": (-32601, "Method not found"),
    "INVALID_PARAMS": (-32602, "Invalid params"),
    "INTERNAL_ERROR": (-32603, "Internal error"),
    "TRACK_NOT_FOUND": (-32000, "Track not found"),
    "ALREADY_COMPLETE": (-32001, "Track is already complete"),
    "QUEUE_FULL": (-32004, "Queue is full"),
    "INVALID_DURATION": (-32005, "Invalid duration"),
    "INVALID_PROMPT": (-32006, "Invalid prompt"),
    "INVALID_BACKEND": (-32007, "Invalid backend"),
    "BACKEND_NOT_INSTALLED": (-32008, "Backend is not installed"),
    "INVALID_INFERENCE_STEPS": (-32009, "Invalid inference steps"),
    "INVALID_GUIDANCE_SCALE": (-32010, "Invalid guidance scale"),
    "INVALID_SCHEDULER": (-32011, "Invalid scheduler"),
}
"""Error constants with their JSON-RPC code and message."""


Notify = Callable[[str, dict[str, Any]], None]
"""Sends a notification, given its method and params. May be called from any thread."""


class RpcError(Exception):
    """An error response.

    Args:
        name: a key of `ERRORS`.
        details: what is wrong, with the limits, and what to do.
    """

    def __init__(self, name: str, details: str) -> None:
        super().__init__(details)
        self.name, self.details = name, details


class Params(BaseModel):
    """Named parameters of a method. The base class itself allows none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Handler = Callable[[Any], dict[str, Any]]
"""Takes the validated params of a method and returns its result, or raises `RpcError`."""


class StdioTransport:
    """Lines on standard input and output, which nothing else in this process can use afterwards.

    Args:
        on_disconnect: called when the reader of our output is gone.
    """

    def __init__(self, on_disconnect: Callable[[], None]) -> None:
        self._in, self._out = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdout.flush()
        os.dup2(
            2, 1
        )  # print(), C's printf and child processes write to standard error from here on
        self._on_disconnect = on_disconnect
        self._outbox: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    def send(self, message: Any) -> None:
        """Queue `message` for writing and return at once."""
        text = json.dumps(message, allow_nan=False, separators=(",", ":"))
        self._outbox.put(text.encode() + b"\n")

    def flush(self) -> None:
        """Wait until everything queued is written, at most `FLUSH_S`."""
        written = threading.Event()
        self._outbox.put(written)
        written.wait(FLUSH_S)

    def lines(self) -> Iterator[bytes | None]:
        """Non-blank lines until the end of the input; None in place of one that is too long."""
        rest, skipping = bytearray(), False
        # A buffered reader that is waiting aborts the interpreter at exit; os.read does not.
        while chunk := os.read(self._in, 1 << 16):
            rest += chunk
            if b"\n" in chunk:
                *complete, last = rest.split(b"\n")
                rest = bytearray(last)
                for line in complete[skipping:]:
                    if line.strip():
                        yield bytes(line)
                skipping = False
            if len(rest) > MAX_LINE_BYTES:
                if not skipping:
                    yield None
                rest, skipping = bytearray(), True
        if rest.strip() and not skipping:
            yield bytes(rest)

    def _write(self) -> None:
        while True:
            item = self._outbox.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            rest = memoryview(item)
            try:
                while rest:
                    rest = rest[os.write(self._out, rest) :]
            except OSError:
                self._on_disconnect()
                return


class JsonRpcServer:
    """Dispatches requests to handlers and sends responses and notifications.

    Handlers may be added in two steps: a message for a method that has none yet is held until
    `add_handlers` brings it.

    Args:
        methods: the params of every method, by its name.
        handlers: the methods that can be answered from the start.
        on_disconnect: called when the reader of our output is gone.
    """

    def __init__(
        self,
        methods: dict[str, type[Params]],
        handlers: dict[str, Handler],
        on_disconnect: Callable[[], None],
    ) -> None:
        self._transport = StdioTransport(on_disconnect)
        self._methods, self._handlers = methods, dict(handlers)
        self._complete = threading.Event()
        self._lock = threading.RLock()
        self._replying = False
        self._notifications: list[dict[str, Any]] = []
        self._held: list[Any] = []

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Answer messages until the input ends or `stopped` returns True."""
        for line in self._transport.lines():
            self._receive(line)
            if stopped():
                return

    def add_handlers(self, handlers: dict[str, Handler]) -> None:
        """Add the handlers that were missing, and answer the messages held for them."""
        with self._lock:
            self._handlers |= handlers
            for message in self._held:
                self._reply(message)
            self._held.clear()
            self._complete.set()

    def notify(self, method: str, params: dict[str, Any]) -> None:
        """Send a notification, after the response that is being made if there is one."""
        message = {"jsonrpc": "2.0", "method": method, "params": params}
        with self._lock:
            if self._replying:
                self._notifications.append(message)
            else:
                self._transport.send(message)

    def finish(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for held messages to be answered, and briefly for the writing."""
        if self._held:
            self._complete.wait(timeout_s)
        with self._lock:
            self._transport.flush()

    def _receive(self, line: bytes | None) -> None:
        try:
            message = _parse(line)
        except RpcError as error:
            self._transport.send(_error_response(None, error))
            return
        members = message if isinstance(message, list) else [message]
        with self._lock:
            if any(self._must_wait(member) for member in members):
                self._held.append(message)
            else:
                self._reply(message)

    def _must_wait(self, message: Any) -> bool:
        method = message.get("method") if isinstance(message, dict) else None
        known = isinstance(method, str) and method in self._methods
        return known and method not in self._handlers

    def _reply(self, message: Any) -> None:
        """Answer one message or one batch, then send the notifications this caused."""
        self._replying = True
        try:
            if isinstance(message, list) and message:
                response = [r for member in message if (r := self._response(member))]
            else:
                response = self._response(message)
            if response:
                self._transport.send(response)
        finally:
            self._replying = False
        for notification in self._notifications:
            self._transport.send(notification)
        self._notifications.clear()

    def _response(self, message: Any) -> dict[str, Any] | None:
        """The response to one message; None if it is a notification."""
        fields = message if isinstance(message, dict) else {}
        request_id = fields.get("id") if type(fields.get("id")) in (str, int, float) else None
        is_notification = "id" not in fields
        try:
            method, params = _method_and_params(message)
            if method not in self._methods:
                known = ", ".join(self._methods)
                raise RpcError("METHOD_NOT_FOUND", f"No method {method[:80]!r}. Known: {known}.")
            result = self._handlers[method](_validate(self._methods[method], params))
        except RpcError as error:
            if is_notification and error.name != "INVALID_REQUEST":
                return None
            return _error_response(request_id, error)
        except Exception:  # the text of an unforeseen exception does not belong on the wire
            log.exception("A request failed unexpectedly.")
            error = RpcError("INTERNAL_ERROR", "Try again; the log on stderr has the cause.")
            return None if is_notification else _error_response(request_id, error)
        if is_notification:
            return None
        return {"jsonrpc": "2.0", "id": request_id, "result": result}


def _parse(line: bytes | None) -> Any:
    if line is None:
        problem = f"The line is longer than {MAX_LINE_BYTES} bytes. Send shorter messages."
        raise RpcError("PARSE_ERROR", problem)
    try:
        return json.loads(line.decode(), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        problem = "The line is not JSON in UTF-8. Send one message per line."
        raise RpcError("PARSE_ERROR", problem) from error


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    """A float that can be written as JSON again, which 1e999 cannot."""
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text)


def _method_and_params(message: Any) -> tuple[str, Any]:
    """Method and params of a well-formed request.

    Raises:
        RpcError: INVALID_REQUEST.
    """
    problem = ""
    if not isinstance(message, dict):
        problem = "a message must be an object"
    elif message.get("jsonrpc") != "2.0":
        problem = 'jsonrpc must be "2.0"'
    elif not isinstance(message.get("method"), str):
        problem = "method must be a string"
    elif "id" in message and type(message["id"]) not in (str, int, float, type(None)):
        problem = "id must be a string or a number"
    elif not isinstance(message.get("params", {}), dict | list):
        problem = "params must be an object"
    if problem:
        raise RpcError("INVALID_REQUEST", f"In JSON-RPC 2.0 {problem}.")
    return message["method"], message.get("params", {})


def _validate(model: type[Params], params: Any) -> Params:
    """Check `params` against the types of `model`. An empty list, as Lua writes {}, means none."""
    if isinstance(params, list) and params:
        raise RpcError("INVALID_PARAMS", "Positional params are not supported: send an object.")
    try:
        return model.model_validate(params or {})
    except ValidationError as error:
        problems = "; ".join(
            f"{str([*each['loc'], 'a name'][0])[:40]}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()[:8]
        )
        known = ", ".join(model.model_fields) or "none"
        raise RpcError("INVALID_PARAMS", f"{problems}. Accepted params: {known}.") from error


def _error_response(request_id: Any, error: RpcError) -> dict[str, Any]:
    code, message = ERRORS[error.name]
    data = {"error_code": error.name, "details": error.details}
    return {
        "jsonrpc": "2.0",
        "id": request_id,
        "error": {"code": code, "message": message, "data": data},
    }
