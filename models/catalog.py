"""TODO"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from core.errors import StudioError
from models import weights
from models.weights import VENDOR, Weights, missing

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Model(Weights):
    """A music model, and how it sounds best.

    `steps`, `guidance` and `shift` are the defaults its authors tuned it for; `longest_s` is the
    longest song it makes. `uses_planner` tells whether its planner's codes are worth following unless
    somebody says otherwise.
    """

    steps: int
    guidance: float
    shift: float
    longest_s: float = 240.0
    uses_planner: bool = True
    marker: ClassVar[str] = "model_index.json"

    def missing(self, folder: Path) -> str | None:
        return missing(self, folder)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="mini",
            title="ACE-Step mini (embedded)",
            repo="vendor/ace-step-mini",
            revision="1",
            licence="MIT",
            may_sell=True,
            size_bytes=54_000_000,
            uses_planner=False,
            steps=16,
            guidance=3.0,
            shift=3.0,
            folder=VENDOR / "ace-step-mini",
        ),
        Model(
            name="xl-sft",
            title="ACE-Step 1.5 XL SFT",
            repo="ACE-Step/acestep-v15-xl-sft-diffusers",
            revision="main",
            licence="MIT",
            may_sell=True,
            size_bytes=11_500_000_000,
            steps=27,
            guidance=7.0,
            shift=1.0,
        ),
        Model(
            name="xl-turbo",
            title="ACE-Step 1.5 XL turbo",
            repo="ACE-Step/acestep-v15-xl-turbo-diffusers",
            revision="main",
            licence="MIT",
            may_sell=True,
            size_bytes=11_000_000_000,
            steps=8,
            guidance=1.0,
            shift=3.0,
        ),
    )
}


def default_name(device: str) -> str:
    """The model a device plays when nobody chose: `mini` on a bare CPU, else `xl-sft`."""
    return "mini" if device == "cpu" else "xl-sft"


def choose(name: str) -> Model:
    """The model called `name`: a row of the table, a local folder, or a hub id "owner/name".

    Raises:
        StudioError: `model-unknown`.
    """
    if name in MODELS:
        return MODELS[name]
    folder = Path(name).expanduser()
    if (folder / "model_index.json").is_file():
        stranger = _stranger(folder.resolve().name, str(folder))
        return _tuned(replace(stranger, folder=folder.resolve(), size_bytes=_bytes_in(folder)))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.exists() and ".." not in name:
        return _stranger(name, name)
    raise StudioError("model-unknown", name=name[:80], known=", ".join(MODELS))


def _stranger(title: str, name: str) -> Model:
    """A model outside the table: nothing is known of its licence, its defaults are XL SFT's."""
    return replace(
        MODELS["xl-sft"],
        name=name,
        title=title,
        repo=name,
        licence="unknown",
        may_sell=None,
        size_bytes=0,
    )


