"""Songs that start from more than words: codes, a reference, or a source to extend or change.

Each operation takes sound as float32 [2, samples] at 48 kHz and is a generator like the engine's
own: progress, then the piece as its return value. `clean` are the source's latents, where they are
known already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audio import levels, splice
from core.errors import StudioError
from core.requests import EDITION, SAMPLE_RATE, Edit, Generate
from core.results import Progress
from models import acestep, loading, sampler, vae

if TYPE_CHECKING:
    import numpy as np
    import torch


REPAINT = "Repaint the mask area based on the given conditions:"


FROM_CODES = "Generate audio semantic tokens based on the given conditions:"
"""Instructions the transformer was trained on. Source: the authors' task table."""


@dataclass(frozen=True)
class RepaintSettings:
    """How tightly a repaint holds on to what lies outside the region.

    Attributes:
        injection: share of the steps after which the outside is put back, noised as far as due.
        ramp_frames: latent frames outside the region over which both versions are blended.
        fade_s: seconds over which the waveforms are crossfaded at each edge.
    """

    injection: float
    ramp_frames: int
    fade_s: float

    @classmethod
    def of(cls, mode: str, strength: float) -> RepaintSettings:
        """The authors' numbers for "conservative", "balanced" and "aggressive".

        `strength` in 0..1 loosens "balanced" from conservative to aggressive. A crossfade of
        10 ms stays even there, since the outside comes back untouched in every mode.
        """
        loose = {"conservative": 0.0, "balanced": strength, "aggressive": 1.0}[mode]
        hold = 1.0 - loose
        return cls(hold, round(vae.FRAME_RATE * hold), max(0.01, 0.05 * hold))


def text_to_music(
    engine: acestep.Engine,
    song: Generate,
    *,
    codes: Sequence[int] = (),
    timbre: torch.Tensor | None = None,
    edition: int = EDITION,
) -> Iterator[Progress]:
    """A new song that follows the planner's `codes`, or has the sound of `timbre`, or both.

    Codes stand for a fifth of a second each; what they leave open at the end is silence to the
    model, which makes something of it.
    """
    instruction, context = acestep.TEXT_TO_MUSIC, None
    if codes:
        import torch

        with (
            torch.inference_mode(),
            loading.memory_errors(engine.device, engine.model, song.duration_s),
        ):
            context = engine.silence(acestep.frames_for(song.duration_s)).clone()
            drawn = sketch(engine, codes)[:, : context.shape[1]]
            context[:, : drawn.shape[1]] = drawn
            instruction = FROM_CODES
    return (
        yield from engine.text_to_music(
            song, instruction=instruction, context=context, timbre=timbre, edition=edition
        )
    )


def extend(
    engine: acestep.Engine,
    song: Generate,
    source: np.ndarray,
    *,
    before_s: float = 0.0,
    after_s: float = 0.0,
    edition: int = EDITION,
) -> Iterator[Progress]:
    """Go on after the end of `source`, before its beginning, or both.

    The result is longer by exactly what was asked; the source's samples come back bit for bit but
    for a crossfade at its edges.
    """
    import numpy as np

    before, after = (round(s * SAMPLE_RATE) for s in (before_s, after_s))
    padded = np.pad(source, ((0, 0), (before, after)))
    total = padded.shape[1]
    regions = [(0, before), (total - after, total)]
    return repaint(
        engine,
        song,
        padded,
        [(a, b) for a, b in regions if b > a],
        RepaintSettings.of("conservative", 0.0),
        edition=edition,
    )


