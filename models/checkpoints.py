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
from pathlib import Path

from core.results import Progress
from models import hub
from models.catalog import Model
from models.weights import Weights, broken, missing, read_json

PULSE_S = 0.1
"""Seconds between two signs of a download, at least: it has hundreds of pieces a second."""


def locate(model: Weights) -> Path | None:
    """The folder of `model` if it is on disk, else None. Never goes online."""
    return model.folder or hub.find(model)


def fetch(model: Weights) -> Iterator[Progress]:
    """`downloads.fetch`, told as progress in megabytes of the whole, ten times a second.

    Returns:
        The folder (as the generator's return value).

    Raises:
        StudioError: as `downloads.fetch`.
    """
    told, component = 0.0, None
    with closing(hub.fetch(model)) as steps:
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


def inspect(model: Model, folder: Path) -> dict[str, set[str]]:
    """Prove that the files of a checkpoint are whole before anything is loaded from them.

    Returns:
        For each component with weights, the names of its tensors.

    Raises:
        StudioError: `model-broken`, naming the file.
    """
    if lacking := missing(model, folder):
        raise broken(model, lacking, "is missing")
    for path in sorted(folder.glob("**/*.json")):
        read_json(model, path)
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
