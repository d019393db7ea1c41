"""Plain-text summaries of takes, drafts and exported files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tooltips
from core.params import Param
from core.results import AdapterInfo, AudioInfo, Draft, ExportedFiles, Take

NOT_IN_CAPTION = ("prompt", "lyrics", "source_lyrics", "duration_s", "seed", "thinking")
"""Parameters that a caption shows anyway, or leaves to the details."""


def caption(take: Take, defaults: Mapping[str, Any]) -> str:
    """Two lines that distinguish one take from another: style; length, changed settings, seed.

    Args:
        defaults: the values a form starts with; they are left out.
    """
    return f"{_style(take, 72)}\n{' · '.join(_differences(take, defaults))}"


def title(take: Take, defaults: Mapping[str, Any]) -> str:
    """A caption in one line of at most 64 characters, with the seed before the settings."""
    length, *changed, seed = _differences(take, defaults)
    return _shorten(" · ".join((_style(take, 24), seed, length, *changed)), 64)


def _differences(take: Take, defaults: Mapping[str, Any]) -> list[str]:
    parts = [f"{take.duration_s:g} s"]
    for param in take.to_request().params():
        value = take.request.get(param.name, param.default)
        if param.name in NOT_IN_CAPTION or value == defaults.get(param.name, param.default):
            continue
        text = display_value(param, value)
        clear = param.name in tooltips.LABELS or param.type is Path
        parts.append(text if clear else f"{param.label} {text}")
    return [*parts, f"seed {take.request.get('seed')}"]


def _style(take: Take, limit: int) -> str:
    style = " ".join(str(take.request.get("prompt") or take.plan.get("caption") or "").split())
    return _shorten(style or tooltips.MODES[take.mode], limit)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 2].rstrip(" ,·") + "…"


def take_details(take: Take, unused: Collection[str] = ()) -> dict[str, dict[str, str]]:
    """The request of a take and how it was made: headings, each with labels and values.

    Args:
        unused: parameters that had no effect on this take; they are left out.
    """
    settings = {
        tooltips.name_of(k): display_value(k, value)
        for k in take.to_request().params()
        if (value := take.request.get(k.name)) not in ("", None, "unknown", [])
        and k.name not in unused
    }
    model, device = take.model, take.device
    peak = tooltips.SILENCE if take.peak_dbfs is None else f"peak {take.peak_dbfs:.1f} dBFS"
    made_with = {
        "Model": f"{model.name} · {model.revision[:12]}",
        "Source": model.source,
        "Weights": f"sha256 {model.sha256[:16]}",
        "Licence": f"{model.licence} · {tooltips.MAY_SELL[model.may_sell]}",
        "Device": f"{device.name} · {device.dtype}",
        "Audio": f"{take.duration_s:g} s · {take.sample_rate / 1000:g} kHz · {peak}",
        "Times": _times(take.timings_s),
        "Date": f"{take.made_at:%Y-%m-%d %H:%M} UTC",
    }
    if take.adapters:
        made_with["Adapters"] = "; ".join(
            tooltips.ADAPTER_USED.format(**each, short=each["sha256"][:16])
            for each in take.adapters
        )
    sections = {
        tooltips.PRESERVED: preserved(take),
        tooltips.PLANNED.get(take.mode, tooltips.DETECTED): plan_details(take),
        tooltips.AS_RUN: settings,
        tooltips.MADE_WITH: made_with,
    }
    return {heading: facts for heading, facts in sections.items() if facts}


def _times(timings_s: Mapping[str, float]) -> str:
    return " · ".join(f"{tooltips.stage_label(name)} {s:.1f} s" for name, s in timings_s.items())


def plan_details(take: Take) -> dict[str, str]:
    """What the planner wrote, or detected in the source."""
    plan = {
        **take.plan,
        "prompt": take.plan.get("caption"),
        "vocal_language": take.plan.get("language"),
    }
    params = {k.name: k for k in take.to_request().params()}
    details = {
        tooltips.name_of(params[name]): display_value(params[name], str(plan[name]))
        for name in ("prompt", "bpm", "keyscale", "timesignature", "vocal_language")
        if plan.get(name) not in ("", None, "unknown")
    }
    return details | ({"Length": f"{plan['duration_s']:g} s"} if plan.get("duration_s") else {})


def preserved(take: Take) -> dict[str, str]:
    """How many samples an edit changed outside its region, and how its seams measure."""
    details = {}
    if take.changed_outside is not None:
        details["Outside the region"] = f"{take.changed_outside:,} samples changed"
    for seam in take.seams:
        details[f"Seam at {seam.at_s:.1f} s"] = (
            f"{'good' if seam.good else 'audible'} · compared with the audio around it: click"
            f" {seam.click:.1f} times as strong, quietest {seam.gap_db:+.1f} dB,"
            f" loudest {seam.bump_db:+.1f} dB"
        )
    return details


def draft_details(draft: Draft) -> dict[str, dict[str, str]]:
    """Which sections a draft has, and what wrote it."""
    model = draft.model
    sections = {
        "Requested": ", ".join(draft.asked),
        "Written": ", ".join(draft.got),
        "Structure": tooltips.SECTIONS[draft.matches_request],
    }
    made_with = {
        "Seed": str(draft.request.get("seed")),
        "Model": f"{model.name} · {model.revision[:12]}",
        "Licence": f"{model.licence} · {tooltips.MAY_SELL[model.may_sell]}",
        "Device": f"{draft.device.name} · {draft.device.dtype}",
        "Times": _times(draft.timings_s),
    }
    return {"Sections": sections, tooltips.MADE_WITH: made_with}


def measurements(check: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Rows of a take's measurements (`audio.analysis.Check`): property, requested, measured."""
    if not check:
        return ()
    silences = ", ".join(
        f"{hole['length_s']:.1f} s at {tooltips.elapsed(hole['start_s'])}"
        for hole in check["holes"]
    )
    clipped = check["clipped"]
    return (
        ("Tempo", *_compared(check["tempo"], "{:g} bpm")),
        ("Key", *_compared(check["key"], "{}")),
        ("Loudness", "", _level(check["loudness_lufs"], "LUFS")),
        ("True peak", "", _level(check["true_peak_dbtp"], "dBTP")),
        ("Silences", "", silences or tooltips.NONE),
        ("Clipping", "", f"{clipped:,} samples" if clipped else tooltips.NONE),
    )


