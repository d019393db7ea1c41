"""The daemon's two models: where their files are, their status, and their download."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.errors import StudioError
from core.requests import SAMPLE_RATE, Generate, Musicgen
from lofi.config import Config
from lofi.jsonrpc import Notify
from models import checkpoints, hub
from models.weights import VENDOR, Weights

log = logging.getLogger(__name__)

LONGEST_S = 240
"""The longest track that the protocol allows, in seconds."""

BACKENDS: dict[str, type[Generate] | type[Musicgen]] = {"musicgen": Musicgen, "ace_step": Generate}
"""The request each backend runs, in the order of `get_backends`."""


MIN_DURATION_S = 5


PROGRESS_INTERVAL_S = 0.25
"""Shortest time between two `download_progress` about the same file."""


OUTPUT_VERSION = 1
"""Raise it whenever our own code changes the samples of an unchanged request."""

TIMBRE_TOKEN_VERSION = 2
"""That of checkpoints with a timbre token, which version 1 left out."""


class Backends:
    """Both backends on one device, behind one studio.

    Args:
        notify: gets download notifications, from the download's thread.

    Attributes:
        model: the ACE-Step checkpoint.
        device_error: why the configured device cannot be used; None if it can.
    """

    def __init__(self, config: Config, notify: Notify) -> None:
        import backend
        from models import catalog, musicgen
        from runtime.device import find_device

        self._config, self._notify = config, notify
        self._errors: dict[str, tuple[str, Path | None]] = {}
        self._downloading: set[str] = set()
        self._lock = threading.Lock()
        self.device_error: StudioError | None = None
        requested = None if config.device == "auto" else config.device
        try:
            device = find_device(requested)
        except StudioError as error:
            if error.code != "device-missing":
                raise
            self.device_error = error
            device = replace(find_device("cpu"), kind=requested)
        self.device = replace(device, threads=config.threads or device.threads)
        name = config.ace_step_model_path or os.environ.get("ACE_MODEL")
        self.model = _choose(catalog.choose, name) or catalog.choose(
            catalog.default_name(self.device.kind)
        )
        folder = config.model_path or os.environ.get("ACE_MUSICGEN")
        musicgen_model = _choose(musicgen.choose, folder) or catalog.MUSICGEN
        self.weights: dict[str, Weights] = {"musicgen": musicgen_model, "ace_step": self.model}
        self.studio = backend.Studio(
            self.model,
            self.device,
            "none",
            musicgen_model.folder or "",
            precision=config.precision or "",
            offload=config.offload or "",
        )
        self.plan = self.studio.setup.plan
        for name in self.weights:
            self.installed_folder(name)  # imports what this needs now, not at the first request

    def max_duration_s(self, backend: str) -> int:
        """The longest track that `backend` can make, in whole seconds."""
        field = next(f for f in BACKENDS[backend].params() if f.name == "duration_s")
        high = field.high or 0
        return int(min(high, LONGEST_S, getattr(self.weights[backend], "longest_s", high)))

    def installed_folder(self, backend: str) -> Path | None:
        """The folder with the backend's weights; None unless all of them are there."""
        weights = self.weights[backend]
        folder = checkpoints.locate(weights)
        return None if folder is None or weights.missing(folder) else folder

    def not_installed(self, backend: str) -> StudioError:
        """The error for a backend whose weights are not on this computer."""
        weights = self.weights[backend]
        return StudioError(
            "backend-missing", model=weights.title, size=weights.size, backend=backend
        )

    def model_version(self, backend: str, folder: Path) -> str:
        """Identifies model, files and precision, without loading; part of the track id.

        A hub snapshot is identified by its commit, a folder of the user's own by sizes and times
        of its weights, and the embedded model by its version.
        """
        weights = self.weights[backend]
        revision = checkpoints.revision(weights, folder)[:8]
        if weights.folder and not folder.is_relative_to(VENDOR):
            files = sorted(folder.glob("**/*.safetensors"))
            stats = [(f.relative_to(folder).as_posix(), f.stat()) for f in files]
            text = "".join(f"{name} {s.st_size} {s.st_mtime_ns}\n" for name, s in stats)
            revision = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = re.sub(r"[^a-z0-9.]+", "-", weights.title.lower()).strip("-")
        has_token = checkpoints.has_timbre_token(folder)
        version = TIMBRE_TOKEN_VERSION if has_token else OUTPUT_VERSION
        return f"{name}-{revision}-{self._dtype(backend)}-v{version}"

    def describe(self, loading: str = "") -> list[dict[str, Any]]:
        """Both backends as `get_backends` lists them, from the current state of disk and jobs.

        Args:
            loading: the backend that is being loaded; empty if none is.
        """

        with self._lock:
            downloading, errors = set(self._downloading), dict(self._errors)
        described = []
        for name, weights in self.weights.items():
            folder = self.installed_folder(name)
            error, folder_then = errors.get(name, (None, folder))
            if folder_then != folder:
                error = None  # the files have changed since it failed
            if self.device_error:
                error = str(self.device_error)
            if name in downloading:
                status, error = "downloading", None
            elif name == loading:
                status, error = "loading", None
            elif error:
                status = "error"
            else:
                status = "ready" if folder else "not_installed"
            fields = {
                "type": name,
                "name": weights.title,
                "status": status,
                "min_duration_sec": MIN_DURATION_S,
                "max_duration_sec": self.max_duration_s(name),
                "sample_rate": SAMPLE_RATE,
                "model_version": self.model_version(name, folder) if folder else None,
                "loaded": self.studio.runner.models.holds(weights),
                "error": error,
                "device": self.device.kind,
                "dtype": self._dtype(name),
                "licence": weights.licence,
                "commercial_use": weights.may_sell,
                "size_bytes": weights.size_bytes,
            }
            if name == "ace_step":
                config, model = self._config, self.model
                fields |= {
                    "default_inference_steps": config.ace_step_steps or model.steps,
                    "default_guidance_scale": config.ace_step_guidance or model.guidance,
                    "default_scheduler": config.ace_step_scheduler,
                }
            described.append(fields)
        return described

    def download(self, backend: str) -> dict[str, Any]:
        """Start downloading what `backend` lacks, in the background; returns the response."""
        installed = self.installed_folder(backend) is not None
        with self._lock:
            already = backend in self._downloading
            start = not installed and not already
            if start:
                self._downloading.add(backend)
                self._errors.pop(backend, None)
        if start:
            threading.Thread(target=self._download, args=(backend,), daemon=True).start()
        return {
            "backend": backend,
            "started": start,
            "already_installed": installed,
            "already_downloading": already,
        }

    def set_error(self, backend: str, message: str | None) -> None:
        """Remember why `backend` failed to download or load; None clears it."""
        with self._lock:
            self._errors.pop(backend, None)
            if message:
                self._errors[backend] = message, self.installed_folder(backend)

    def _dtype(self, backend: str) -> str:
        return self.plan.quantized or self.plan.dtype if backend == "ace_step" else "float32"

    def _download(self, backend: str) -> None:
        """Body of a download's thread. Always ends with one notification."""
        last_file, last_time, step = "", 0.0, None
        error: StudioError | None = None
        try:
            for step in hub.fetch(self.weights[backend]):
                now = time.monotonic()
                due = step.component != last_file or now - last_time > PROGRESS_INTERVAL_S
                if step.component and due:
                    self._notify_progress(backend, step)
                    last_file, last_time = step.component, now
            if step:
                self._notify_progress(backend, replace(step, done=step.total))
        except StudioError as caught:
            error = caught
        except Exception as caught:
            log.exception("The download of %s failed unexpectedly.", backend)
            error = StudioError("internal", kind=type(caught).__name__)
        with self._lock:
            self._downloading.discard(backend)
        if error is None:
            self._notify("download_complete", {"backend": backend})
            return
        self.set_error(backend, str(error))
        self._notify(
            "download_error",
            {"backend": backend, "code": "MODEL_DOWNLOAD_FAILED", "message": str(error)},
        )

    def _notify_progress(self, backend: str, step: hub.DownloadProgress) -> None:
        self._notify(
            "download_progress",
            {
                "backend": backend,
                "component": step.component,
                "component_percent": round(step.component_percent, 1),
                "overall_percent": round(step.overall_percent, 1),
                "bytes_downloaded": step.done,
                "bytes_total": step.total,
                "file_name": step.component,
                "files_completed": step.files_done,
                "files_total": step.files_total,
            },
        )


def _choose(choose: Callable[[str], Any], name: str | Path | None) -> Any:
    """What `choose` finds under `name`; None, with a warning, if that is not usable."""
    try:
        return choose(str(name)) if name else None
    except StudioError as error:
        log.warning("%s Using the default model.", error)
        return None
