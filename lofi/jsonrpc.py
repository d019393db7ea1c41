"""JSON-RPC 2.0, one message a line, on private copies of standard input and output.

What a library prints lands on standard error. Writing never holds anybody up, and no notification
overtakes the answer that it follows from.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

LONGEST_LINE = 4 << 20
"""Bytes of one message. The longest that makes sense has a few thousand."""


FLUSH_S = 0.5
"""How long a reader is waited for at the end."""


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
"""The constants of an answer, with the number and the message of each."""


class Refused(Exception):
    """A message that gets an error for an answer.

    Args:
        name: a key of `ERRORS`.
        details: what is wrong, with its limits, and a way out.
    """

    def __init__(self, name: str, details: str) -> None:
        super().__init__(details)
        self.name, self.details = name, details


class Params(BaseModel):
    """Params of a method, by name; none unless a subclass has fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Method = tuple[type[Params], Callable[[Any], dict[str, Any]]]
"""What a method is asked with, and what answers."""


class Pipes:
    """Standard input and output, taken away from everybody else in this process.

    Args:
        gone: called when nobody reads any more.
    """

    def __init__(self, gone: Callable[[], None]) -> None:
        self._in, self._out = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdout.flush()
        os.dup2(2, 1)  # print(), C's printf, children: all to standard error from here on
        self._gone = gone
        self._outbox: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    def send(self, message: Any) -> None:
        """Put `message` in line to be written, and go on."""
        text = json.dumps(message, allow_nan=False, separators=(",", ":"))
        self._outbox.put(text.encode() + b"\n")

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        written = threading.Event()
        self._outbox.put(written)
        written.wait(FLUSH_S)

    def lines(self) -> Iterator[bytes | None]:
        """Lines that are not empty, until the end; None for one that is too long."""
        rest, skipping = bytearray(), False
        # os.read leaves the interpreter free to end; it aborts on a buffered reader that waits.
        while chunk := os.read(self._in, 1 << 16):
            rest += chunk
            if b"\n" in chunk:
                *whole, last = rest.split(b"\n")
                rest = bytearray(last)
                for line in whole[skipping:]:
                    if line.strip():
                        yield bytes(line)
                skipping = False
            if len(rest) > LONGEST_LINE:
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
                self._gone()
                return


