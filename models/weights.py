"""What every table of models shares: a folder of weights, what it lacks, and how to say so."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from core.errors import StudioError

VENDOR = Path(__file__).parent.parent / "vendor"


COMPONENTS = {
    "transformer": "config.json",
    "condition_encoder": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer.json",
    "scheduler": "scheduler_config.json",
}
"""What every checkpoint must hold, and the file that says so."""


FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors", "*/*.txt")
"""What is fetched from a hub repository: no pickles, no code."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Files that are fetched and judged: what they are, where they are, what they may be used for.

    `folder` is set for what is on disk already; `marker` is the file that tells a whole folder;
    `files` are the patterns to fetch.
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
        """The download in words: "11.5 GB"."""
        return format_bytes(self.size_bytes) if self.size_bytes else "size unknown"

    @property
    def command(self) -> str:
        """What a person types to fetch it."""
        return f"python app.py fetch {self.name}"

    def missing(self, folder: Path) -> str | None:
        """The first file that the copy in `folder` needs and lacks, or None."""
        if not (folder / self.marker).is_file():
            return self.marker
        if lost := _lost_shard(self, folder):
            return lost
        return None if any(folder.glob("*.safetensors")) else "*.safetensors"


def missing(model: Weights, folder: Path) -> str | None:
    """The first file that the checkpoint in `folder` needs and lacks, or None."""
    for part, marker in {"": "model_index.json", **COMPONENTS}.items():
        if not (folder / part / marker).is_file():
            return f"{part}/{marker}".lstrip("/")
    for part in sorted(folder.glob("*/")):
        if lost := _lost_shard(model, part):
            return f"{part.name}/{lost}"
    for part in ("transformer", "condition_encoder", "vae", "text_encoder"):
        if not any((folder / part).glob("*.safetensors")):
            return f"{part}/*.safetensors"
    return None


def _lost_shard(model: Weights, folder: Path) -> str | None:
    """The first file of weights that an index in `folder` names and that is not there."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        for shard in sorted(set(read_json(model, index).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                return shard
    return None


def broken(model: Weights, file: str, problem: str) -> StudioError:
    """The error for a damaged file of `model`, with the cure that fits where it came from."""
    return StudioError(
        "model-broken", model=model.title, file=file, problem=problem, fix=_cure(model)
    )


def mismatch(model: Weights, problem: str) -> StudioError:
    """The error for parts of `model` that come from different models."""
    return StudioError("model-mismatch", model=model.title, problem=problem, fix=_cure(model))


def _cure(model: Weights) -> str:
    if model.folder and model.folder.is_relative_to(VENDOR):
        return "Restore it with: git checkout -- vendor/ace-step-mini"
    if model.folder:
        return f"Put a whole copy of it into {model.folder.name}"
    return f"Delete it from the hub's cache and fetch it again with: {model.command}"


def read_json(model: Weights, path: Path) -> dict:
    """The object in a JSON file of `model`; empty where the file holds something else.

    Raises:
        StudioError: `model-broken`.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise broken(model, f"{path.parent.name}/{path.name}", "is not readable JSON") from error
    return found if isinstance(found, dict) else {}


def format_bytes(size: int) -> str:
    """A number of bytes for people: "11.5 GB", "84 MB", "3 kB"."""
    if size >= 10**9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 10**6 else f"{math.ceil(size / 1e3)} kB"