def repaint(
    engine: acestep.Engine,
    song: Generate,
    source: np.ndarray,
    regions: list[tuple[int, int]],
    grip: RepaintSettings,
    clean: torch.Tensor | None = None,
    edition: int = EDITION,
) -> Iterator[Progress]:
    """Make what lies inside `regions` (start and end in samples) anew.

    Outside of them, and of the crossfade that lies there, not one sample changes.
    """
    import torch

    with (
        torch.inference_mode(),
        loading.memory_errors(engine.device, engine.model, song.duration_s),
    ):
        if clean is None:
            clean = yield from encode(engine, source)
        frames = clean.shape[1]
        inside = torch.zeros(frames, device=engine.device)
        for start, end in regions:
            first, last = _frames_of(start, end, frames)
            inside[first:last] = 1.0
        shown = torch.where(inside[None, :, None] > 0, engine.silence(frames), clean)
        conditions, notes = engine.conditions(
            song, REPAINT, context=shown, mask=inside, edition=edition
        )
        noise, _ = sampler.draw_noise(song.seed, frames, engine.channels)
        noise = noise.to(engine.device)
        until = round(grip.injection * song.inference_steps)

        def hold(x: torch.Tensor, done: int, t: torch.Tensor) -> torch.Tensor:
            if done > until:
                return x
            due = t * noise + (1 - t) * clean
            return torch.where(inside[None, :, None] > 0, x, due)

        made = yield from engine.denoise(conditions, song, after_step=hold)
        mine = _outside(inside, grip.ramp_frames)[None, :, None]
        made = mine * clean + (1 - mine) * made
        wave = yield from vae.decode(engine.pipe.vae, made)
        made_sound = levels.resample(wave.numpy(), engine.rate, SAMPLE_RATE, source.shape[1])
        sound, fade = source, round(grip.fade_s * SAMPLE_RATE)
        for start, end in regions:
            sound = splice.splice(sound, made_sound, start, end, fade)
        peak = float(abs(sound).max(initial=0.0))
        piece = acestep.RenderedAudio(
            sound=sound, peak_dbfs=20 * math.log10(peak) if peak else None, seed=song.seed
        )
        piece.crossfades = _edges(regions, source.shape[1], fade)
        piece.changed_outside = _changed(source, sound, regions, fade)
        piece.notes = notes
        return piece


def cover(
    engine: acestep.Engine,
    song: Generate,
    source: np.ndarray,
    *,
    strength: float = 1.0,
    noise: float = 0.0,
    timbre: torch.Tensor | None = None,
    clean: torch.Tensor | None = None,
    edition: int = EDITION,
) -> Iterator[Progress]:
    """The song of `source` in another style, and with the sound of `timbre` if there is one.

    Args:
        strength: share of the remaining steps that follow the source's 5 Hz sketch.
        noise: how much of the source itself to start from, 0 (noise alone) to 1.
    """
    import torch

    with (
        torch.inference_mode(),
        loading.memory_errors(engine.device, engine.model, song.duration_s),
    ):
        if clean is None:
            clean = yield from encode(engine, source)
        drawn = sketch(engine, codes_of(engine, clean))[:, : clean.shape[1]]
        conditions, notes = engine.conditions(
            song, FROM_CODES, context=drawn, timbre=timbre, edition=edition
        )
        config, later = sampler.SamplerConfig.of(song), None
        first = sampler.step_at(config, 1.0 - noise) if noise else 0
        switch = sampler.switch_step(config, strength, first, edition)
        if switch < song.inference_steps:
            silence = engine.silence(clean.shape[1])
            later, _ = engine.conditions(song, context=silence, timbre=timbre, edition=edition)
        latents = yield from engine.denoise(
            conditions,
            song,
            then=later,
            switch_step=switch,
            clean=clean if noise else None,
            first_step=first,
        )
        return (yield from _heard(engine, latents, source, song.seed, notes))


def morph(
    engine: acestep.Engine,
    song: Generate,
    source: np.ndarray,
    told: Generate,
    *,
    n_min: float,
    n_max: float,
    n_avg: int,
    clean: torch.Tensor | None = None,
    edition: int = EDITION,
) -> Iterator[Progress]:
    """Carry `source`, described by `told`, to what `song` describes. See `sampler.morph`."""
    import torch

    with (
        torch.inference_mode(),
        loading.memory_errors(engine.device, engine.model, song.duration_s),
    ):
        if clean is None:
            clean = yield from encode(engine, source)
        silence = engine.silence(clean.shape[1])
        was, _ = engine.conditions(told, context=silence, edition=edition)
        becomes, notes = engine.conditions(song, context=silence, edition=edition)
        generator = torch.Generator("cpu").manual_seed(song.seed)
        config = sampler.SamplerConfig.of(song)
        steps = sampler.morph(
            engine.model_under(was),
            engine.model_under(becomes),
            clean,
            config,
            generator,
            n_min=n_min,
            n_max=n_max,
            n_avg=n_avg,
        )
        latents = yield from acestep.as_progress(steps, "Denoising", config.steps)
        return (yield from _heard(engine, latents, source, song.seed, notes))


def _heard(
    engine: acestep.Engine,
    latents: torch.Tensor,
    source: np.ndarray,
    seed: int,
    notes: list[str],
) -> Iterator[Progress]:
    """Latents to a finished piece as long as `source` (returned)."""
    wave = yield from vae.decode(engine.pipe.vae, latents)
    piece = engine.finish(wave, source.shape[1], seed)
    piece.notes[:0] = notes
    return piece


