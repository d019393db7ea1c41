"""The studio for an editor: the methods of lofi over a wire of JSON-RPC.

Every message is answered at once, whatever plays, and the process ends with its editor.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BeforeValidator

from core.errors import StudioError
from core.requests import Generate
from lofi import config
from lofi.backends import BACKENDS, SCHEDULERS
from lofi.jsonrpc import JsonRpcServer, Params, Refused
from lofi.scheduler import Scheduler

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


PATIENCE_S = 0.8
"""How long the end waits for the answers that are still owed."""


EARLY = frozenset({"ping", "shutdown"})
"""What is answered before the device and the models are found."""


SHORTEST_S = 5


MOST = 2**64 - 1
"""The largest seed."""


REFUSALS = {
    "queue-full": "QUEUE_FULL",
    "backend-missing": "BACKEND_NOT_INSTALLED",
    "track-unknown": "TRACK_NOT_FOUND",
    "track-complete": "ALREADY_COMPLETE",
}
"""The studio's own errors that an answer may have."""


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


def _text(value: str) -> str:
    """JSON can hold half a character, which no file and no model can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a character") from error
    return value


def _seed(value: int | None) -> int | None:
    if value is None or 0 <= value <= MOST:
        return value
    raise ValueError(f"runs from 0 to {MOST}")


Text = Annotated[str, AfterValidator(_text)]


Whole = Annotated[int, BeforeValidator(_whole)]


WholeOrNot = Annotated[int | None, BeforeValidator(_whole)]


NumberOrNot = Annotated[float | None, BeforeValidator(_number)]


class ToGenerate(Params):
    """Params of `generate`, by their types; ranges are judged one by one afterwards."""

    prompt: Text
    duration_sec: Whole = 30
    backend: str | None = None
    seed: Annotated[WholeOrNot, AfterValidator(_seed)] = None
    priority: Literal["normal", "high"] = "normal"
    inference_steps: WholeOrNot = None
    scheduler: str | None = None
    guidance_scale: NumberOrNot = None


class ToCancel(Params):
    track_id: str


class ToDownload(Params):
    backend: str


class Daemon:
    """The methods, and the life of the process that answers them."""

    def __init__(self, settings: config.Config) -> None:
        self._version = studio_version()
        self._ending = False
        self._found = threading.Event()
        methods = {
            "generate": (ToGenerate, self._generate),
            "cancel": (ToCancel, self._cancel),
            "get_backends": (Params, self._get_backends),
            "download_backend": (ToDownload, self._download_backend),
            "ping": (Params, self._ping),
            "shutdown": (Params, self._shutdown),
        }
        self._wire = JsonRpcServer(methods, EARLY, lambda: self._end(0))
        self._lofi = Scheduler(settings, self._wire.tell)

    def serve(self) -> NoReturn:
        """Answer until the input ends, the editor says so, or a signal comes."""
        signal.signal(signal.SIGINT, lambda *_: self._end(INTERRUPTED))
        signal.signal(signal.SIGTERM, lambda *_: self._end(128 + signal.SIGTERM))
        threading.Thread(target=self._find, daemon=True).start()
        self._wire.serve(lambda: self._ending)
        self._wire.finish(PATIENCE_S)
        if self._ending and self._found.is_set():
            self._lofi.stop()
            self._wire.finish(0)
        self._end(0)

    def _find(self) -> None:
        """What takes a moment at the start: a thread of its own."""
        try:
            self._lofi.prepare()
        except Exception:  # noqa: BLE001 - without it nothing can be played
            traceback.print_exc(file=sys.stderr)
            self._end(1)
        self._found.set()
        self._wire.open()

    def _end(self, code: int) -> NoReturn:
        """Leave, even out of native code that nobody can interrupt."""
        if self._found.is_set():
            from core import files

            shutil.rmtree(files.private_folder(), ignore_errors=True)
        sys.stderr.flush()
        os._exit(code)

    def _generate(self, asked: ToGenerate) -> dict[str, Any]:
        backend = _backend(self._lofi.config.backend if asked.backend is None else asked.backend)
        self._judge(asked, backend)
        with _Refusing():
            order = self._lofi.backends.order(
                backend,
                asked.prompt,
                asked.duration_sec,
                asked.seed,
                asked.inference_steps,
                asked.guidance_scale,
                asked.scheduler and asked.scheduler.lower(),
            )
            status, position, facts = self._lofi.accept(order, asked.priority == "high")
        if facts:
            self._wire.tell("generation_complete", self._lofi.complete(facts))
        return {
            "track_id": order.track_id,
            "status": status,
            "position": position,
            "seed": order.seed,
            "backend": backend,
        }

    def _judge(self, asked: ToGenerate, backend: str) -> None:
        """Refuse what is out of range, in the order that the contract has."""
        params = {param.name: param for param in Generate.params()}
        longest = params["prompt"].max_length
        if not asked.prompt.strip():
            raise Refused("INVALID_PROMPT", "The prompt is empty. Write what is to be heard.")
        if len(asked.prompt) > longest:
            problem = f"The prompt has {len(asked.prompt)} characters, and {longest} fit. Cut it."
            raise Refused("INVALID_PROMPT", problem)
        steps, guidance = params["inference_steps"], params["guidance_scale"]
        longest_s = self._lofi.backends.longest_s(backend)
        for name, value, low, high, error in (
            ("duration_sec", asked.duration_sec, SHORTEST_S, longest_s, "DURATION"),
            ("inference_steps", asked.inference_steps, steps.low, steps.high, "INFERENCE_STEPS"),
            ("guidance_scale", asked.guidance_scale, guidance.low, guidance.high, "GUIDANCE_SCALE"),
        ):
            if value is not None and not low <= value <= high:
                problem = f"{name} runs from {low} to {high} with {backend}, not {str(value)[:40]}."
                raise Refused(f"INVALID_{error}", problem)
        if asked.scheduler is not None and asked.scheduler.lower() not in SCHEDULERS:
            known = ", ".join(SCHEDULERS)
            raise Refused("INVALID_SCHEDULER", f"{asked.scheduler[:40]!r} is none of: {known}.")

    def _cancel(self, asked: ToCancel) -> dict[str, Any]:
        with _Refusing():
            return {"cancelled": True, "was_generating": self._lofi.cancel(asked.track_id)}

    def _get_backends(self, _: Params) -> dict[str, Any]:
        told = self._lofi.backends.told(self._lofi.loading())
        return {"backends": told, "default_backend": self._lofi.config.backend}

    def _download_backend(self, asked: ToDownload) -> dict[str, Any]:
        return self._lofi.backends.download(_backend(asked.backend))

    def _ping(self, _: Params) -> dict[str, Any]:
        return {"status": "ok", "version": self._version}

    def _shutdown(self, _: Params) -> dict[str, Any]:
        self._ending = True
        return {"status": "shutting_down"}


class _Refusing:
    """Within it, the studio's own errors are refusals in the words of the wire."""

    def __enter__(self) -> None:
        return

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, StudioError) and error.code in REFUSALS:
            raise Refused(REFUSALS[error.code], str(error)) from error


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise Refused("INVALID_BACKEND", f"{name[:40]!r} is none of: {', '.join(BACKENDS)}.")
    return name


def studio_version() -> str:
    """Of this studio, as `ping` tells it."""
    try:
        return version("ace-music-studio")
    except PackageNotFoundError:
        return "source"


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
