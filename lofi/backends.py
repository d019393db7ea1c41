"""The two backends of the daemon: what they are asked with, how they stand, and fetching them.

A request is decided here to the last value, and named, before anything is loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import StudioError
from core.requests import MAX_SEED, SAMPLE_RATE, Generate, Musicgen
from lofi.config import Config
from lofi.track_cache import track_id
from models import checkpoints, hub
from models.weights import VENDOR, Weights

BACKENDS: dict[str, type[Generate] | type[Musicgen]] = {"musicgen": Musicgen, "ace_step": Generate}
"""What each backend is asked with, in the order they are told."""


SCHEDULERS = {"euler": "ode", "heun": "heun", "pingpong": "sde"}
"""Names of schedulers, and what the engine calls them. Pingpong goes to the clean estimate and back
to the next time with fresh noise, which comes from the job's seed."""


PULSE_S = 0.25
"""Seconds between two messages about one file that is being fetched."""


UNPLANNED = ("thinking", "use_cot_caption", "use_cot_metas", "use_cot_language")
"""What is turned off, so that no planner's opinion comes between a request and its track."""


VERSION = 1
"""Raised whenever our own code makes other samples of the same request."""


OnEvent = Callable[[str, dict[str, Any]], None]
"""Gets the name of a notification and its fields, from any thread."""


@dataclass(frozen=True)
class TrackOrder:
    """What is to be made, with nothing left open, and what it will be called."""

    track_id: str
    backend: str
    model_version: str
    prompt: str
    seed: int
    duration_sec: int
    request: Generate | Musicgen
    params: dict[str, Any]
    total_steps: int


