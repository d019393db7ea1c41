"""Which models exist, where their files are, and fetching them.

A music model is a folder in the diffusers layout of `AceStepPipeline`; other rooms have tables of
`Weights` of their own. This room reads JSON and the headers of safetensors files; it never loads a
tensor and never runs anything a file contains.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import downloads
from errors import StudioError
from song import Progress

VENDOR = Path(__file__).parent / "vendor"

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

PULSE_S = 0.1
"""Seconds between two signs of a download, at least: it has hundreds of pieces a second."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Files that are fetched and judged: what they are, where they are, what they may be used for.

    `folder` is set for what is on disk already; `proof` is the file that tells a whole folder;
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
    proof: ClassVar[str] = "config.json"
    files: ClassVar[tuple[str, ...]] = FILES

    @property
    def size(self) -> str:
        """The download in words: "11.5 GB"."""
        return downloads.in_words(self.size_bytes) if self.size_bytes else "size unknown"

    @property
    def command(self) -> str:
        """What a person types to fetch it."""
        return f"python app.py fetch {self.name}"

    def missing(self, folder: Path) -> str | None:
        """The first file that the copy in `folder` needs and lacks, or None."""
        if not (folder / self.proof).is_file():
            return self.proof
        if lost := _lost_shard(folder):
            return lost
        return None if any(folder.glob("*.safetensors")) else "*.safetensors"


@dataclass(frozen=True, kw_only=True)
class Model(Weights):
    """A music model, and how it sounds best.

    `steps`, `guidance` and `shift` are the defaults its authors tuned it for; `longest_s` is the
    longest song it makes. `composes` tells whether its planner's codes are worth following unless
    somebody says otherwise.
    """

    steps: int
    guidance: float
    shift: float
    longest_s: float = 240.0
    composes: bool = True
    proof: ClassVar[str] = "model_index.json"

    def missing(self, folder: Path) -> str | None:
        return missing(folder)


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
            composes=False,
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


def locate(model: Weights) -> Path | None:
    """The folder of `model` if it is on disk, else None. Never goes online."""
    return model.folder or downloads.find(model)


def fetch(model: Weights) -> Iterator[Progress]:
    """`downloads.fetch`, told as progress in megabytes of the whole, ten times a second.

    Returns:
        The folder (as the generator's return value).

    Raises:
        StudioError: as `downloads.fetch`.
    """
    told, component = 0.0, None
    with closing(downloads.fetch(model)) as steps:
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            if step.component != component or time.monotonic() - told >= PULSE_S:
                told, component = time.monotonic(), step.component
                yield Progress(
                    stage=f"Fetching {component or model.title}",
                    step=step.done >> 20,
                    steps=max(1, step.total >> 20),
                )


def missing(folder: Path) -> str | None:
    """The first file that the checkpoint in `folder` needs and lacks, or None."""
    for part, proof in {"": "model_index.json", **COMPONENTS}.items():
        if not (folder / part / proof).is_file():
            return f"{part}/{proof}".lstrip("/")
    for part in sorted(folder.glob("*/")):
        if lost := _lost_shard(part):
            return f"{part.name}/{lost}"
    for part in ("transformer", "condition_encoder", "vae", "text_encoder"):
        if not any((folder / part).glob("*.safetensors")):
            return f"{part}/*.safetensors"
    return None


def _lost_shard(folder: Path) -> str | None:
    """The first file of weights that an index in `folder` names and that is not there."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        for shard in sorted(set(_json(index, folder.name).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                return shard
    return None


def inspect(model: Model, folder: Path) -> dict[str, set[str]]:
    """Prove that the files of a checkpoint are whole before anything is loaded from them.

    Returns:
        For each component with weights, the names of its tensors.

    Raises:
        StudioError: `model-broken`, naming the file.
    """
    if lacking := missing(folder):
        raise broken(model, lacking, "is missing")
    for path in sorted(folder.glob("**/*.json")):
        _json(path, model.title, model)
    tensors: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        tensors.setdefault(path.parent.name, set()).update(tensor_names(path, model, folder))
    return tensors


def codebook(folder: Path) -> int:
    """How many audio codes the checkpoint in `folder` knows; 0 if it was published without them."""
    try:
        config = json.loads((folder / "audio_tokenizer" / "config.json").read_text("utf-8"))
        return math.prod(int(level) for level in config["fsq_input_levels"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


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


def fingerprint(folder: Path) -> str:
    """The sha256 that names these weights: over the hashes of all weight files, in order.

    Files in the hub's cache are stored under their own sha256, which is taken as it is.
    """
    whole = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
        stored = path.resolve().name
        if not re.fullmatch(r"[0-9a-f]{64}", stored):
            with path.open("rb") as file:
                stored = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {stored}\n".encode())
    return whole.hexdigest()


def revision(model: Weights, folder: Path) -> str:
    """The commit that a hub folder is a snapshot of, or the table's word for it."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else model.revision


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


def _json(path: Path, title: str, model: Weights | None = None) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        name = f"{path.parent.name}/{path.name}"
        raise broken(model or _stranger(title, title), name, "is not readable JSON") from error
    return found if isinstance(found, dict) else {}


def tensor_names(path: Path, model: Weights, folder: Path) -> set[str]:
    """The tensors that a safetensors file announces, once its length agrees with its header.

    Format: 8 bytes little-endian header length, JSON header, data.

    Args:
        folder: of `model`; the file is named relative to it.

    Raises:
        StudioError: `model-broken`.
    """
    name = path.relative_to(folder).as_posix()
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, 100_000_000):
            raise broken(model, name, "is cut off")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise broken(model, name, "has no readable header") from error
    if 8 + length + end != size:
        raise broken(model, name, f"is {size} bytes long and should be {8 + length + end}")
    return set(header)
