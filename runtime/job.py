"""A job: one request, prepared to the last value, with everything that running it needs."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.files import name_from_text, private_folder
from core.params import Request
from core.requests import EDITION, MAX_SEED
from models.adapter_files import Adapter
from models.catalog import Model, MusicgenModel, PlannerModel, SongwriterModel
from models.weights import Weights
from runtime.device import Device
from runtime.memory_plan import PLAIN, MemoryPlan

if TYPE_CHECKING:
    import numpy as np


R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class Setup:
    """The models that a studio runs, and the device that it runs them on.

    `planner` is None where there is none; `no_planner` then says why. `edition` is that of the
    rules by which songs are made (see `core.requests.EDITION`), `plan` how the model is loaded.
    """

    model: Model
    device: Device
    songwriter: SongwriterModel
    musicgen: MusicgenModel
    planner: PlannerModel | None = None
    no_planner: str = ""
    plan: MemoryPlan = PLAIN
    edition: int = EDITION


@dataclass(frozen=True)
class JobFolder:
    """The private folder of one job. Its name is the job's id."""

    path: Path

    @classmethod
    def create(cls) -> JobFolder:
        """A new, empty folder that only this user can read.

        Raises:
            OSError: the disk is full, or the temporary folder cannot be written to.
        """
        path = private_folder() / secrets.token_hex(8)
        path.mkdir(mode=0o700)
        return cls(path)

    @property
    def stop_file(self) -> Path:
        """The file whose existence means stop: the one signal that crosses processes."""
        return self.path / "stop"

    def stopped(self) -> bool:
        """Whether the job was told to stop."""
        return self.stop_file.exists()

    def remove(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True)
class Job:
    """One request as it will be run. Picklable: on ZeroGPU it goes to another process.

    Attributes:
        request: with seeds, defaults and the job's own copies of files filled in.
        model: the ACE-Step model, or None where the request needs none; likewise the others.
        duration_s: length of the song that the job makes, in seconds; 0 where it makes none.
        sounds: the uploaded files, decoded, by field: paths of float32 arrays [2, samples] at
            48 kHz in NumPy's format.
        seconds: the lengths of those files, by field.
        sha256s: the sha256 of those files as they were uploaded, by field.
        adapters: what is applied, each with its strength.
        plan, edition: see `Setup`.
        notes: sentences for the result about what was changed on the way.
    """

    request: Any
    folder: JobFolder
    device: Device
    model: Model | None = None
    musicgen: MusicgenModel | None = None
    planner: PlannerModel | None = None
    songwriter: SongwriterModel | None = None
    duration_s: float = 0.0
    sounds: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sha256s: dict[str, str] = field(default_factory=dict)
    adapters: tuple[tuple[Adapter, float], ...] = ()
    plan: MemoryPlan = PLAIN
    edition: int = EDITION
    notes: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A name that no other job has."""
        return self.folder.path.name

    @property
    def weights(self) -> tuple[Weights, ...]:
        """Everything that must be on disk before the job can run."""
        return tuple(filter(None, (self.model, self.musicgen, self.planner, self.songwriter)))

    @property
    def one_at_a_time(self) -> bool:
        """Whether the job's model and its planner do not fit into memory together."""
        return self.planner is not None and self.plan.planner_in_turn

    def sound(self, name: str) -> np.ndarray:
        """The file uploaded as `name`: float32 [2, samples] at 48 kHz."""
        import numpy as np

        return np.load(self.sounds[name])

    @property
    def song_path(self) -> Path:
        """Where the song is written, under a name worth downloading."""
        name = name_from_text(self.request.prompt, self.request.mode)
        return self.folder.path / f"{name}-{self.request.seed}.wav"


def with_seed(request: R) -> R:
    """`request` with a random seed if it has none."""
    if getattr(request, "seed", 0) is not None:
        return request
    return request.model_copy(update={"seed": secrets.randbelow(MAX_SEED + 1)})
