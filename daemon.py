"""The studio for an editor: JSON-RPC 2.0, one message a line, on standard input and output.

Nothing a library prints reaches the wire, every message is answered at once, whatever plays, and
the process ends with its editor.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

import config
from backends import BACKENDS, SCHEDULERS
from errors import StudioError
from lofi import Lofi
from song import Generate

LONGEST_LINE = 4 << 20
"""Bytes of one message. The longest that makes sense has a few thousand."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

PATIENCE_S = 0.8
"""How long the end waits for what is still to be answered or written."""

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
"""Constants of the wire, with the number and the message of each."""

KINDS = {
    "queue-full": "QUEUE_FULL",
    "backend-missing": "BACKEND_NOT_INSTALLED",
    "track-unknown": "TRACK_NOT_FOUND",
    "track-complete": "ALREADY_COMPLETE",
}
"""The studio's own errors that an answer may have."""


class Refused(Exception):
    """A message that gets an error for an answer. `details` say what to do instead."""

    def __init__(self, name: str, details: str) -> None:
        super().__init__(details)
        self.name, self.details = name, details


def _whole(value: Any) -> Any:
    """Lua knows one kind of number: 30.0 is a whole one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) in (int, type(None)):
        return value
    raise ValueError("is a whole number")


def _number(value: Any) -> Any:
    if type(value) in (int, float, type(None)):
        return value
    raise ValueError("is a number")


Whole = Annotated[int, BeforeValidator(_whole)]
WholeOrNot = Annotated[int | None, BeforeValidator(_whole)]
NumberOrNot = Annotated[float | None, BeforeValidator(_number)]


class Nothing(BaseModel):
    """Params of methods that take none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ToGenerate(Nothing):
    """Params of `generate`, their types; ranges are judged one by one afterwards."""

    prompt: str
    duration_sec: Whole = 30
    backend: str | None = None
    seed: Annotated[WholeOrNot, Field(ge=0, le=2**64 - 1)] = None
    priority: Literal["normal", "high"] = "normal"
    inference_steps: WholeOrNot = None
    scheduler: str | None = None
    guidance_scale: NumberOrNot = None


class ToCancel(Nothing):
    track_id: str


class ToDownload(Nothing):
    backend: str