class JsonRpcServer:
    """Requests to answers, by a table of methods.

    Args:
        methods: by name. What they raise beside `Refused` is not told, but printed.
        early: the methods that are answered before `open`; messages to others wait for it.
        gone: called when nobody reads any more.
    """

    def __init__(
        self, methods: dict[str, Method], early: frozenset[str], gone: Callable[[], None]
    ) -> None:
        self._pipes = Pipes(gone)
        self._methods, self._early = methods, early
        self._opened = threading.Event()
        self._order = threading.RLock()
        self._answering = False
        self._notes: list[dict[str, Any]] = []
        self._held: list[Any] = []

    def serve(self, ended: Callable[[], bool]) -> None:
        """Answer until the input does or `ended` says so; then all but the last is written."""
        for line in self._pipes.lines():
            self._take(line)
            if ended():
                return

    def open(self) -> None:
        """Answer all that had to wait, and from now on everything at once."""
        with self._order:
            self._opened.set()
            for message in self._held:
                self._reply(message)
            self._held.clear()

    def tell(self, method: str, facts: dict[str, Any]) -> None:
        """Send a notification; behind the answer that is being made, if one is. Any thread."""
        note = {"jsonrpc": "2.0", "method": method, "params": facts}
        with self._order:
            if self._answering:
                self._notes.append(note)
            else:
                self._pipes.send(note)

    def finish(self, patience_s: float) -> None:
        """Give held messages so long to be answered, and what was said a moment to be written."""
        if self._held:
            self._opened.wait(patience_s)
        with self._order:
            self._pipes.flush()

    def _take(self, line: bytes | None) -> None:
        try:
            message = _parsed(line)
        except Refused as refused:
            self._pipes.send(_error(None, refused))
            return
        with self._order:
            if self._opened.is_set() or all(map(self._is_early, _each(message))):
                self._reply(message)
            else:
                self._held.append(message)

    def _is_early(self, message: Any) -> bool:
        method = message.get("method") if isinstance(message, dict) else None
        known = isinstance(method, str) and method in self._methods
        return not known or method in self._early

    def _reply(self, message: Any) -> None:
        """Answer one message or one batch, then say what has come of it."""
        self._answering = True
        try:
            if isinstance(message, list) and message:
                answers = [answer for each in message if (answer := self._answer(each))]
            else:
                answers = self._answer(message)
            if answers:
                self._pipes.send(answers)
        finally:
            self._answering = False
        for note in self._notes:
            self._pipes.send(note)
        self._notes.clear()

    def _answer(self, message: Any) -> dict[str, Any] | None:
        """The answer to one message; None to a notification."""
        asked = message if isinstance(message, dict) else {}
        name = asked.get("id") if type(asked.get("id")) in (str, int, float) else None
        silent = "id" not in asked
        try:
            method, params = _shape(message)
            if method not in self._methods:
                known = ", ".join(self._methods)
                raise Refused("METHOD_NOT_FOUND", f"{method[:80]!r} is none of: {known}.")
            model, answer = self._methods[method]
            result = answer(_checked(model, params))
        except Refused as error:
            refused, silent = error, silent and error.name != "INVALID_REQUEST"
        except Exception:  # noqa: BLE001 - whatever it is, its text is nothing for the wire
            traceback.print_exc(file=sys.stderr)
            refused = Refused("INTERNAL_ERROR", "Try again; standard error says more.")
        else:
            return None if silent else {"jsonrpc": "2.0", "id": name, "result": result}
        return None if silent else _error(name, refused)


def _each(message: Any) -> list[Any]:
    return message if isinstance(message, list) else [message]


def _parsed(line: bytes | None) -> Any:
    if line is None:
        raise Refused("PARSE_ERROR", f"A line may have {LONGEST_LINE} bytes. Send less at once.")
    try:
        return json.loads(line.decode(), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        problem = "The line is not JSON in UTF-8. Send one message a line."
        raise Refused("PARSE_ERROR", problem) from error


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    """A number that can be said again: 1e999 cannot."""
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _shape(message: Any) -> tuple[str, Any]:
    """Method and params of a request, once it has the shape that JSON-RPC gives it."""
    problem = ""
    if not isinstance(message, dict):
        problem = "a message is an object"
    elif message.get("jsonrpc") != "2.0":
        problem = 'jsonrpc is "2.0"'
    elif not isinstance(message.get("method"), str):
        problem = "method is a text"
    elif "id" in message and type(message["id"]) not in (str, int, float, type(None)):
        problem = "id is a text or a number"
    elif not isinstance(message.get("params", {}), dict | list):
        problem = "params is an object"
    if problem:
        raise Refused("INVALID_REQUEST", f"In JSON-RPC 2.0 {problem}.")
    return message["method"], message.get("params", {})


def _checked(model: type[Params], params: Any) -> Params:
    """`params` by the types of `model`; an empty list is none, as Lua writes it."""
    if isinstance(params, list) and params:
        raise Refused("INVALID_PARAMS", "Params go by name: send an object.")
    try:
        return model.model_validate(params or {})
    except ValidationError as error:
        complaints = "; ".join(
            f"{str([*each['loc'], 'a name'][0])[:40]}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()[:8]
        )
        known = ", ".join(model.model_fields) or "none"
        raise Refused("INVALID_PARAMS", f"{complaints}. Params here: {known}.") from error


def _error(name: Any, refused: Refused) -> dict[str, Any]:
    code, message = ERRORS[refused.name]
    data = {"error_code": refused.name, "details": refused.details}
    return {"jsonrpc": "2.0", "id": name, "error": {"code": code, "message": message, "data": data}}
