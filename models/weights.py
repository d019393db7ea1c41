"""Model weights on disk: their source, the files they need, and errors for damaged copies."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from core.errors import StudioError

VENDOR = Path(__file__).parent.parent / "vendor"
"""Folder of the models that come with the program."""


COMPONENTS = {
    "transformer": "config.json",
    "condition_encoder": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer.json",
    "scheduler": "scheduler_config.json",
}
"""Components every checkpoint in the diffusers layout needs, and the file each must hold."""


FILES = (
    *("*.json", "*.safetensors", "*/*.json", "*/*.safetensors", "*/*.txt"),
    "silence_latent.pt",
)
"""Patterns of the files fetched from a hub repository: no code, and no pickle but the authors'
silence latent, whose numbers are read without unpickling it."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that can be downloaded and checked: what they are, where they are, their licence.

    Attributes:
        folder: where they are on disk already, if they need no download.
        marker: the file whose presence identifies a copy of these weights.
        files: patterns of the files to download.
    """

    name: str
    title: str
    repo: str
    revision: str
    licence: str
    may_sell: bool | None
    size_bytes: int
    folder: Path | None = None
    marker: ClassVar[str] = "config.json"
    files: ClassVar[tuple[str, ...]] = FILES

    @property
    def size(self) -> str:
        """The size of the download, such as "11.5 GB"."""
        return format_bytes(self.size_bytes) if self.size_bytes else "size unknown"

    @property
    def command(self) -> str:
        """The shell command that downloads these weights."""
        return f"python app.py fetch {self.name}"

    def root(self, snapshot: Path) -> Path:
        """The folder of these weights in a copy of their repository."""
        return snapshot

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` looks like a copy of these weights, complete or not."""
        return (folder / self.marker).is_file()

    def companions(self, folder: Path) -> tuple[Weights, ...]:  # noqa: ARG002
        """Other weights that the copy in `folder` needs and does not hold."""
        return ()

    def missing(self, folder: Path) -> str | None:
        """The first file that the copy in `folder` needs and lacks, or None."""
        if not (folder / self.marker).is_file():
            return self.marker
        if shard := missing_shard(self, folder):
            return shard
        return None if any(folder.glob("*.safetensors")) else "*.safetensors"


def missing_component_file(model: Weights, folder: Path) -> str | None:
    """The first file that a checkpoint in the diffusers layout needs and lacks, or None."""
    for part, marker in {"": "model_index.json", **COMPONENTS}.items():
        if not (folder / part / marker).is_file():
            return f"{part}/{marker}".lstrip("/")
    for part in sorted(folder.glob("*/")):
        if shard := missing_shard(model, part):
            return f"{part.name}/{shard}"
    for part in ("transformer", "condition_encoder", "vae", "text_encoder"):
        if not any((folder / part).glob("*.safetensors")):
            return f"{part}/*.safetensors"
    return None


def missing_shard(model: Weights, folder: Path) -> str | None:
    """The first shard that a safetensors index in `folder` lists and that is not there, or None."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        for shard in sorted(set(read_json(model, index).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                return shard
    return None


def broken(model: Weights, file: str, problem: str) -> StudioError:
    """The `model-broken` error for a damaged file, with the fix for where the copy came from."""
    return StudioError(
        "model-broken", model=model.title, file=file, problem=problem, fix=_fix(model)
    )


def mismatch(model: Weights, problem: str) -> StudioError:
    """The `model-mismatch` error for parts that belong to different models."""
    return StudioError("model-mismatch", model=model.title, problem=problem, fix=_fix(model))


def _fix(model: Weights) -> str:
    if model.folder and model.folder.is_relative_to(VENDOR):
        return "Restore it with: git checkout -- vendor/ace-step-mini"
    if model.folder:
        return f"Put a whole copy of it into {model.folder.name}"
    return f"Delete it from the hub's cache and fetch it again with: {model.command}"


def read_json(model: Weights, path: Path) -> dict[str, Any]:
    """The object in a JSON file of `model`; empty if the file holds anything but an object.

    Raises:
        StudioError: `model-broken`.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise broken(model, f"{path.parent.name}/{path.name}", "is not readable JSON") from error
    return content if isinstance(content, dict) else {}


def format_bytes(size: int) -> str:
    """A number of bytes in decimal units: "11.5 GB", "84 MB", "3 kB"."""
    if size >= 10**9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 10**6 else f"{math.ceil(size / 1e3)} kB"