def _compared(found: Mapping[str, Any], form: str) -> tuple[str, str]:
    requested = tooltips.NOT_SET if found["asked"] is None else form.format(found["asked"])
    if found["measured"] is None:
        return requested, tooltips.VERDICTS[found["verdict"]] or tooltips.VERDICTS["not sure"]
    verdict = tooltips.VERDICTS[found["verdict"]]
    return requested, form.format(found["measured"]) + (f" ({verdict})" if verdict else "")


def _level(value: float | None, unit: str) -> str:
    return tooltips.SILENCE if value is None else _minus(f"{value:.1f} {unit}")


def _minus(text: str) -> str:
    """`text` with typographic minus signs."""
    return text.replace("-", "\u2212")


def export_summary(files: ExportedFiles) -> str:
    """What to say about exported files, in one line; empty if there is nothing to say."""
    return " ".join((*_mastered(files), *files.notes))


def _mastered(files: ExportedFiles) -> list[str]:
    if files.mode != "master":
        return []
    facts = files.facts
    if facts["before_lufs"] is None:
        return [tooltips.NOT_MASTERED]
    before, after = (_level(facts[f"{when}_lufs"], "LUFS") for when in ("before", "after"))
    parts = [f"{before} before, {after} after", _minus(f"gain {facts['gain_db']:+.1f} dB")]
    if facts["reduction_db"] < 0:
        parts.append(_minus(f"peaks limited by up to {-facts['reduction_db']:.1f} dB"))
    parts.append(f"true peak {_level(facts['true_peak_dbtp'], 'dBTP')}")
    line = " · ".join(parts) + "."
    if facts["reached"]:
        return [line]
    target = _level(facts["target_lufs"], "LUFS")
    return [line, tooltips.NOT_REACHED.format(target=target)]


def audio_summary(info: AudioInfo) -> str:
    """Length, sample rate and channels of a file, such as "0:42.5 · 44.1 kHz · stereo"."""
    minutes, seconds = divmod(info.seconds, 60)
    channels = {1: "mono", 2: "stereo"}.get(info.channels, f"{info.channels} channels")
    return f"{minutes:.0f}:{seconds:04.1f} · {info.rate / 1000:g} kHz · {channels}"


def adapter_summary(info: AdapterInfo) -> str:
    """Rank, layers and size of an adapter, such as "rank 16 · 192 layers · 12.3 MB"."""
    layers = "1 layer" if info.modules == 1 else f"{info.modules} layers"
    size = (
        f"{info.size_bytes / 1e6:.1f} MB"
        if info.size_bytes >= 1e6
        else f"{math.ceil(info.size_bytes / 1000)} kB"
    )
    return f"rank {info.rank} · {layers} · {size}"


def display_value(param: Param, value: Any) -> str:
    """A parameter's value as a person would write it."""
    if param.choices or param.name in tooltips.CHOICES:
        return tooltips.choice_label(param.name, value)
    if isinstance(value, bool):
        return tooltips.ON if value else tooltips.OFF
    if param.type is Path:
        return Path(value).name
    if param.name == "adapters":
        return ", ".join(f"{Path(each['file']).name} {each['strength']:g}" for each in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text} {param.unit}" if param.unit else text
