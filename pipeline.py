"""The music tasks: text to music, cover, extend, repaint and morph.

Each takes sound as float32 [2, samples] at 48 kHz and is a generator of `Progress` that returns the
rendered audio. `clean` are the source's latents where they were computed before, `edition` the rules
to follow (`core.requests.EDITION`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audio import levels, splice
from core.errors import StudioError
from core.params import filled
from core.requests import EDITION, SAMPLE_RATE, Edit, Generate
from core.results import Progress
from models import acestep, loading, sampler, vae
from models.acestep import Engine, RenderedAudio

if TYPE_CHECKING:
    import numpy as np
    import torch


REPAINT = "Repaint the mask area based on the given conditions:"
FROM_CODES = "Generate audio semantic tokens based on the given conditions:"
EXTRACT = "Extract the {tracks} track from the audio:"
ADD_TRACK = "Generate the {tracks} track based on the audio context:"
ACCOMPANY, ACCOMPANY_FREELY = "Complete the input track with {tracks}:", "Complete the input track:"
"""Instructions that the transformer was trained with. Source: the authors' task table."""


@dataclass(frozen=True)
class RepaintSettings:
    """How closely a repaint follows the source outside the region.

    Attributes:
        injection: share of the steps after which the source is put back outside the region, with
            the noise of that step.
        ramp_frames: latent frames outside the region over which both versions are blended.
        fade_s: seconds over which the waveforms are crossfaded at each edge.
    """

    injection: float
    ramp_frames: int
    fade_s: float

    @classmethod
    def of(cls, mode: str, strength: float) -> RepaintSettings:
        """The authors' numbers for "conservative", "balanced" and "aggressive".

        Args:
            strength: 0 to 1; moves "balanced" from conservative to aggressive. Even there a
                crossfade of 10 ms stays, since in every mode the outside is the source itself.
        """
        freedom = {"conservative": 0.0, "balanced": strength, "aggressive": 1.0}[mode]
        hold = 1.0 - freedom
        return cls(hold, round(vae.FRAME_RATE * hold), max(0.01, 0.05 * hold))


def text_to_music(
    engine: Engine,
    song: Generate,
    *,
    codes: Sequence[int] = (),
    timbre: torch.Tensor | None = None,
    edition: int = EDITION,
) -> Generator[Progress, None, RenderedAudio]:
    """A new song from words.

    Args:
        codes: the planner's, each for a fifth of a second. Where they end before the song does, the
            model continues freely.
        timbre: latents of a reference, from `encode_timbre`.

    Raises:
        StudioError: `lyrics-too-long`, `out-of-memory`, `sound-not-finite`.
    """
    instruction, context = acestep.TEXT_TO_MUSIC, None
    if codes:
        import torch

        with (
            torch.inference_mode(),
            loading.memory_errors(engine.device, engine.model, song.duration_s),
        ):
            context = engine.silence(acestep.frames_for(song.duration_s)).clone()
            decoded = decode_codes(engine, codes)[:, : context.shape[1]]
            context[:, : decoded.shape[1]] = decoded
            instruction = FROM_CODES
    return (
        yield from engine.text_to_music(
            song, instruction=instruction, context=context, timbre=timbre, edition=edition
        )
    )


def extend(
    engine: Engine,
    song: Generate,
    source: np.ndarray,
    *,
    before_s: float = 0.0,
    after_s: float = 0.0,
    edition: int = EDITION,
) -> Generator[Progress, None, RenderedAudio]:
    """Continue `source` after its end, before its beginning, or both.

    The result is longer by exactly `before_s` and `after_s`. The source's samples stay bit for bit,
    but for a crossfade at each edge.

    Raises:
        StudioError: as `text_to_music`.
    """
    import numpy as np

    before, after = (round(s * SAMPLE_RATE) for s in (before_s, after_s))
    padded = np.pad(source, ((0, 0), (before, after)))
    total = padded.shape[1]
    regions = [(a, b) for a, b in ((0, before), (total - after, total)) if b > a]
    settings = RepaintSettings.of("conservative", 0.0)
    ceiling = levels.CEILING if edition >= 2 else 1.0
    audio = yield from repaint(
        engine, song, padded, regions, settings, edition=edition, ceiling=ceiling
    )
    audio.lyric_regions = tuple((a / SAMPLE_RATE, b / SAMPLE_RATE) for a, b in regions)
    if note := levels.note_above_ceiling(source):
        audio.notes.append(note)
    return audio


