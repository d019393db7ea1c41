"""A song made again from its own file: what could make it differ, and by how much it does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audio import decode
from core import files
from core.errors import StudioError
from core.params import AdapterRef
from core.results import ExportedFiles, Take
from models import adapter_files

LONGEST_S = 600.0


def worn_again(told: Mapping[str, Any], given: Sequence[AdapterRef]) -> tuple[AdapterRef, ...]:
    """The adapters of a file's song, found among those `given` by what is in them, else by name.

    Each plays as strongly as it did then, unless a strength was given. What did not play then is
    added.

    Raises:
        StudioError: `settings-need-adapter`; those of `loras.inspect`.
    """
    left = [(adapter_files.inspect(worn.file, worn.config), worn) for worn in given]
    found = []
    for then in told["adapters"]:
        same = [pair for pair in left if pair[0].sha256 == then["sha256"]]
        same += [pair for pair in left if pair[0].name == then["name"]]
        if not same:
            raise StudioError("settings-need-adapter", names=then["name"])
        left.remove(same[0])
        worn = same[0][1]
        kept = {} if "strength" in worn.model_fields_set else {"strength": then["strength"]}
        found.append(worn.model_copy(update=kept))
    return (*found, *(worn for _, worn in left))


def faithful(told: Mapping[str, Any], take: Take) -> list[str]:
    """Sentences for everything that stands in the way of the same samples; none if nothing does.

    Args:
        told: settings of the file, as `settings.read_settings` gives them.
        take: what was made of them here.
    """
    said = []
    for part in ("model", "planner"):
        then, now = told.get(part) or {}, getattr(take, part)
        if then and now is None:
            said.append(f"The file was made with the planner {then['name']}; there is none here.")
        elif now is not None and then.get("sha256") != now.sha256:
            had = f"{then['name']}" if then else "no planner"
            said.append(f"The file was made with {had} of other weights than {now.name} here.")
    then, now = told["device"], take.device.model_dump()
    differing = [name for name in ("kind", "dtype", "threads", "torch") if then[name] != now[name]]
    said += [f"The file was made with {n} {then[n]}; here it is {now[n]}." for n in differing]
    brought = [field for field, sha in told["files"].items() if take.files.get(field) != sha]
    said += [f"The {field} is not the file that went in then." for field in brought]
    return said + _other_adapters(told["adapters"], take.adapters)


def _other_adapters(then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    before, here = ({each["sha256"]: each for each in side} for side in (then, now))
    said = [
        f"The adapter {each['name']} played at {each['strength']:g} then; here it does not play."
        for sha256, each in before.items()
        if sha256 not in here
    ]
    for sha256, each in here.items():
        if sha256 not in before:
            said.append(f"The adapter {each['name']} plays here, and did not then.")
        elif each["strength"] != before[sha256]["strength"]:
            strength = before[sha256]["strength"]
            said.append(
                f"The adapter {each['name']} played at {strength:g} then;"
                f" here it plays at {each['strength']:g}."
            )
    return said


def sound_of(made: Take | ExportedFiles) -> Path:
    """The file of a take, or the first of those made of one."""
    return Path(made.path if isinstance(made, Take) else made.paths[0])


def compare(path: Path, made: Take | ExportedFiles) -> str:
    """One sentence on how the sound in the file at `path` compares with what was `made` of it.

    Raises:
        StudioError: those of `decoding.decode`, but for a file without sound, such as JSON.
    """
    import numpy as np

    if path.suffix.lower() == ".json":
        return "The file holds settings only, so there is no sound to compare with."
    then = decode.decode(path, LONGEST_S, files.private_folder()).sound
    now = decode.decode(sound_of(made), LONGEST_S, files.private_folder()).sound
    if then.shape != now.shape:
        lengths = [sound.shape[1] for sound in (then, now)]
        return f"The file holds {lengths[0]} samples, and {lengths[1]} were made."
    difference = float(np.sqrt(np.mean(np.square(then - now, dtype=np.float64))))
    if not difference:
        return "The same samples came out, every one."
    level = float(np.sqrt(np.mean(np.square(then, dtype=np.float64))))
    away = 20 * math.log10(difference / level) if level else 0.0
    return (
        f"The difference lies {-away:.1f} dB below the song."
        if away < 0
        else ("It is another song: the difference is as loud as the song itself.")
    )
