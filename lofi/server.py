"""The daemon process: the JSON-RPC methods for an editor, from start to exit.

Requests are answered at once even while a track is made, and the process ends when its input does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from core.errors import StudioError
from core.startup import INTERRUPTED, USAGE
from lofi import config
from lofi.backends import Backends
from lofi.jsonrpc import Handler, JsonRpcServer, Notify, Params, RpcError
from lofi.scheduler import Scheduler
from lofi.track_cache import TrackCache
from lofi.track_request import GenerateParams, backend_name, resolve
from runtime.takes import studio_version

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 0.8
"""How long the exit waits for outstanding responses."""


RPC_ERRORS = {
    "queue-full": "QUEUE_FULL",
    "backend-missing": "BACKEND_NOT_INSTALLED",
    "track-unknown": "TRACK_NOT_FOUND",
    "track-complete": "ALREADY_COMPLETE",
}
"""Studio errors that a response may carry, with their names on the wire."""


class CancelParams(Params):
    """Params of `cancel`."""

    track_id: str


class DownloadParams(Params):
    """Params of `download_backend`."""

    backend: str


METHODS: dict[str, type[Params]] = {
    "generate": GenerateParams,
    "cancel": CancelParams,
    "get_backends": Params,
    "download_backend": DownloadParams,
    "ping": Params,
    "shutdown": Params,
}


class TrackService:
    """The methods about tracks and models. Making one finds the device and the models, which takes
    a moment where a GPU has to be asked."""

    def __init__(self, settings: config.Config, notify: Notify) -> None:
        self._settings, self._notify = settings, notify
        self._backends = Backends(settings, notify)
        limits = (settings.cache_max_mb * 10**6, settings.cache_max_tracks)
        cache = TrackCache(settings.tracks_folder, *limits)
        self._scheduler = Scheduler(self._backends, cache, notify)

    def handlers(self) -> dict[str, Handler]:
        """The methods by their names."""
        return {
            "generate": self._generate,
            "cancel": self._cancel,
            "get_backends": self._get_backends,
            "download_backend": self._download_backend,
        }

    def stop(self) -> None:
        """Cancel all jobs."""
        self._scheduler.stop()

    def _generate(self, params: GenerateParams) -> dict[str, Any]:
        with _as_rpc_error():
            track = resolve(params, self._backends, self._settings)
            submitted = self._scheduler.submit(track, params.priority == "high")
        if submitted.cached:
            self._notify("generation_complete", self._scheduler.completed(submitted.cached))
        return {
            "track_id": track.track_id,
            "status": submitted.status,
            "position": submitted.position,
            "seed": track.seed,
            "backend": track.backend,
        }

    def _cancel(self, params: CancelParams) -> dict[str, Any]:
        with _as_rpc_error():
            return {"cancelled": True, "was_generating": self._scheduler.cancel(params.track_id)}

    def _get_backends(self, _: Params) -> dict[str, Any]:
        backends = self._backends.describe(self._scheduler.loading())
        return {"backends": backends, "default_backend": self._settings.backend}

    def _download_backend(self, params: DownloadParams) -> dict[str, Any]:
        return self._backends.download(backend_name(params.backend))


class Daemon:
    """The process: `ping` works at once, everything else when the models have been found."""

    def __init__(self, settings: config.Config) -> None:
        self._settings = settings
        self._version = studio_version()
        self._shutting_down = threading.Event()
        self._ready: list[TrackService] = []
        handlers: dict[str, Handler] = {"ping": self._ping, "shutdown": self._shutdown}
        self._rpc = JsonRpcServer(METHODS, handlers, on_disconnect=lambda: self._exit(0))

    def serve(self) -> NoReturn:
        """Answer until the input ends, `shutdown` is called or a signal arrives; then exit."""
        signal.signal(signal.SIGINT, lambda *_: self._exit(INTERRUPTED))
        signal.signal(signal.SIGTERM, lambda *_: self._exit(128 + signal.SIGTERM))
        threading.Thread(target=self._start, daemon=True).start()
        self._rpc.serve(self._shutting_down.is_set)
        self._rpc.finish(FINISH_TIMEOUT_S)
        if self._shutting_down.is_set():
            for service in self._ready:
                service.stop()
                self._rpc.finish(0)
        self._exit(0)

    def _start(self) -> None:
        """Body of the thread that finds the models."""
        try:
            service = TrackService(self._settings, self._rpc.notify)
        except StudioError as error:
            log.error("%s", error)
            self._exit(USAGE)
        except Exception:
            log.exception("The daemon cannot start.")
            self._exit(1)
        self._ready.append(service)
        self._rpc.add_handlers(service.handlers())

    def _exit(self, code: int) -> NoReturn:
        """End the process at once, even while a thread is inside native code."""
        if self._ready:
            from core import files

            shutil.rmtree(files.private_folder(), ignore_errors=True)
        sys.stderr.flush()
        os._exit(code)

    def _ping(self, _: Params) -> dict[str, Any]:
        return {"status": "ok", "version": self._version}

    def _shutdown(self, _: Params) -> dict[str, Any]:
        self._shutting_down.set()
        return {"status": "shutting_down"}


@contextlib.contextmanager
def _as_rpc_error() -> Iterator[None]:
    """Turn the studio errors in `RPC_ERRORS` into error responses."""
    try:
        yield
    except StudioError as error:
        if error.code not in RPC_ERRORS:
            raise
        raise RpcError(RPC_ERRORS[error.code], str(error)) from error


def main(**overrides: str | None) -> NoReturn:
    """Serve on standard input and output until they end.

    Args:
        overrides: settings from the command line; None where a flag was not given.
    """
    logging.basicConfig(format="lofi: %(message)s")
    if sys.stdin.isatty():
        print("Waiting for JSON-RPC, one message per line. Ctrl-C ends it.", file=sys.stderr)
    given = {name: value for name, value in overrides.items() if value is not None}
    Daemon(config.read().model_copy(update=given)).serve()