def _tuned(model: Model) -> Model:
    """`model` with the defaults its own transformer asks for."""
    try:
        config = json.loads((model.folder / "transformer" / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return model  # inspect() will name the file that is broken
    if config.get("is_turbo") or config.get("model_version") == "turbo":
        return replace(model, steps=8, guidance=1.0, shift=3.0)
    return model


def _bytes_in(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("**/*") if f.is_file())


@dataclass(frozen=True, kw_only=True)
class PlannerModel(weights.Weights):
    """A planner: where it is, and the memory in GB from which it fits beside a music model.

    `subfolder` is the folder it has in a repository that holds other models too.
    """

    subfolder: str = ""
    min_memory_gb: float = 0.0
    licence: str = "MIT"
    may_sell: bool | None = True
    revision: str = "main"

    @property
    def marker(self) -> str:
        return str(PurePosixPath(self.subfolder) / "config.json")

    @property
    def files(self) -> tuple[str, ...]:
        here = PurePosixPath(self.subfolder)
        return str(here / "*.json"), str(here / "*.safetensors")

    def path_in(self, folder: Path) -> Path:
        """Where the planner lies in the copy of its repository at `folder`."""
        return folder / self.subfolder

    def missing(self, folder: Path) -> str | None:
        return weights.Weights.missing(replace(self, subfolder=""), self.path_in(folder))


PLANNERS = tuple(
    PlannerModel(
        name=name,
        title=f"ACE-Step 5Hz planner {name}",
        repo=repo,
        subfolder=subfolder,
        size_bytes=size,
        min_memory_gb=min_memory_gb,
    )
    for name, repo, subfolder, size, min_memory_gb in (
        ("0.6B", "ACE-Step/acestep-5Hz-lm-0.6B", "", 1_330_000_000, 6),
        ("1.7B", "ACE-Step/Ace-Step1.5", "acestep-5Hz-lm-1.7B", 3_700_000_000, 12),
        ("4B", "ACE-Step/acestep-5Hz-lm-4B", "", 8_380_000_000, 24),
    )
)
"""Smallest first; larger ones write better captions and hear better. The limits are the authors'
later defaults for graphics memory, with the music model beside the planner or in turn with it."""


def largest_planner(memory_gb: float) -> PlannerModel | None:
    """The largest planner for a device with `memory_gb` in all; None: do without."""
    return next((size for size in reversed(PLANNERS) if memory_gb >= size.min_memory_gb), None)


@dataclass(frozen=True, kw_only=True)
class SongwriterModel(weights.Weights):
    """A songwriter: a Qwen 2.5 in the layout of transformers, or in that of mlx-lm.

    `engine` is "torch" or "mlx".
    """

    engine: str


SONGWRITERS: dict[str, SongwriterModel] = {
    writer.name: writer
    for writer in (
        SongwriterModel(
            name="qwen",
            title="Qwen 2.5 7B Instruct",
            repo="Qwen/Qwen2.5-7B-Instruct",
            revision="main",
            licence="Apache-2.0",
            may_sell=True,
            size_bytes=15_240_000_000,
            engine="torch",
        ),
        SongwriterModel(
            name="qwen-mlx",
            title="Qwen 2.5 7B Instruct (4 bit)",
            repo="mlx-community/Qwen2.5-7B-Instruct-4bit",
            revision="main",
            licence="Apache-2.0",
            may_sell=True,
            size_bytes=4_300_000_000,
            engine="mlx",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class MusicgenModel(Weights):
    """A MusicGen in the layout of transformers: text encoder, decoder and codec in one file."""

    files: ClassVar[tuple[str, ...]] = ("config.json", "tokenizer.json", "model.safetensors")

    def missing(self, folder: Path) -> str | None:
        return next((name for name in self.files if not (folder / name).is_file()), None)


MUSICGEN = MusicgenModel(
    name="musicgen-small",
    title="MusicGen small",
    repo="facebook/musicgen-small",
    revision="main",
    licence="CC-BY-NC-4.0",
    may_sell=False,
    size_bytes=2_370_000_000,
)
"""591 million parameters in float32. Its repository also holds pickles, which are left alone."""


@dataclass(frozen=True, kw_only=True)
class StemsModel(Weights):
    """A separator's weights: one safetensors file, known by its size and sha256."""

    sha256: str
    marker: ClassVar[str] = "955717e8.safetensors"
    files: ClassVar[tuple[str, ...]] = (marker,)


HTDEMUCS = StemsModel(
    name="htdemucs",
    title="HTDemucs",
    repo="adefossez/HTDemucs",
    revision="bf35a81b663819a8255c8fefee17f9d812b786b5",
    licence="research use",
    may_sell=None,
    size_bytes=84_025_440,
    sha256="d9fa14133cfcc034a6758923bb3a8ca9f8dfd0b582134643bbf83f72c17576dd",
)
"""Its hub page says MIT; its author says that the weights are outside that licence and meant for
research (facebookresearch/demucs, issues 327 and 508)."""
