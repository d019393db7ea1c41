"""Checkpoints on disk: locate, download, check before loading, and identify them.

Reads JSON and the headers of safetensors files; no tensor is loaded and nothing is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from core.errors import StudioError
from core.results import Progress
from models import authors_layout, catalog, hub
from models.catalog import Model, SongwriterModel
from models.weights import Weights, broken, read_json

PULSE_S = 0.1
"""Minimum interval in seconds between two progress events of a download."""


def locate(model: Weights) -> Path | None:
    """The folder of `model` if it and all it needs are on disk, else None. Never goes online."""
    folder = model.folder or hub.find(model)
    if folder is None or any(hub.find(other) is None for other in model.companions(folder)):
        return None
    return folder


def find_songwriter(songwriter: Weights) -> Path:
    """The folder of `songwriter` on this computer. Never goes online.

    Raises:
        StudioError: `writer-missing`, with its size and the command that fetches it.
    """
    folder = locate(songwriter)
    if folder is None or songwriter.missing(folder):
        raise StudioError(
            "writer-missing",
            model=songwriter.title,
            size=songwriter.size,
            command=songwriter.command,
        )
    return folder


def choose_songwriter(device: str, memory_gb: float) -> SongwriterModel:
    """The largest songwriter on disk that fits the device, else the one to offer."""
    fitting = catalog.songwriters_for(device, memory_gb)
    on_disk = (each for each in fitting if (at := locate(each)) and not each.missing(at))
    return next(on_disk, catalog.offered_songwriter(device, memory_gb))


def fetch(model: Weights) -> Generator[Progress, None, Path]:
    """Download as `hub.fetch` does, with progress in MiB of the whole, ten times a second.

    Returns:
        The folder (as the generator's return value).

    Raises:
        StudioError: as `hub.fetch`.
    """
    reported, component = 0.0, None
    with closing(hub.fetch(model)) as steps:
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            if step.component != component or time.monotonic() - reported >= PULSE_S:
                reported, component = time.monotonic(), step.component
                yield Progress(
                    stage=f"Fetching {component or model.title}",
                    step=step.done >> 20,
                    steps=max(1, step.total >> 20),
                )


def inspect(model: Model, folder: Path) -> dict[str, set[str]]:
    """Check that the files of a checkpoint are complete, before anything is loaded from them.

    Returns:
        The names of the tensors of each component that has weights in the diffusers layout.

    Raises:
        StudioError: `model-broken`, naming the file.
    """
    if missing := model.missing(folder):
        raise broken(model, missing, "is missing")
    if authors_layout.matches(folder):
        for path in authors_layout.weight_files(model, folder, model.weights_file):
            tensor_names(path, model, folder)
        parts = shared_parts(folder)
        found = {p: _tensors_in(model, parts[p]) for p in ("vae", "text_encoder") if p in parts}
        return {"vae": found.get("vae", set())}  # the others are checked where they are loaded
    for path in sorted(folder.glob("**/*.json")):
        read_json(model, path)
    tensors = {}
    for part in sorted(folder.glob("*/")):
        if names := _tensors_in(model, part):
            tensors[part.name] = names
    return tensors


def _tensors_in(model: Weights, folder: Path) -> set[str]:
    """The names of all tensors in the safetensors files of one component's folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name for path in files for name in tensor_names(path, model, folder.parent)}


def shared_parts(folder: Path) -> dict[str, Path]:
    """The parts that a checkpoint in the authors' layout shares with others, wherever they are.

    In its own folder, in the one above it, or in the hub's cache; see
    `authors_layout.shared_parts`.
    """
    cached = hub.find(catalog.SHARED_PARTS)
    return authors_layout.shared_parts(folder, folder.parent, *([cached] if cached else []))


def transformer_config(folder: Path) -> dict[str, Any]:
    """The configuration of the checkpoint's transformer, by diffusers' names.

    Raises:
        OSError, ValueError, KeyError: if it cannot be read.
    """
    if authors_layout.matches(folder):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return authors_layout.component_configs(config)["transformer"]
    return json.loads((folder / "transformer" / "config.json").read_text("utf-8"))


def codebook(folder: Path) -> int:
    """The number of audio codes of the checkpoint in `folder`; 0 if it has no audio tokenizer."""
    try:
        if authors_layout.matches(folder):
            config = json.loads((folder / "config.json").read_text("utf-8"))
            config = authors_layout.component_configs(config)["audio_tokenizer"]
        else:
            config = json.loads((folder / "audio_tokenizer" / "config.json").read_text("utf-8"))
        return math.prod(int(level) for level in config["fsq_input_levels"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def parameter_counts(model: Model, folder: Path) -> dict[str, int]:
    """How many numbers the files of each component hold, read from their headers.

    Raises:
        StudioError: `model-broken`.
        OSError, ValueError: if the configuration cannot be read.
    """
    counts: dict[str, int] = {}

    def count(path: Path, part_of: Callable[[str], str]) -> None:
        for name, numbers in _tensor_sizes(path, model, folder).items():
            part = part_of(name)
            counts[part] = counts.get(part, 0) + numbers

    if authors_layout.matches(folder):
        for path in authors_layout.weight_files(model, folder, model.weights_file):
            count(path, lambda name: (authors_layout.diffusers_name(name) or ("", ""))[0])
        homes = shared_parts(folder)
        parts = {part: homes[part] for part in ("vae", "text_encoder") if part in homes}
    else:
        parts = {part.name: part for part in folder.glob("*/")}
    for part, home in parts.items():
        for path in home.glob("*.safetensors"):
            count(path, lambda _, part=part: part)
    return counts


def has_timbre_token(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is conditioned with a timbre token; see `timbre_token`."""
    try:
        part = "" if authors_layout.matches(folder) else "transformer"
        config = json.loads((folder / part / "config.json").read_text("utf-8"))
        width = config.get("encoder_hidden_size")
        return width is not None and width != config["hidden_size"]
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def fingerprint(folder: Path) -> str:
    """A sha256 that identifies the weights in `folder`: over the hashes of all weight files.

    Files in the hub's cache are named after their own sha256, which is used without reading them.
    """
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
        digest = path.resolve().name
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def revision(model: Weights, folder: Path) -> str:
    """The commit of a hub snapshot, or the revision of the table for any other folder."""
    for part in (folder, folder.parent):
        if re.fullmatch(r"[0-9a-f]{40}", part.name):
            return part.name
    return model.revision


def tensor_names(path: Path, model: Weights, folder: Path) -> set[str]:
    """The names of the tensors in a safetensors file, whose length must agree with its header.

    Args:
        folder: of `model`; errors name the file relative to it.

    Raises:
        StudioError: `model-broken`.
    """
    return set(_tensor_sizes(path, model, folder))


def _tensor_sizes(path: Path, model: Weights, folder: Path) -> dict[str, int]:
    """The tensors in a safetensors file, and how many numbers each holds. Raises `model-broken`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {
                name: math.prod(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError, ValueError) as error:
        name = path.relative_to(folder).as_posix()
        raise broken(model, name, "is cut off or no safetensors file") from error