def repaint(
    engine: Engine,
    song: Generate,
    source: np.ndarray,
    regions: list[tuple[int, int]],
    settings: RepaintSettings,
    clean: torch.Tensor | None = None,
    edition: int = EDITION,
    ceiling: float = 1.0,
    track: str = "",
) -> Generator[Progress, None, RenderedAudio]:
    """Regenerate what lies inside `regions`, given as start and end in samples.

    Outside of them and of the crossfades, which lie outside as well, not one sample changes.

    Args:
        ceiling: the highest sample of what is new, as a share of full scale.
        track: one of `TRACKS`, to be added there to the source, which the transformer then hears
            inside the regions too.

    Raises:
        StudioError: as `text_to_music`.
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
        instruction, context = _track_instruction(ADD_TRACK, [track]), clean
        if not track:
            instruction = REPAINT
            context = torch.where(inside[None, :, None] > 0, engine.silence(frames), clean)
        conditions, notes = engine.conditions(
            song, instruction, context=context, mask=inside, edition=edition
        )
        noise, _ = sampler.draw_noise(filled(song.seed), frames, engine.channels)
        noise = noise.to(engine.device)
        last_injection = round(settings.injection * filled(song.inference_steps))

        def inject(x: torch.Tensor, done: int, t: torch.Tensor) -> torch.Tensor:
            if done > last_injection:
                return x
            noisy_source = t * noise + (1 - t) * clean
            return torch.where(inside[None, :, None] > 0, x, noisy_source)

        latents = yield from engine.denoise(conditions, song, after_step=inject)
        share = _source_share(inside, settings.ramp_frames)[None, :, None]
        latents = share * clean + (1 - share) * latents
        wave = yield from engine.decode(latents)
        rendered = levels.resample(wave.numpy(), engine.rate, SAMPLE_RATE, source.shape[1])
        sound, fade = source, round(settings.fade_s * SAMPLE_RATE)
        for start, end in regions:
            sound = splice.splice(sound, rendered, start, end, fade, ceiling=ceiling)
        peak = float(abs(sound).max(initial=0.0))
        return RenderedAudio(
            sound=sound,
            peak_dbfs=20 * math.log10(peak) if peak else None,
            seed=filled(song.seed),
            implementation=engine.implementation,
            notes=notes,
            crossfades=_crossfades(regions, source.shape[1], fade),
            changed_outside=_changed_outside(source, sound, regions, fade),
            latents=latents,
            conditions=conditions,
        )


def cover(
    engine: Engine,
    song: Generate,
    source: np.ndarray,
    *,
    follow: str = "codes",
    strength: float = 1.0,
    noise: float = 0.0,
    timbre: torch.Tensor | None = None,
    clean: torch.Tensor | None = None,
    edition: int = EDITION,
) -> Generator[Progress, None, RenderedAudio]:
    """The song of `source` in another style, with the timbre of a reference if there is one.

    Args:
        follow: "codes", the source's melody and rhythm as its audio codes hold them; or "latents",
            the recording itself, which is closer.
        strength: share of the steps that follow the source: of those that remain after
            `noise`, or of all in edition 1.
        noise: how much of the source itself to start from, 0 (noise alone) to 1.
        timbre: latents of a reference, from `encode_timbre`.

    Raises:
        StudioError: as `text_to_music`; `codes-missing`.
    """
    import torch

    with (
        torch.inference_mode(),
        loading.memory_errors(engine.device, engine.model, song.duration_s),
    ):
        if clean is None:
            clean = yield from encode(engine, source)
        context = clean
        if follow == "codes":
            context = decode_codes(engine, extract_codes(engine, clean))[:, : clean.shape[1]]
        conditions, notes = engine.conditions(
            song, FROM_CODES, context=context, timbre=timbre, edition=edition
        )
        config, free = sampler.SamplerConfig.of(song), None
        first = sampler.step_at(config, 1.0 - noise) if noise else 0
        switch = sampler.switch_step(config, strength, first, edition)
        if switch < config.steps:
            silence = engine.silence(clean.shape[1])
            free, _ = engine.conditions(song, context=silence, timbre=timbre, edition=edition)
        latents = yield from engine.denoise(
            conditions,
            song,
            then=free,
            switch_step=switch,
            clean=clean if noise else None,
            first_step=first,
        )
        return (yield from _finish(engine, latents, conditions, source, filled(song.seed), notes))


def extract(
    engine: Engine,
    song: Generate,
    source: np.ndarray,
    track: str,
    clean: torch.Tensor | None = None,
) -> Generator[Progress, None, RenderedAudio]:
    """One of `TRACKS` out of `source`, as long as it.

    Raises:
        StudioError: as `text_to_music`.
    """
    return (yield from _with_source(engine, song, source, EXTRACT, [track], clean))


def accompany(
    engine: Engine,
    song: Generate,
    source: np.ndarray,
    tracks: Sequence[str] = (),
    clean: torch.Tensor | None = None,
) -> Generator[Progress, None, RenderedAudio]:
    """A whole song around `source`, such as a voice alone, as long as it.

    Args:
        tracks: those of `TRACKS` to accompany it with; the model chooses if there are none.

    Raises:
        StudioError: as `text_to_music`.
    """
    instruction = ACCOMPANY if tracks else ACCOMPANY_FREELY
    return (yield from _with_source(engine, song, source, instruction, tracks, clean))


def _with_source(
    engine: Engine,
    song: Generate,
    source: np.ndarray,
    instruction: str,
    tracks: Sequence[str],
    clean: torch.Tensor | None,
) -> Generator[Progress, None, RenderedAudio]:
    """A song made while the transformer hears all of `source`, without a mask.

    Source: the authors' rule for these tasks (the latents of the file as context, a mask of ones).
    """
    import torch

    with (
        torch.inference_mode(),
        loading.memory_errors(engine.device, engine.model, song.duration_s),
    ):
        if clean is None:
            clean = yield from encode(engine, source)
        conditions, notes = engine.conditions(
            song, _track_instruction(instruction, tracks), context=clean
        )
        latents = yield from engine.denoise(conditions, song)
        return (yield from _finish(engine, latents, conditions, source, filled(song.seed), notes))


def _track_instruction(instruction: str, tracks: Sequence[str]) -> str:
    """The instruction with its tracks, in capitals and separated as the authors do."""
    return instruction.format(tracks=" | ".join(track.upper() for track in tracks))


def morph(
    engine: Engine,
    song: Generate,
    source: np.ndarray,
    source_description: Generate,
    *,
    n_min: float,
    n_max: float,
    n_avg: int,
    clean: torch.Tensor | None = None,
    edition: int = EDITION,
) -> Generator[Progress, None, RenderedAudio]:
    """Move `source`, described by `source_description`, towards what `song` describes.

    Args:
        n_min, n_max, n_avg: see `sampler.morph`.

    Raises:
        StudioError: as `text_to_music`.
    """
    import torch

    with (
        torch.inference_mode(),
        loading.memory_errors(engine.device, engine.model, song.duration_s),
    ):
        if clean is None:
            clean = yield from encode(engine, source)
        silence = engine.silence(clean.shape[1])
        before, _ = engine.conditions(source_description, context=silence, edition=edition)
        after, notes = engine.conditions(song, context=silence, edition=edition)
        generator = torch.Generator("cpu").manual_seed(filled(song.seed))
        config = sampler.SamplerConfig.of(song)
        steps = sampler.morph(
            engine.conditioned_model(before),
            engine.conditioned_model(after),
            clean,
            config,
            generator,
            n_min=n_min,
            n_max=n_max,
            n_avg=n_avg,
        )
        latents = yield from acestep.as_progress(steps, "Denoising", config.steps, engine.device)
        return (yield from _finish(engine, latents, after, source, filled(song.seed), notes))


def _finish(
    engine: Engine,
    latents: torch.Tensor,
    conditions: acestep.Conditions,
    source: np.ndarray,
    seed: int,
    notes: list[str],
) -> Generator[Progress, None, RenderedAudio]:
    """Decode `latents` to finished audio as long as `source`."""
    wave = yield from engine.decode(latents)
    rendered = engine.finish(wave, source.shape[1], seed)
    rendered.notes[:0] = notes
    rendered.latents, rendered.conditions = latents, conditions
    return rendered


def encode(engine: Engine, sound: np.ndarray) -> Generator[Progress, None, torch.Tensor]:
    """Sound to latents [1, frames, channels] on the engine's device."""
    import torch

    samples = math.ceil(sound.shape[1] * engine.rate / SAMPLE_RATE)
    resampled = levels.resample(sound, SAMPLE_RATE, engine.rate, samples)
    with torch.inference_mode():
        latents = yield from vae.encode(engine.pipe.vae, torch.from_numpy(resampled), engine.tile)
        return latents.to(engine.device)


