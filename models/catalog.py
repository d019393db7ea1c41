"""The tables of models: music models, planners, songwriters, MusicGen and the stem separator."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from core.errors import StudioError
from core.requests import LONGEST_S
from models import authors_layout, weights
from models.weights import VENDOR, Weights


@dataclass(frozen=True, kw_only=True)
class SharedParts(Weights):
    """The parts that checkpoints in the authors' layout leave out: VAE, text encoder, silence."""

    marker: ClassVar[str] = "vae/config.json"
    files: ClassVar[tuple[str, ...]] = authors_layout.SHARED_FILES

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` holds all of them: other models of the repository may be there alone."""
        return self.missing(folder) is None

    def missing(self, folder: Path) -> str | None:
        """The first shared file that the copy in `folder` lacks, or None."""
        return next(authors_layout.missing_shared_files(folder), None)


SHARED_PARTS = SharedParts(
    name="shared",
    title="ACE-Step 1.5 VAE and text encoder",
    repo="ACE-Step/Ace-Step1.5",
    revision="main",
    licence="MIT",
    may_sell=True,
    size_bytes=1_550_000_000,
)


@dataclass(frozen=True, kw_only=True)
class Model(Weights):
    """An ACE-Step checkpoint, in the diffusers layout or the authors', and its best settings.

    Attributes:
        steps, guidance, shift: defaults recommended by the model's authors.
        longest_s: length of the longest song, in seconds.
        edits_tracks: whether it was trained to add, accompany and extract tracks.
        uses_planner: whether songs follow its planner's codes unless the request says otherwise.
        sings: whether it was trained on vocals.
        subfolder: its folder in a repository that holds other models too.
        weights_file: its file in a folder that holds several checkpoints.
    """

    steps: int
    guidance: float
    shift: float
    longest_s: float = LONGEST_S
    edits_tracks: bool = False
    uses_planner: bool = True
    sings: bool = True
    subfolder: str = ""
    weights_file: str = ""
    marker: ClassVar[str] = "model_index.json"

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the files to download."""
        if not self.subfolder:
            return weights.FILES
        return tuple(f"{self.subfolder}/{name}" for name in weights.FILES if "/" not in name)

    def root(self, snapshot: Path) -> Path:
        """The folder of the checkpoint in a copy of its repository."""
        return snapshot / self.subfolder

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` holds a checkpoint in either layout, complete or not."""
        if self.subfolder:  # one without all of its files is only begun: others share the snapshot
            return self.missing(folder) is None
        return (folder / self.marker).is_file() or authors_layout.matches(folder)

    def companions(self, folder: Path) -> tuple[Weights, ...]:
        """The shared parts, where a checkpoint in the authors' layout has none beside it."""
        if not authors_layout.matches(folder):
            return ()
        return () if authors_layout.has_shared_parts(folder) else (SHARED_PARTS,)

    def missing(self, folder: Path) -> str | None:
        """The first file that the copy in `folder` needs and lacks, or None."""
        if authors_layout.matches(folder):
            return authors_layout.missing_file(self, folder, self.weights_file)
        return weights.missing_component_file(self, folder)


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
            longest_s=240.0,
            sings=False,
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
        Model(
            name="xl-base",
            title="ACE-Step 1.5 XL base",
            repo="ACE-Step/acestep-v15-xl-base-diffusers",
            revision="main",
            licence="MIT",
            may_sell=True,
            size_bytes=11_500_000_000,
            edits_tracks=True,
            steps=50,
            guidance=7.0,
            shift=1.0,
        ),
        Model(
            name="2b-sft",
            title="ACE-Step 1.5 2B SFT",
            repo="ACE-Step/acestep-v15-sft",
            revision="main",
            licence="MIT",
            may_sell=True,
            size_bytes=6_300_000_000,
            steps=50,
            guidance=7.0,
            shift=1.0,
        ),
        Model(
            name="2b-base",
            title="ACE-Step 1.5 2B base",
            repo="ACE-Step/acestep-v15-base",
            revision="main",
            licence="MIT",
            may_sell=True,
            size_bytes=6_300_000_000,
            edits_tracks=True,
            steps=50,
            guidance=7.0,
            shift=1.0,
        ),
        Model(
            name="2b-turbo",
            title="ACE-Step 1.5 2B turbo",
            repo="ACE-Step/Ace-Step1.5",
            subfolder="acestep-v15-turbo",
            revision="main",
            licence="MIT",
            may_sell=True,
            size_bytes=6_300_000_000,
            steps=8,
            guidance=1.0,
            shift=3.0,
        ),
    )
}
"""The 2B models are published in the authors' layout only; their sizes include the shared parts,
1.5 GB that they have in common. Their defaults are the authors'."""


