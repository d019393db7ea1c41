"""The planner's share of a job: to plan and compose a new piece, or to listen to what came in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import grammar
import measure
import residents
from jobs import Job, lyrics_of, sung, wanted
from song import Edit, Event, Generate, Idea, Progress

if TYPE_CHECKING:
    import numpy as np

    from planner import Dice

TEMPERATURE = 0.85
"""At which the planner talks where no knob says otherwise. Source: the authors' default."""


@dataclass
class Thoughts:
    """What a piece is to be once everything is known.

    `song` is what the engine reads; `told` describes the source of a morph.
    """

    song: Generate
    told: Generate
    plan: grammar.Plan = field(default_factory=grammar.Plan)
    codes: list[int] = field(default_factory=list)


def think(job: Job, sounds: dict[str, np.ndarray]) -> Iterator[Progress]:
    """Let the planner write or listen, and fill in what the request left open (returns `Thoughts`).

    What a person set stays. A style that was given is only rewritten where the piece is new.
    """
    request = job.request
    song = sung(request, job.duration_s)
    thoughts = Thoughts(song, song)
    if isinstance(request, Edit):
        thoughts.told = song.model_copy(
            update={"prompt": request.source_prompt, "lyrics": request.source_lyrics}
        )
    if job.planner is None:
        return thoughts
    if isinstance(request, Generate):
        yield from _plan(job, thoughts)
        return thoughts
    from planner import Dice

    plan = yield from _listen(job, sounds, Dice.of(request))
    thoughts.plan = kept = plan
    if song.prompt.strip() or not request.use_cot_caption:
        kept = replace(kept, caption=None)
    thoughts.song, _ = grammar.fill(song, kept)
    if isinstance(request, Edit):
        style = thoughts.told.prompt.strip() or thoughts.plan.caption or ""
        filled, _ = grammar.fill(thoughts.told, replace(thoughts.plan, caption=None))
        thoughts.told = filled.model_copy(update={"prompt": style})
    return thoughts


def _plan(job: Job, thoughts: Thoughts) -> Iterator[Progress]:
    """Plan a new piece, and compose its codes if the request wants them."""
    from planner import Dice

    request, song = job.request, thoughts.song
    lyrics, dice = lyrics_of(request), Dice.of(request)
    planner = yield from residents.planner(job)
    given = grammar.given_by(request, job.duration_s)
    plan = yield from planner.plan(
        request.prompt, lyrics, wanted(request), given, dice, request.seed
    )
    thoughts.plan = plan
    thoughts.song, _ = grammar.fill(song, plan)
    if request.thinking:
        (thoughts.codes,) = yield from planner.compose(
            request.prompt,
            lyrics,
            plan,
            job.duration_s,
            dice,
            [request.seed],
            request.lm_cfg_scale,
            request.lm_negative_prompt,
        )


def _listen(job: Job, sounds: dict[str, np.ndarray], dice: Dice) -> Iterator[Progress]:
    """Hear what the source is, or the reference where there is no source; returns its `Plan`."""
    import edits

    name = "source" if "source" in sounds else "reference"
    engine = yield from residents.engine(job)
    clean = yield from residents.encoded(job, engine, name, sounds, edits.encode)
    codes = edits.codes_of(engine, clean)
    del engine, clean
    planner = yield from residents.planner(job)
    plan, _ = yield from planner.understand(
        codes, dice, job.request.seed, lyrics=False, wanted=wanted(job.request)
    )
    return replace(plan, bpm=_steadied(plan.bpm, *measure.tempo(sounds[name])))


def _steadied(heard: int | None, measured: float | None, sure: bool) -> int | None:
    """The tempo heard, corrected by the one measured where the measuring is sure of itself.

    What is heard decides between a tempo, its double and its half: those measure alike.
    """
    if heard is None or measured is None or not sure:
        return heard
    alike = [bpm for bpm in (measured, 2 * measured, measured / 2) if abs(heard / bpm - 1) < 0.04]
    found = round((alike or [measured])[0])
    return found if 30 <= found <= 300 else heard


def answer(job: Job) -> Iterator[Event]:
    """What the planner alone can tell: an idea for a song, fuller words, or what it hears."""
    from planner import Dice

    request, lyrics, dice = job.request, "", Dice(TEMPERATURE, 1.0, 0)
    if request.mode == "listen":
        plan = yield from _listen(job, {"source": job.sound("source")}, dice)
    else:
        planner = yield from residents.planner(job)
        if request.mode == "inspire":
            plan, lyrics = yield from planner.inspire(
                request.idea,
                request.instrumental,
                dice,
                request.seed,
                request.vocal_language,
                int(job.model.longest_s),
            )
        else:
            spoken = request.vocal_language
            given = {} if spoken == "unknown" else {"language": spoken}
            plan, lyrics = yield from planner.rewrite(
                request.prompt, request.lyrics, given, dice, request.seed, int(job.model.longest_s)
            )
    yield Idea(
        prompt=plan.caption or "",
        lyrics=lyrics,
        bpm=plan.bpm,
        keyscale=plan.keyscale or "",
        timesignature=plan.timesignature or "",
        vocal_language=plan.language or "unknown",
        duration_s=plan.duration_s,
    )