def encode_timbre(
    engine: Engine, reference: np.ndarray
) -> Generator[Progress, None, torch.Tensor | None]:
    """Thirty seconds of latents that stand for the timbre of `reference`; None if it is silent.

    Three windows of 10 s from its beginning, middle and end; a shorter file is repeated. Source:
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


def extract_codes(engine: Engine, latents: torch.Tensor) -> list[int]:
    """The audio codes of `latents`, five a second: what a planner reads, and a cover keeps.

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


def decode_codes(engine: Engine, codes: Sequence[int]) -> torch.Tensor:
    """Latents of audio codes: [1, 5 * codes, channels], float32."""
    import torch

    indices = torch.tensor([codes], device=engine.device)[..., None]
    quantized = engine.pipe.audio_tokenizer.quantizer.get_output_from_indices(indices)
    return engine.pipe.audio_token_detokenizer(quantized).float()


def region_of(request: Edit, samples: int) -> tuple[int, int]:
    """First and last sample of a repaint in a source of that many samples.

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


def _frames_of(start: int, end: int, frames: int) -> tuple[int, int]:
    """The latent frames that samples start..end touch, at least one, in whole numbers."""
    hop = SAMPLE_RATE // vae.FRAME_RATE
    first = min(start // hop, frames - 1)
    return first, max(first + 1, min(-(-end // hop), frames))


def _crossfades(regions: list[tuple[int, int]], total: int, fade: int) -> list[tuple[int, int]]:
    """Middle and half width of every crossfade, in samples; there is none at a song's ends."""
    edges = []
    for start, end in regions:
        edges += [(start - fade // 2, fade // 2)] if start > 0 else []
        edges += [(end + fade // 2, fade // 2)] if end < total else []
    return edges


def _changed_outside(
    source: np.ndarray, sound: np.ndarray, regions: list[tuple[int, int]], fade: int
) -> int:
    """How many samples differ outside of `regions` and the crossfades beside them."""
    differs = (sound != source).any(axis=0)
    for start, end in regions:
        differs[max(0, start - fade) : end + fade] = False
    return int(differs.sum())


def _source_share(inside: torch.Tensor, ramp: int) -> torch.Tensor:
    """The source's share in each frame: 0 inside, rising over `ramp` frames, then 1."""
    import torch

    frames = torch.arange(len(inside), device=inside.device)
    marked = frames[inside > 0]
    distance = (frames[:, None] - marked[None]).abs().min(dim=1).values
    return (distance / (ramp + 1)).clamp(max=1.0)