def default_name(device: str) -> str:
    """The default model of a device: `mini` on a CPU, `xl-sft` on an accelerator."""
    return "mini" if device == "cpu" else "xl-sft"


def choose(name: str) -> Model:
    """The model called `name`: a row of the table, a folder, a safetensors file, or a hub id.

    Folders may be in the diffusers layout or the authors'; a file needs its config.json beside
    it. A hub id is "owner/name".

    Raises:
        StudioError: `model-unknown`.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name).expanduser()
    file = path.name if path.suffix == ".safetensors" and path.is_file() else ""
    folder = path.parent if file else path
    if authors_layout.matches(folder) or (not file and (folder / Model.marker).is_file()):
        model = replace(
            _outside(path.resolve().name, str(path)),
            folder=folder.resolve(),
            weights_file=file,
            size_bytes=path.stat().st_size if file else _bytes_in(folder),
        )
        return _with_own_defaults(model, folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.exists() and ".." not in name:
        rows = (row for row in MODELS.values() if row.repo == name)
        return next(rows, _outside(name, name))
    raise StudioError("model-unknown", name=name[:80], known=", ".join(MODELS))


def _outside(title: str, name: str) -> Model:
    """A model that is not in the table: unknown licence, the defaults of XL SFT."""
    return replace(
        MODELS["xl-sft"],
        name=name,
        title=title,
        repo=name,
        licence="unknown",
        may_sell=None,
        size_bytes=0,
    )


def _with_own_defaults(model: Model, folder: Path) -> Model:
    """`model` with the settings that its own configuration calls for."""
    home = folder if authors_layout.matches(folder) else folder / "transformer"
    try:
        config = json.loads((home / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return model  # loading will name the broken file
    if config.get("is_turbo") or config.get("model_version") == "turbo":
        return replace(model, steps=8, guidance=1.0, shift=3.0)
    if config.get("model_version") == "base":
        return replace(model, edits_tracks=True, steps=50)
    return model


def _bytes_in(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("**/*") if f.is_file())


@dataclass(frozen=True, kw_only=True)
class PlannerModel(Weights):
    """A planner, and the device memory in GB from which it fits beside a music model.

    Attributes:
        subfolder: its folder in a repository that holds other models too.
    """

    subfolder: str = ""
    min_memory_gb: float = 0.0
    licence: str = "MIT"
    may_sell: bool | None = True
    revision: str = "main"

    @property
    def marker(self) -> str:
        """The file whose presence identifies a copy, relative to the repository."""
        return str(PurePosixPath(self.subfolder) / "config.json")

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the files to download."""
        here = PurePosixPath(self.subfolder)
        return str(here / "*.json"), str(here / "*.safetensors")

    def path_in(self, folder: Path) -> Path:
        """The planner's folder in the copy of its repository at `folder`."""
        return folder / self.subfolder

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` holds a copy; where others share the repository, a complete one."""
        if self.subfolder:
            return self.missing(folder) is None
        return super().is_in(folder)

    def missing(self, folder: Path) -> str | None:
        """The first file that the copy in `folder` needs and lacks, or None."""
        return Weights.missing(replace(self, subfolder=""), self.path_in(folder))


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
"""Smallest first. Larger planners write better captions and analyse audio better. The memory
limits are the authors' later defaults, with the planner on the GPU beside the music model or in
turn with it."""


def largest_planner(memory_gb: float) -> PlannerModel | None:
    """The largest planner for a device with `memory_gb` in total; None if none fits."""
    return next((size for size in reversed(PLANNERS) if memory_gb >= size.min_memory_gb), None)


@dataclass(frozen=True, kw_only=True)
class SongwriterModel(Weights):
    """A songwriter: Qwen 2.5 in the layout of transformers or of mlx-lm.

    Attributes:
        engine: "torch" or "mlx".
    """

    engine: str
    licence: str = "Apache-2.0"
    may_sell: bool | None = True
    revision: str = "main"

    def needed_gb(self, device: str) -> float:
        """The memory for the weights and 2 GB to work in.

        The files hold two bytes a weight, computed as such on CUDA and as four elsewhere; MLX
        computes with the weights as they are.
        """
        widened = 2 if self.engine == "torch" and device != "cuda" else 1
        return 1.1 * widened * self.size_bytes / 1e9 + 2


SONGWRITERS: dict[str, SongwriterModel] = {
    name: SongwriterModel(name=name, title=title, repo=repo, size_bytes=size, engine=engine)
    for engine, rows in {
        "torch": (
            ("qwen", "Qwen 2.5 7B Instruct", "Qwen/Qwen2.5-7B-Instruct", 15_240_000_000),
            ("qwen-1.5b", "Qwen 2.5 1.5B Instruct", "Qwen/Qwen2.5-1.5B-Instruct", 3_100_000_000),
            ("qwen-0.5b", "Qwen 2.5 0.5B Instruct", "Qwen/Qwen2.5-0.5B-Instruct", 1_000_000_000),
        ),
        "mlx": tuple(
            (
                f"qwen-mlx{suffix}",
                f"Qwen 2.5 {size}B Instruct (4 bit)",
                f"mlx-community/Qwen2.5-{size}B-Instruct-4bit",
                size_bytes,
            )
            for suffix, size, size_bytes in (
                ("", "7", 4_300_000_000),
                ("-1.5b", "1.5", 880_000_000),
                ("-0.5b", "0.5", 290_000_000),
            )
        ),
    }.items()
    for name, title, repo, size in rows
}
"""Largest first. The 3B model is left out: its licence forbids commercial use."""

USABLE = 0.85
"""Share of the memory that a songwriter may use; the rest is the system's."""


def songwriters_for(device: str, memory_gb: float) -> list[SongwriterModel]:
    """The songwriters that fit, largest first; the smallest where none does.

    Args:
        device: "cpu", "cuda" or "mps"; Apple's GPUs compute through MLX.
        memory_gb: of the device in total.
    """
    engine = "mlx" if device == "mps" else "torch"
    known = [writer for writer in SONGWRITERS.values() if writer.engine == engine]
    fitting = [w for w in known if w.needed_gb(device) <= USABLE * memory_gb]
    return fitting or known[-1:]


def offered_songwriter(device: str, memory_gb: float) -> SongwriterModel:
    """The largest songwriter that fits, but on a processor none that writes a word a second."""
    fitting = songwriters_for(device, memory_gb)
    quick = [writer for writer in fitting if device != "cpu" or writer.size_bytes < 5e9]
    return quick[0]


@dataclass(frozen=True, kw_only=True)
class MusicgenModel(Weights):
    """MusicGen in the layout of transformers: text encoder, decoder and codec in one file."""

    files: ClassVar[tuple[str, ...]] = ("config.json", "tokenizer.json", "model.safetensors")

    def missing(self, folder: Path) -> str | None:
        """The first file that the copy in `folder` needs and lacks, or None."""
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
"""591 million parameters in float32. Its repository also holds pickles, which are not fetched."""


@dataclass(frozen=True, kw_only=True)
class StemsModel(Weights):
    """The weights of a stem separator: one safetensors file, identified by size and sha256."""

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
"""Its hub page says MIT; its author says that the weights are not covered by that licence and are
meant for research (facebookresearch/demucs, issues 327 and 508)."""

BY_NAME: dict[str, weights.Weights] = {
    each.name: each
    for each in (
        *PLANNERS,
        *SONGWRITERS.values(),
        HTDEMUCS,
        MUSICGEN,
        *MODELS.values(),
        SHARED_PARTS,
    )
}
"""Everything that can be downloaded by name."""
