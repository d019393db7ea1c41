"""Replaying a song from its own file: which adapters, what differs, and by how much."""

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

MAX_S = 600.0
"""The longest sound that is compared, in seconds."""


def match_adapters(
    settings: Mapping[str, Any], given: Sequence[AdapterRef]
) -> tuple[AdapterRef, ...]:
    """The adapters of a file's song, found among those `given` by their contents, else by name.

    Each is applied at the strength it had then, unless a strength was given. Given adapters that
    were not applied then are added.

    Raises:
        StudioError: `settings-need-adapter`; those of `adapter_files.inspect`.
    """
    left = [(adapter_files.inspect(ref.file, ref.config), ref) for ref in given]
    found = []
    for then in settings["adapters"]:
        same = [pair for pair in left if pair[0].sha256 == then["sha256"]]
        same += [pair for pair in left if pair[0].name == then["name"]]
        if not same:
            raise StudioError("settings-need-adapter", names=then["name"])
        left.remove(same[0])
        ref = same[0][1]
        changes = {} if "strength" in ref.model_fields_set else {"strength": then["strength"]}
        found.append(ref.model_copy(update=changes))
    return (*found, *(ref for _, ref in left))


def differences(settings: Mapping[str, Any], take: Take) -> list[str]:
    """A sentence for everything that can make the samples differ; none if nothing can.

    Args:
        settings: of the file, from `settings.read_settings`.
        take: what was made of them here.
    """
    found = []
    for part in ("model", "planner"):
        then, now = settings.get(part) or {}, getattr(take, part)
        if then and now is None:
            found.append(f"The file was made with the planner {then['name']}; there is none here.")
        elif now is not None and then.get("sha256") != now.sha256:
            name = then["name"] if then else "no planner"
            found.append(f"The file was made with {name}; {now.name} here has other weights.")
    then, now = settings["device"], take.device.model_dump()
    found += [
        f"The file was made with {name} {then[name]}; here it is {now[name]}."
        for name in ("kind", "dtype", "threads", "torch")
        if then[name] != now[name]
    ]
    if (code := then.get("implementation", "reference")) != now["implementation"]:
        found.append(
            f"The file was made with the transformer's {code} implementation; here it is the"
            f" {now['implementation']} one."
        )
    found += _plan_differences(settings.get("memory_plan") or {}, take.memory_plan)
    if settings["edition"] != take.edition:
        found.append(
            f"The file follows edition {settings['edition']} of the rules, and this song edition"
            f" {take.edition}."
        )
    found += [
        f"The {field} is not the file that was used then."
        for field, sha256 in settings["files"].items()
        if take.files.get(field) != sha256
    ]
    return found + _adapter_differences(settings["adapters"], take.adapters)


def _plan_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two plans makes samples differ; where a model waits does not."""
    found = []
    if then and now and then.get("precision") != now["precision"]:
        found.append(
            f"The file was made with {then.get('precision')} weights; here they are"
            f" {now['precision']}."
        )
    if then and now and then.get("tile") != now["tile"]:
        found.append(
            f"The file was decoded {then.get('tile')} frames at a time; here it is {now['tile']}."
        )
    return found


def _adapter_differences(
    then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]
) -> list[str]:
    before, here = ({each["sha256"]: each for each in side} for side in (then, now))
    found = [
        f"The adapter {each['name']} was applied at {each['strength']:g} then, and is not here."
        for sha256, each in before.items()
        if sha256 not in here
    ]
    for sha256, each in here.items():
        if sha256 not in before:
            found.append(f"The adapter {each['name']} is applied here, and was not then.")
        elif each["strength"] != before[sha256]["strength"]:
            strength = before[sha256]["strength"]
            found.append(
                f"The adapter {each['name']} was applied at {strength:g} then;"
                f" here at {each['strength']:g}."
            )
    return found


def sound_file(result: Take | ExportedFiles) -> Path:
    """The audio file of a take, or the first of the exported files."""
    return Path(result.path if isinstance(result, Take) else result.paths[0])


def compare(path: Path, result: Take | ExportedFiles) -> str:
    """One sentence on how the sound in the file at `path` compares with `result`.

    Raises:
        StudioError: those of `decode.decode`, except for a file without sound, such as JSON.
    """
    import numpy as np

    if path.suffix.lower() == ".json":
        return "The file holds settings only, so there is no sound to compare with."
    then = decode.decode(path, MAX_S, files.private_folder()).sound
    now = decode.decode(sound_file(result), MAX_S, files.private_folder()).sound
    if then.shape != now.shape:
        lengths = [sound.shape[1] for sound in (then, now)]
        return f"The file holds {lengths[0]} samples, and {lengths[1]} were made."
    difference = float(np.sqrt(np.mean(np.square(then - now, dtype=np.float64))))
    if not difference:
        return "The samples are the same, every one."
    level = float(np.sqrt(np.mean(np.square(then, dtype=np.float64))))
    relative = 20 * math.log10(difference / level) if level else 0.0
    if relative < 0:
        return f"The difference is {-relative:.1f} dB below the song."
    return "It is another song: the difference is as loud as the song itself."
