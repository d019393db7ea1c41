"""A job as data: what the device is to do, which of it is the planner's, and what it will cost.

Picklable throughout, since on ZeroGPU it goes to another process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from core.params import Request
from core.requests import Extend
from models import weights
from models.adapter_files import Adapter
from models.catalog import PlannerModel, SongwriterModel
from runtime import device

if TYPE_CHECKING:
    import numpy as np


STAGES = (
    *("Reading the file", "Loading", "Encoding", "Loading the planner", "Listening", "Planning"),
    *("Thinking of a song", "Rewriting", "Composing codes", "Reading adapters"),
    *("Reading the words", "Denoising", "Decoding", "Writing"),
)
"""All that a job may go through, in order, once its turn has come and its models are on disk."""


EXPORT_STAGES = {
    "export": "Writing",
    "master": "Setting the loudness",
    "stems": "Splitting into stems",
}
"""The stage that finishing a take spends its time in."""


@dataclass(frozen=True)
class Job:
    """All that the GPU worker needs to know. Picklable: it may run in another process.

    `folder` is the job's own, empty at first. `sounds` are the decoded files that came in, by
    field, as `sources.Upload.sound`; `files` their sha256. `adapters` come with their strengths.
    `planner` is None where none thinks.
    """

    id: str
    request: Request
    model: weights.Weights
    source: Path
    place: device.Device
    folder: Path
    notes: tuple[str, ...]
    gpu_seconds: int = 0
    planner: PlannerModel | None = None
    planner_folder: Path | None = None
    writer: SongwriterModel | None = None
    writer_folder: Path | None = None
    in_turn: bool = False
    sounds: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    adapters: tuple[tuple[Adapter, float], ...] = ()

    @property
    def flag(self) -> Path:
        """The file whose existence means stop: the one signal that crosses processes."""
        return self.folder / "stop"

    @property
    def wav(self) -> Path:
        """Where the song goes, under a name that is worth downloading."""
        words = "-".join(re.findall(r"\w+", self.request.prompt.lower()))[:40].strip("-_")
        return self.folder / f"{words or self.request.mode}-{self.request.seed}.wav"

    @property
    def duration_s(self) -> float:
        """How long the piece will be."""
        request, source = self.request, self.seconds.get("source")
        if isinstance(request, Extend):
            return request.before_s + source + request.after_s
        return request.duration_s if source is None else source

    def sound(self, field: str) -> np.ndarray:
        """The file that came in as `field`: float32 [2, samples] at 48 kHz."""
        import numpy as np

        return np.load(self.sounds[field])

    def stopped(self) -> bool:
        return self.flag.exists()