class Wire:
    """A private copy of standard input and output; what stays in their place says nothing here.

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
        """Put `message` in line to be written: no reader, however slow, holds anybody up."""
        text = json.dumps(message, allow_nan=False, separators=(",", ":"))
        self._outbox.put(text.encode() + b"\n")

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        written = threading.Event()
        self._outbox.put(written)
        written.wait(PATIENCE_S)

    def lines(self) -> Iterator[bytes | None]:
        """Lines that are not empty, until the end; None for one that is too long."""
        rest, skipping = b"", False
        # On os.read the interpreter can end at any time; a buffered reader aborts it.
        while chunk := os.read(self._in, 1 << 16):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                if not skipping and line.strip():
                    yield line.strip()
                skipping = False
            if len(rest) > LONGEST_LINE:
                if not skipping:
                    yield None
                rest, skipping = b"", True
        if rest.strip() and not skipping:
            yield rest.strip()

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


class Daemon:
    """Messages in, answers and notifications out."""

    def __init__(self, settings: config.Config) -> None:
        self._wire = Wire(lambda: self.end(0))
        self._lofi = Lofi(settings, self._tell)
        self._order = threading.RLock()
        self._answering = False
        self._ending = False
        self._after: list[dict[str, Any]] = []
        self._early: list[Any] = []
        self._ready = threading.Event()
        self._methods: dict[str, tuple[type[Nothing], Callable[[Any], dict[str, Any]]]] = {
            "generate": (ToGenerate, self._generate),
            "cancel": (ToCancel, self._cancel),
            "get_backends": (Nothing, self._get_backends),
            "download_backend": (ToDownload, self._download_backend),
            "ping": (Nothing, lambda _: {"status": "ok", "version": studio_version()}),
            "shutdown": (Nothing, self._shutdown),
        }

    def serve(self) -> NoReturn:
        """Answer until the input ends, the editor says so, or a signal comes."""
        signal.signal(signal.SIGINT, lambda *_: self.end(INTERRUPTED))
        signal.signal(signal.SIGTERM, lambda *_: self.end(128 + signal.SIGTERM))
        threading.Thread(target=self._prepare, daemon=True).start()
        for line in self._wire.lines():
            self._take(line)
            if self._ending:
                break
        if self._early:
            self._ready.wait(PATIENCE_S)
        if self._ending:
            self._lofi.stop()
        self._wire.flush()
        self.end(0)

    def end(self, code: int) -> NoReturn:
        """Leave, even out of native code that nobody can interrupt."""
        if self._ready.is_set():
            import host

            shutil.rmtree(host.private_folder(), ignore_errors=True)
        sys.stderr.flush()
        os._exit(code)

    def _prepare(self) -> None:
        """What takes a moment at the start, and the messages that had to wait for it."""
        try:
            self._lofi.prepare()
        except Exception:  # noqa: BLE001 - without it nothing can be played
            traceback.print_exc(file=sys.stderr)
            self.end(1)
        with self._order:
            self._ready.set()
            for message in self._early:
                self._reply(message)
            self._early.clear()

    def _take(self, line: bytes | None) -> None:
        try:
            message = _parsed(line)
        except Refused as refused:
            self._wire.send(_error(None, refused))
            return
        with self._order:
            if not self._ready.is_set() and _needs_models(message):
                self._early.append(message)
            else:
                self._reply(message)

    def _reply(self, message: Any) -> None:
        """Answer one message or one batch, then say what has come of it."""
        self._answering = True
        try:
            if isinstance(message, list) and message:
                answers = [answer for each in message if (answer := self._answer(each))]
            else:
                answers = self._answer(message)
            if answers:
                self._wire.send(answers)
        finally:
            self._answering = False
        for notification in self._after:
            self._wire.send(notification)
        self._after.clear()

    def _tell(self, method: str, facts: dict[str, Any]) -> None:
        """Send a notification, behind the answer that is being made if one is."""
        message = {"jsonrpc": "2.0", "method": method, "params": facts}
        with self._order:
            if self._answering:
                self._after.append(message)
            else:
                self._wire.send(message)

    def _answer(self, message: Any) -> dict[str, Any] | None:
        """The answer to one message; None to a notification."""
        asked = message if isinstance(message, dict) else {}
        known = type(asked.get("id")) in (str, int, float)
        name = asked.get("id") if known else None
        silent = "id" not in asked
        try:
            method, params = _shape(message)
            if method not in self._methods:
                raise Refused(
                    "METHOD_NOT_FOUND",
                    f"{method[:80]!r} is none of: {', '.join(self._methods)}.",
                )
            model, do = self._methods[method]
            result = _told(do, _checked(model, params))
        except Refused as error:
            refused, silent = error, silent and error.name != "INVALID_REQUEST"
        except Exception:  # noqa: BLE001 - whatever it is, its text is nothing for the wire
            traceback.print_exc(file=sys.stderr)
            refused = Refused("INTERNAL_ERROR", "Try again; the log on standard error says more.")
        else:
            return None if silent else {"jsonrpc": "2.0", "id": name, "result": result}
        return None if silent else _error(name, refused)

    def _generate(self, asked: ToGenerate) -> dict[str, Any]:
        backend = self._lofi.config.backend if asked.backend is None else asked.backend
        _backend(backend)
        if not asked.prompt.strip():
            raise Refused(
                "INVALID_PROMPT", "The prompt is empty. Write a few words about the music."
            )
        knobs = {knob.name: knob for knob in Generate.knobs()}
        if len(asked.prompt) > knobs["prompt"].max_length:
            raise Refused(
                "INVALID_PROMPT",
                f"The prompt has {len(asked.prompt)} characters and {knobs['prompt'].max_length} "
                "fit. Shorten it.",
            )
        steps, guidance = knobs["inference_steps"], knobs["guidance_scale"]
        for name, value, low, high, error in (
            (
                "duration_sec",
                asked.duration_sec,
                5,
                self._lofi.backends.longest_s(backend),
                "DURATION",
            ),
            ("inference_steps", asked.inference_steps, steps.low, steps.high, "INFERENCE_STEPS"),
            ("guidance_scale", asked.guidance_scale, guidance.low, guidance.high, "GUIDANCE_SCALE"),
        ):
            if value is not None and not low <= value <= high:
                raise Refused(
                    f"INVALID_{error}",
                    f"With {backend}, {name} runs from {low} to {high}, not {str(value)[:40]}.",
                )
        scheduler = asked.scheduler and asked.scheduler.lower()
        if scheduler is not None and scheduler not in SCHEDULERS:
            raise Refused(
                "INVALID_SCHEDULER",
                f"{asked.scheduler[:40]!r} is none of: {', '.join(SCHEDULERS)}.",
            )
        order = self._lofi.backends.order(
            backend,
            asked.prompt,
            asked.duration_sec,
            asked.seed,
            asked.inference_steps,
            asked.guidance_scale,
            scheduler,
        )
        status, position, facts = self._lofi.accept(order, asked.priority == "high")
        if facts:
            self._tell("generation_complete", self._lofi.complete(facts))
        return {
            "track_id": order.track_id,
            "status": status,
            "position": position,
            "seed": order.seed,
            "backend": backend,
        }

    def _cancel(self, asked: ToCancel) -> dict[str, Any]:
        return {"cancelled": True, "was_generating": self._lofi.cancel(asked.track_id)}

    def _get_backends(self, _: Nothing) -> dict[str, Any]:
        return {
            "backends": self._lofi.backends.told(self._lofi.loading()),
            "default_backend": self._lofi.config.backend,
        }

    def _download_backend(self, asked: ToDownload) -> dict[str, Any]:
        return self._lofi.backends.download(_backend(asked.backend))

    def _shutdown(self, _: Nothing) -> dict[str, Any]:
        self._ending = True
        return {"status": "shutting_down"}


def main(**given: str | None) -> NoReturn:
    """Serve on standard input and output until they end.

    Args:
        given: settings from the command line, over all others; None for what was left open.
    """
    if sys.stdin.isatty():
        print("Waiting for JSON-RPC, one message a line. Ctrl-C ends it.", file=sys.stderr)
    settings = config.read()
    given = {name: value for name, value in given.items() if value is not None}
    Daemon(settings.model_copy(update=given)).serve()


def studio_version() -> str:
    """Of this studio, as `ping` tells it."""
    try:
        return version("ace-music-studio")
    except PackageNotFoundError:
        return "source"


def _parsed(line: bytes | None) -> Any:
    if line is None:
        raise Refused("PARSE_ERROR", f"A line may have {LONGEST_LINE} bytes. Send less at once.")
    try:
        return json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(
            "PARSE_ERROR", "The line is not JSON in UTF-8. Send one message a line."
        ) from error


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _needs_models(message: Any) -> bool:
    """Whether a message, or one of a batch, is about what is looked for at the start."""
    each = message if isinstance(message, list) else [message]
    return any(
        isinstance(m, dict)
        and m.get("method") in ("generate", "get_backends", "download_backend", "cancel")
        for m in each
    )


def _shape(message: Any) -> tuple[str, dict[str, Any]]:
    """Method and params of a request in the shape that JSON-RPC gives it."""
    problem = None
    if not isinstance(message, dict):
        problem = "A message is an object"
    elif message.get("jsonrpc") != "2.0":
        problem = 'jsonrpc is "2.0"'
    elif not isinstance(message.get("method"), str):
        problem = "method is a text"
    elif "id" in message and type(message["id"]) not in (str, int, float, type(None)):
        problem = "id is a text or a number"
    elif not isinstance(message.get("params", {}), dict | list):
        problem = "params is an object"
    if problem:
        raise Refused("INVALID_REQUEST", f"{problem}, as JSON-RPC 2.0 says.")
    return message["method"], message.get("params", {})


def _checked(model: type[Nothing], params: Any) -> Nothing:
    if isinstance(params, list) and params:
        raise Refused("INVALID_PARAMS", "Params go by name: send an object.")
    try:
        return model.model_validate(params or {})
    except ValidationError as error:
        known = ", ".join(model.model_fields) or "none"
        complaints = "; ".join(
            f"{str(each['loc'][0])[:40]}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()[:8]
        )
        raise Refused("INVALID_PARAMS", f"{complaints}. Params here: {known}.") from error


def _told(do: Callable[[Any], dict[str, Any]], asked: Nothing) -> dict[str, Any]:
    """What `do` answers, the studio's own errors in the words of the wire."""
    try:
        return do(asked)
    except StudioError as error:
        if error.code not in KINDS:
            raise
        raise Refused(KINDS[error.code], str(error)) from error


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise Refused("INVALID_BACKEND", f"{name[:40]!r} is none of: {', '.join(BACKENDS)}.")
    return name


def _error(name: Any, refused: Refused) -> dict[str, Any]:
    code, message = ERRORS[refused.name]
    data = {"error_code": refused.name, "details": refused.details}
    return {"jsonrpc": "2.0", "id": name, "error": {"code": code, "message": message, "data": data}}


if __name__ == "__main__":
    main()