class Backends:
    """Both backends on one device.

    Finding the device and the models takes a moment where a GPU has to be asked.
    """

    def __init__(self, config: Config, tell: OnEvent) -> None:
        import backend
        from models import catalog, musicgen
        from runtime.device import find_device

        self._config, self._tell = config, tell
        self._faults: dict[str, tuple[str, Path | None]] = {}
        self._fetching: set[str] = set()
        self._guard = threading.Lock()
        self.no_device: StudioError | None = None
        device = None if config.device == "auto" else config.device
        try:
            place = find_device(device)
        except StudioError as error:
            self.no_device = error
            place = replace(find_device("cpu"), device=device)
        self.place = replace(place, threads=config.threads or place.threads)
        name = config.ace_step_model_path or os.environ.get("ACE_MODEL")
        model = _chosen(catalog.choose, name)
        model = model or catalog.choose(catalog.default_name(place.device))
        folder = config.model_path or os.environ.get("ACE_MUSICGEN")
        composer = _chosen(musicgen.choose, folder) or catalog.MUSICGEN
        self.weights: dict[str, Weights] = {"musicgen": composer, "ace_step": model}
        self.studio = backend.Studio(model, self.place, "none", composer.folder or "")
        for name in self.weights:
            self.home(name)  # what has to be imported for this is imported now

    def longest_s(self, backend: str) -> int:
        """The longest track that `backend` makes."""
        param = next(k for k in BACKENDS[backend].params() if k.name == "duration_s")
        model = self.weights[backend]
        return int(min(param.high, getattr(model, "longest_s", param.high)))

    def order(
        self,
        backend: str,
        prompt: str,
        duration_sec: int,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
    ) -> TrackOrder:
        """Decide what is left open. All values are in their ranges.

        Raises:
            StudioError: `backend-missing`.
        """
        weights, config = self.weights[backend], self._config
        home = self.home(backend)
        if home is None:
            raise self.missing(backend)
        seed = secrets.randbelow(MAX_SEED + 1) if seed is None else seed
        asked: dict[str, Any] = {
            "prompt": prompt,
            "duration_s": duration_sec,
            "seed": (seed ^ seed >> 31 ^ seed >> 62) & MAX_SEED,
        }
        params, dtype, total = {}, "float32", 50 * duration_sec
        if backend == "ace_step":
            dtype = self.place.dtype
            total = steps or config.ace_step_steps or weights.steps
            params = {
                "inference_steps": total,
                "scheduler": scheduler or config.ace_step_scheduler,
                "guidance_scale": guidance or config.ace_step_guidance or weights.guidance,
            }
            if weights.guidance == 1:
                params["guidance_scale"] = 1.0  # built in: the studio plays it without, too
            asked |= {
                "inference_steps": total,
                "infer_method": SCHEDULERS[params["scheduler"]],
                "guidance_scale": params["guidance_scale"],
                "instrumental": True,
                **dict.fromkeys(UNPLANNED, False),
            }
        version = model_version(weights, home, dtype)
        return TrackOrder(
            track_id=track_id(backend, version, prompt, seed, duration_sec, [*params.values()]),
            backend=backend,
            model_version=version,
            prompt=prompt,
            seed=seed,
            duration_sec=duration_sec,
            request=BACKENDS[backend].of(asked),
            params=params,
            total_steps=total,
        )

    def told(self, loading: str = "") -> list[dict[str, Any]]:
        """What each backend is and how it stands, from what is on disk and going on right now.

        Args:
            loading: the backend that is being loaded, if one is.
        """
        from runtime import model_cache

        with self._guard:
            fetching, faults = set(self._fetching), dict(self._faults)
        told = []
        for name, weights in self.weights.items():
            home = self.home(name)
            trouble, there = faults.get(name, (None, home))
            if there != home:
                trouble = None  # what is on disk has changed since
            if self.no_device:
                trouble = str(self.no_device)
            if name in fetching:
                status, trouble = "downloading", None
            elif name == loading:
                status, trouble = "loading", None
            elif trouble:
                status = "error"
            else:
                status = "ready" if home else "not_installed"
            dtype = self.place.dtype if name == "ace_step" else "float32"
            about = {
                "type": name,
                "name": weights.title,
                "status": status,
                "min_duration_sec": 5,
                "max_duration_sec": self.longest_s(name),
                "sample_rate": SAMPLE_RATE,
                "model_version": model_version(weights, home, dtype) if home else None,
                "loaded": model_cache.is_loaded(weights),
                "error": trouble,
                "device": self.place.device,
                "dtype": dtype,
                "licence": weights.licence,
                "commercial_use": weights.may_sell,
                "size_bytes": weights.size_bytes,
            }
            if name == "ace_step":
                about |= {
                    "default_inference_steps": self._config.ace_step_steps or weights.steps,
                    "default_guidance_scale": self._config.ace_step_guidance or weights.guidance,
                    "default_scheduler": self._config.ace_step_scheduler,
                }
            told.append(about)
        return told

    def download(self, backend: str) -> dict[str, Any]:
        """Fetch what `backend` lacks, behind the answer that this returns."""
        here = self.home(backend) is not None
        with self._guard:
            already = backend in self._fetching
            start = not here and not already
            if start:
                self._fetching.add(backend)
                self._faults.pop(backend, None)
        if start:
            threading.Thread(target=self._fetch, args=(backend,), daemon=True).start()
        return {
            "backend": backend,
            "started": start,
            "already_installed": here,
            "already_downloading": already,
        }

    def missing(self, backend: str) -> StudioError:
        """The error for a backend whose weights are not here."""
        weights = self.weights[backend]
        return StudioError(
            "backend-missing", model=weights.title, size=weights.size, backend=backend
        )

    def fault(self, backend: str, text: str | None) -> None:
        """Remember why `backend` could not be fetched or played; None: it could."""
        with self._guard:
            self._faults.pop(backend, None)
            if text:
                self._faults[backend] = text, self.home(backend)

    def home(self, backend: str) -> Path | None:
        """Where the weights of `backend` are, if they are there and whole."""
        weights = self.weights[backend]
        folder = checkpoints.locate(weights)
        return None if folder is None or weights.missing(folder) else folder

    def _fetch(self, backend: str) -> None:
        """The thread of a download."""
        told, step = ("", 0.0), None
        try:
            for step in hub.fetch(self.weights[backend]):
                now = time.monotonic()
                if step.component and (step.component != told[0] or now - told[1] > PULSE_S):
                    self._downloading(backend, step)
                    told = step.component, now
            if step:
                self._downloading(backend, replace(step, done=step.total))
            trouble = None
        except StudioError as error:
            trouble = error
        except Exception as error:  # noqa: BLE001 - a download that began has an end on the wire
            traceback.print_exc(file=sys.stderr)
            trouble = StudioError("internal", kind=type(error).__name__)
        with self._guard:
            self._fetching.discard(backend)
        if trouble is None:
            self._tell("download_complete", {"backend": backend})
            return
        self.fault(backend, str(trouble))
        self._tell(
            "download_error",
            {"backend": backend, "code": "MODEL_DOWNLOAD_FAILED", "message": str(trouble)},
        )

    def _downloading(self, backend: str, step: hub.DownloadProgress) -> None:
        self._tell(
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


def _chosen(choose: Callable[[str], Any], name: str | Path | None) -> Any:
    """What `choose` finds under `name`; None, with a warning, where that is nothing to play."""
    try:
        return choose(str(name)) if name else None
    except StudioError as error:
        print(f"lofi: {error} The default is played.", file=sys.stderr)
        return None


def model_version(weights: Weights, home: Path, dtype: str) -> str:
    """What made a track, known without loading: model, the state of its files, precision.

    A snapshot of the hub is known by its commit. A folder of one's own is known by the sizes and
    times of its weights, and the embedded model by its number.
    """
    state = checkpoints.revision(weights, home)[:8]
    if weights.folder and not home.is_relative_to(VENDOR):
        files = sorted(home.glob("**/*.safetensors"))
        stamps = [(f.relative_to(home).as_posix(), f.stat()) for f in files]
        text = "".join(f"{name} {s.st_size} {s.st_mtime_ns}\n" for name, s in stamps)
        state = hashlib.sha256(text.encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9.]+", "-", weights.title.lower()).strip("-")
    return f"{name}-{state}-{dtype}-v{VERSION}"
