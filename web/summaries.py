"""What takes, drafts and files say of themselves, as the page tells it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import tooltips as words
from core.results import Draft, ExportedFiles, Take

PLAIN = ("prompt", "lyrics", "source_lyrics", "duration_s", "seed", "thinking")
"""What a caption says anyhow, or leaves to the particulars."""


def caption(take: Take, at_rest: dict[str, Any]) -> str:
    """What tells one take from another: its style; its length, the knobs turned, its seed."""
    return f"{_style(take, 72)}\n{' · '.join(_details(take, at_rest))}"


def title(take: Take, at_rest: dict[str, Any]) -> str:
    """A caption in one short line, with what differs most often first."""
    length, *turned, seed = _details(take, at_rest)
    return _short(" · ".join((_style(take, 24), seed, length, *turned)), 64)


def _details(take: Take, at_rest: dict[str, Any]) -> list[str]:
    told = [f"{take.duration_s:g} s"]
    for param in take.to_request().params():
        value = take.request.get(param.name, param.default)
        plain = param.name in PLAIN
        if not plain and value != at_rest.get(param.name, param.default):
            as_shown = words.shown(param, value)
            named = param.name in words.LABELS or param.type is Path
            told.append(as_shown if named else f"{param.label} {as_shown}")
    return [*told, f"seed {take.request.get('seed')}"]


def _style(take: Take, most: int) -> str:
    style = " ".join(str(take.request.get("prompt") or take.plan.get("caption") or "").split())
    return _short(style or words.MODES[take.mode], most)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 2].rstrip(" ,·") + "…"


def particulars(take: Take, unasked: Collection[str] = ()) -> dict[str, dict[str, str]]:
    """What was asked of a take and what made it: headings, each with labels and values.

    `unasked` are knobs that meant nothing to this take.
    """
    asked = {
        words.called(k): words.shown(k, value)
        for k in take.to_request().params()
        if (value := take.request.get(k.name)) not in ("", None, "unknown", [])
        and k.name not in unasked
    }
    model, device = take.model, take.device
    peak = words.NO_SOUND if take.peak_dbfs is None else f"peak {take.peak_dbfs:.1f} dBFS"
    made = {
        "Model": f"{model.name} · {model.revision[:12]}",
        "Source": model.source,
        "Weights": f"sha256 {model.sha256[:16]}",
        "Licence": f"{model.licence} · {words.MAY_SELL[model.may_sell]}",
        "Device": f"{device.name} · {device.dtype}",
        "Sound": f"{take.duration_s:g} s · {take.sample_rate / 1000:g} kHz · {peak}",
        "Times": " · ".join(f"{words.stage(name)} {s:.1f} s" for name, s in take.timings_s.items()),
        "Made": f"{take.made_at:%Y-%m-%d %H:%M} UTC",
    }
    if take.adapters:
        played = (words.ADAPTED.format(**each, short=each["sha256"][:16]) for each in take.adapters)
        made["Adapters"] = "; ".join(played)
    told = {
        words.KEPT: kept(take),
        words.PLANNED.get(take.mode, words.HEARD): planned(take),
        words.AS_RUN: asked,
        words.MADE_WITH: made,
    }
    return {heading: facts for heading, facts in told.items() if facts}


def planned(take: Take) -> dict[str, str]:
    """What the planner wrote, or heard in the source."""
    plan = {
        **take.plan,
        "prompt": take.plan.get("caption"),
        "vocal_language": take.plan.get("language"),
    }
    params = {k.name: k for k in take.to_request().params()}
    told = {
        words.called(params[name]): words.shown(params[name], str(plan[name]))
        for name in ("prompt", "bpm", "keyscale", "timesignature", "vocal_language")
        if plan.get(name) not in ("", None, "unknown")
    }
    return told | ({"Length": f"{plan['duration_s']:g} s"} if plan.get("duration_s") else {})


def kept(take: Take) -> dict[str, str]:
    """What an edit left alone, counted, and how its seams measure."""
    told = {}
    if take.changed_outside is not None:
        told["Outside the region"] = f"{take.changed_outside:,} samples changed"
    for seam in take.seams:
        told[f"Seam at {seam.at_s:.1f} s"] = (
            f"{'good' if seam.good else 'audible'} · against what is beside it: click"
            f" {seam.click:.1f} times, quietest {seam.gap_db:+.1f} dB, loudest {seam.bump_db:+.1f} dB"
        )
    return told


def drafted(draft: Draft) -> dict[str, dict[str, str]]:
    """What was asked of a draft, what came, and what wrote it."""
    model = draft.model
    sections = {
        "Asked for": ", ".join(draft.asked),
        "Written": ", ".join(draft.got),
        "Structure": words.SECTIONS[draft.matches_request],
    }
    made = {
        "Seed": str(draft.request.get("seed")),
        "Model": f"{model.name} · {model.revision[:12]}",
        "Licence": f"{model.licence} · {words.MAY_SELL[model.may_sell]}",
        "Device": f"{draft.device.name} · {draft.device.dtype}",
        "Times": " · ".join(
            f"{words.stage(name)} {s:.1f} s" for name, s in draft.timings_s.items()
        ),
    }
    return {"Sections": sections, words.MADE_WITH: made}


def checked(check: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Rows of a take's own check (`measure.Check`): what, as asked for, as measured."""
    if not check:
        return ()
    tempo, key = check["tempo"], check["key"]
    at = ", ".join(f"{h['length_s']:.1f} s at {words.clock(h['start_s'])}" for h in check["holes"])
    clipped = check["clipped"]
    return (
        ("Tempo", *_compared(tempo, "{:g} bpm")),
        ("Key", *_compared(key, "{}")),
        ("Loudness", "", _level(check["loudness_lufs"], "LUFS")),
        ("True peak", "", _level(check["true_peak_dbtp"], "dBTP")),
        ("Silence within", "", at or words.NONE),
        ("Clipping", "", f"{clipped:,} samples" if clipped else words.NONE),
    )


def _compared(told: dict[str, Any], form: str) -> tuple[str, str]:
    asked = words.OPEN if told["asked"] is None else form.format(told["asked"])
    if told["measured"] is None:
        return asked, words.VERDICTS["not sure"]
    verdict = words.VERDICTS[told["verdict"]]
    return asked, form.format(told["measured"]) + (f", {verdict}" if verdict else "")


def _level(value: float | None, unit: str) -> str:
    return words.NO_SOUND if value is None else f"{value:.1f} {unit}".replace("-", "\u2212")


def made(made: ExportedFiles) -> str:
    """What is to be said of files that were made of a take, in a line."""
    facts, told = made.facts, []
    if made.mode == "master" and facts["before_lufs"] is None:
        told = [words.STAYS_SILENT]
    elif made.mode == "master":
        before, after = (_level(facts[f"{when}_lufs"], "LUFS") for when in ("before", "after"))
        told = [f"{before} before, {after} after", f"gain {facts['gain_db']:+.1f} dB"]
        if facts["reduction_db"] < 0:
            told.append(f"loudest peaks {facts['reduction_db']:.1f} dB")
        told.append(f"true peak {_level(facts['true_peak_dbtp'], 'dBTP')}")
        if not facts["reached"]:
            told.append(words.NOT_REACHED.format(target=_level(facts["target_lufs"], "LUFS")))
    told = [" · ".join(told).replace("-", "\u2212")] if told else []
    return " ".join((*told, *made.notes))