def encode(engine: acestep.Engine, sound: np.ndarray) -> Iterator[Progress]:
    """Sound to latents [1, frames, channels] on the engine's device (returned)."""
    import torch

    samples = math.ceil(sound.shape[1] * engine.rate / SAMPLE_RATE)
    heard = levels.resample(sound, SAMPLE_RATE, engine.rate, samples)
    with torch.inference_mode():
        latents = yield from vae.encode(engine.pipe.vae, torch.from_numpy(heard))
        return latents.to(engine.device)


def codes_of(engine: acestep.Engine, latents: torch.Tensor) -> list[int]:
    """The audio codes of `latents`, five a second: what a planner hears, what a cover keeps.

    Raises:
        StudioError: `codes-missing`.
    """
    import torch

    tokenizer = engine.pipe.audio_tokenizer
    if tokenizer is None:
        raise StudioError("codes-missing", model=engine.model.title)
    with torch.inference_mode():
        _, indices = tokenizer.tokenize(latents.to(tokenizer.dtype), engine.silence(5))
    return indices[0, :, 0].tolist()


def sketch(engine: acestep.Engine, codes: Sequence[int]) -> torch.Tensor:
    """What `codes` say of a song: latents [1, 5 * codes, channels], float32."""
    import torch

    said = torch.tensor([codes], device=engine.device)[..., None]
    quantized = engine.pipe.audio_tokenizer.quantizer.get_output_from_indices(said)
    return engine.pipe.audio_token_detokenizer(quantized).float()


def timbre_of(engine: acestep.Engine, reference: np.ndarray) -> Iterator[Progress]:
    """Thirty seconds of latents that stand for the sound of `reference`; None if it is silent.

    Three windows of 10 s from its beginning, middle and end; a shorter one is repeated. Source:
    the authors' handler, with the middle of each third in place of a random position.
    """
    import numpy as np

    if np.abs(reference).max(initial=0.0) < 10 ** (levels.SILENCE_DBFS / 20):
        return None
    whole, part = 30 * SAMPLE_RATE, 10 * SAMPLE_RATE
    sound = np.tile(reference, (1, math.ceil(whole / reference.shape[1])))
    third = sound.shape[1] // 3
    starts = [i * third + (third - part) // 2 for i in range(3)]
    windows = np.concatenate([sound[:, s : s + part] for s in starts], axis=1)
    return (yield from encode(engine, windows))


def _frames_of(start: int, end: int, frames: int) -> tuple[int, int]:
    """The latent frames that samples start..end touch, at least one, counted in whole numbers."""
    hop = SAMPLE_RATE // vae.FRAME_RATE
    first = min(start // hop, frames - 1)
    return first, max(first + 1, min(-(-end // hop), frames))


def _edges(regions: list[tuple[int, int]], total: int, fade: int) -> list[tuple[int, int]]:
    """Middle and half width of every crossfade, in samples; the ends of a song are none."""
    edges = []
    for start, end in regions:
        edges += [(start - fade // 2, fade // 2)] if start > 0 else []
        edges += [(end + fade // 2, fade // 2)] if end < total else []
    return edges


def _changed(
    source: np.ndarray, sound: np.ndarray, regions: list[tuple[int, int]], fade: int
) -> int:
    """How many samples differ outside of `regions` and `fade` to either side: counted, not hoped."""
    differs = (sound != source).any(axis=0)
    for start, end in regions:
        differs[max(0, start - fade) : end + fade] = False
    return int(differs.sum())


def _outside(inside: torch.Tensor, ramp: int) -> torch.Tensor:
    """How much of the source each frame keeps: 0 inside, rising over `ramp` frames, then 1."""
    import torch

    frames = torch.arange(len(inside), device=inside.device)
    marked = frames[inside > 0]
    away = (frames[:, None] - marked[None]).abs().min(dim=1).values
    return (away / (ramp + 1)).clamp(max=1.0)


def region_of(request: Edit, samples: int) -> tuple[int, int]:
    """First and last sample of a repaint.

    Raises:
        StudioError: `region-outside`, `region-empty`.
    """
    start = round(request.start_s * SAMPLE_RATE)
    end = samples if request.end_s is None else min(samples, round(request.end_s * SAMPLE_RATE))
    if start >= samples:
        raise StudioError("region-outside", start=request.start_s, end=samples / SAMPLE_RATE)
    if end <= start:
        raise StudioError("region-empty", start=request.start_s, end=end / SAMPLE_RATE)
    return start, end
