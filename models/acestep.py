"""ACE-Step: load a checkpoint, encode conditions, denoise latents, decode them to audio.

Uses diffusers' components with a denoising loop of its own (`models/sampler`). Everything long is
a generator that yields `Progress` and returns its result; closing it stops the work there.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio import levels
from core.errors import StudioError
from core.requests import EDITION, SAMPLE_RATE, Generate, effective_lyrics, lyrics_note
from core.results import Progress
from core.text import describe_length
from models import catalog, checkpoints, sampler, timbre_token
from models.cuda_graph import compiling
from models.fast_transformer import FastTransformer
from models.loading import check_pipeline, is_finite, load_pipeline, memory_errors
from models.placement import move, quantize, reread_encoders
from models.vae import FRAME_RATE, decode, skip_zeros

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AceStepPipeline


TEXT_TO_MUSIC = "Fill the audio semantic mask based on the given conditions:"
"""The instruction for a song from text alone. Source: the authors' task table."""


TEXT_TOKENS, LYRIC_TOKENS = 256, 2048
"""The most tokens that the text encoder reads of the prompt and of the lyrics.

Source: the authors' handler.
"""


TIMBRE_FRAMES = 30 * FRAME_RATE
"""Length of the timbre reference, 30 s; without one, the silence latent takes its place."""


@dataclass(frozen=True)
class Conditions:
    """What the transformer receives besides the noise.

    `cond` and `null` are [1, tokens, width], `context` is [1, frames, channels + mask].
    """

    cond: torch.Tensor
    null: torch.Tensor
    context: torch.Tensor


@dataclass
class RenderedAudio:
    """One finished piece of audio, float32 [2, samples] at 48 kHz, and notes on how it was made.

    Where part of a source was kept, `crossfades` has the middle and half the width of each
    crossfade in samples, and `changed_outside` counts the samples that differ from the source
    outside the regions and their crossfades. `implementation` is the engine's. `latents` and
    `conditions` are what the sound was decoded from and what it was made under; lyrics can be in the
    parts `lyric_regions`, in seconds, or everywhere if there are none.
    """

    sound: np.ndarray
    peak_dbfs: float | None
    seed: int
    implementation: str = "reference"
    notes: list[str] = field(default_factory=list)
    crossfades: list[tuple[int, int]] = field(default_factory=list)
    changed_outside: int | None = None
    latents: torch.Tensor | None = None
    conditions: Conditions | None = None
    lyric_regions: tuple[tuple[float, float], ...] = ()


def prompt_text(
    caption: str,
    *,
    bpm: int | None,
    timesignature: str,
    keyscale: str,
    duration_s: float,
    instruction: str = TEXT_TO_MUSIC,
) -> str:
    """The prompt in the exact format the text encoder was trained on.

    Source: the authors' handler (`SFT_GEN_PROMPT` and its metadata string).
    """
    return (
        f"# Instruction\n{instruction}\n\n# Caption\n{caption}\n\n# Metas\n"
        f"- bpm: {bpm or 'N/A'}\n- timesignature: {timesignature or 'N/A'}\n"
        f"- keyscale: {keyscale or 'N/A'}\n- duration: {int(duration_s)} seconds\n<|endoftext|>\n"
    )


def lyric_text(lyrics: str, language: str) -> str:
    """The lyrics in the exact format the lyric encoder was trained on. Source: as `prompt_text`."""
    return f"# Languages\n{language}\n\n# Lyric\n{lyrics}<|endoftext|>"


def frames_for(duration_s: float) -> int:
    """Latent frames for `duration_s`, rounded up to the transformer's patch of two."""
    frames = math.ceil(round(duration_s * FRAME_RATE, 6))
    return frames + frames % 2


class Engine:
    """One loaded checkpoint on one device. Not thread-safe: one song at a time."""

    def __init__(
        self, pipe: AceStepPipeline, model: catalog.Model, device: str, fast: bool | None = None
    ) -> None:
        """See `load`. `pipe` is changed in place where `fast`."""
        self.pipe = pipe
        self.model = model
        self.device = device
        self.dtype = pipe.transformer.dtype
        self.rate = pipe.vae.config.sampling_rate
        self.channels = pipe.transformer.config.audio_acoustic_hidden_dim
        fast = device == "cuda" if fast is None else fast
        self.fast = FastTransformer(pipe.transformer) if fast else None
        self.tile: int | None = None
        self._silence = pipe.condition_encoder.silence_latent
        self.encoders: Callable[[], AbstractContextManager[Any]] = partial(
            nullcontext, pipe.condition_encoder
        )

    @classmethod
    def load(
        cls,
        model: catalog.Model,
        folder: Path,
        device: str,
        dtype: str,
        fast: bool | None = None,
        compiled: bool | None = None,
        *,
        quantized: str = "",
        offload: str = "none",
        tile: int | None = None,
    ) -> Generator[Progress, None, Engine]:
        """Load `model` from `folder` and check that it is complete.

        Args:
            device: "cpu", "cuda", "mps" or "xpu".
            dtype: of the transformer, "float32" or "bfloat16". On an accelerator the other parts
                use it too; on a CPU they stay float32.
            fast: whether the transformer computes by `models/fast_transformer`, which is equal to
                diffusers' way up to rounding. On CUDA if None; elsewhere samples stay the same
                bit for bit.
            compiled: whether to compile the layers of the fast transformer, only on CUDA; as
                `cuda_graph.compiling` says if None.
            quantized: "int8" or "fp8" for such weights in the transformer's layers, which are then
                computed in `dtype`.
            offload: "encoders" or "blocks"; see `placement.move`.
            tile: latent frames that the VAE decodes at a time.

        Returns:
            The engine (as the generator's return value).

        Raises:
            StudioError: `model-broken`, `model-mismatch`, `out-of-memory`.
        """
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        gc.freeze()  # spares `device.free` from scanning the libraries after every job
        yield Progress(stage="Loading", step=0, steps=3)
        stored = checkpoints.inspect(model, folder)
        yield Progress(stage="Loading", step=1, steps=3)
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        transformer_dtype = getattr(torch, dtype)
        default = torch.float32 if device == "cpu" else transformer_dtype
        with memory_errors(device, model, 0.0):
            # bfloat16 is what the files hold: a float32 copy of XL would be 17 GB.
            stored_dtype = torch.bfloat16 if quantized else transformer_dtype
            pipe = load_pipeline(model, folder, stored_dtype, default)
            yield Progress(stage="Loading", step=2, steps=3)
            check_pipeline(model, pipe, stored)
            skip_zeros(pipe.vae)
            if quantized:
                quantize(pipe.transformer, quantized, transformer_dtype)
            layers = move(pipe, device, offload)
        yield Progress(stage="Loading", step=3, steps=3)
        engine = cls(pipe, model, device, fast)
        engine.tile = tile
        if layers and engine.fast:
            engine.fast.resident = layers.resident
        if reread := reread_encoders(pipe, device, offload, model, folder, default):
            engine.encoders = reread.loaded
        compiled = compiling() if compiled is None else compiled
        if compiled and engine.fast and device == "cuda":
            engine.fast.compile()
        return engine

    @property
    def implementation(self) -> str:
        """Which code computes the transformer, for a take: samples of two are not bit-equal."""
        return self.fast.implementation if self.fast else "reference"

    def text_to_music(
        self,
        song: Generate,
        *,
        instruction: str = TEXT_TO_MUSIC,
        context: torch.Tensor | None = None,
        timbre: torch.Tensor | None = None,
        edition: int = EDITION,
    ) -> Generator[Progress, None, RenderedAudio]:
        """Make a piece from text, and from what else the model is given; see `conditions`.

        Args:
            song: a request whose seed, steps, guidance and shift are resolved.

        Returns:
            The piece (as the generator's return value).
        """
        import torch

        with torch.inference_mode(), memory_errors(self.device, self.model, song.duration_s):
            yield Progress(stage="Reading the words", step=0, steps=1)
            conditions, notes = self.conditions(
                song, instruction, context=context, timbre=timbre, edition=edition
            )
            latents = yield from self.denoise(conditions, song)
            wave = yield from self.decode(latents)
            piece = self.finish(wave, round(song.duration_s * SAMPLE_RATE), song.seed)
            piece.notes[:0] = notes
            piece.latents, piece.conditions = latents, conditions
            return piece

    def conditions(
        self,
        song: Generate,
        instruction: str = TEXT_TO_MUSIC,
        *,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        timbre: torch.Tensor | None = None,
        edition: int = EDITION,
    ) -> tuple[Conditions, list[str]]:
        """Encode text, lyrics and metadata. Also returns notes on what was shortened to fit.

        Args:
            context: source latents [1, frames, channels]; silence of the song's length if None.
            mask: float [frames], 1 where new audio is wanted; everywhere if None.
            timbre: latents [1, frames, channels] of the reference audio; silence if None.
            edition: see `core.requests.EDITION`. Edition 1 reads empty lyrics as they stand and
                leaves out the timbre token of XL.

        Raises:
            StudioError: `lyrics-too-long`.
        """
        import torch

        pipe, notes = self.pipe, []
        caption, cut = self._fit_caption(song, instruction)
        if cut:
            notes.append(
                f"The style was cut to its first {describe_length(caption)}: more would have "
                "pushed tempo, key and length out of what the model reads."
            )
        if note := lyrics_note(song, edition):
            notes.append(note)
        lyrics = effective_lyrics(song, edition)
        text_ids = self._tokens(_prompt_of(song, caption, instruction))
        lyric_ids = self._tokens(lyric_text(lyrics, song.vocal_language))
        if lyric_ids.shape[1] > LYRIC_TOKENS:
            raise StudioError(
                "lyrics-too-long",
                tokens=lyric_ids.shape[1],
                limit=LYRIC_TOKENS,
                length=describe_length(lyrics, 0.95 * LYRIC_TOKENS / lyric_ids.shape[1]),
            )
        if context is None:
            context = self.silence(frames_for(song.duration_s))
        if mask is None:
            mask = torch.ones(context.shape[1])
        mask = mask.to(context)[None, :, None].expand(-1, -1, self.channels)
        with_token = edition >= 2 and timbre_token.has_token(pipe.transformer.config)
        with self.encoders() as encoder:
            timbre_encoder = encoder.timbre_encoder
            with timbre_token.prepended(timbre_encoder) if with_token else nullcontext():
                cond, _ = encoder(
                    text_hidden_states=pipe.text_encoder(input_ids=text_ids).last_hidden_state,
                    text_attention_mask=torch.ones_like(text_ids, dtype=torch.bool),
                    lyric_hidden_states=pipe.text_encoder.get_input_embeddings()(lyric_ids),
                    lyric_attention_mask=torch.ones_like(lyric_ids, dtype=torch.bool),
                    refer_audio_acoustic_hidden_states_packed=(
                        self.silence(TIMBRE_FRAMES) if timbre is None else timbre
                    ),
                    refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=self.device),
                )
            null = encoder.null_condition_emb.expand_as(cond).to(self.dtype)
        conditions = Conditions(
            cond=cond.to(self.dtype),
            null=null,
            context=torch.cat([context, mask], -1).to(self.dtype),
        )
        return conditions, notes

    def denoise(
        self,
        conditions: Conditions,
        song: Generate,
        *,
        then: Conditions | None = None,
        switch_step: int = 0,
        after_step: sampler.AfterStep | None = None,
        clean: torch.Tensor | None = None,
        first_step: int = 0,
    ) -> Generator[Progress, None, torch.Tensor]:
        """Denoise the noise of the song's seed to latents, float32 [1, frames, channels].

        Args:
            then, switch_step: conditions that replace the first ones after `switch_step` steps.
            after_step: may put known latents back after each step; see `sampler.sample`.
            clean, first_step: latents to begin from, noised to the time of `first_step`, instead
                of noise alone.

        Returns:
            The latents (as the generator's return value).

        Raises:
            StudioError: `sound-not-finite`.
        """
        config = sampler.SamplerConfig.of(song)
        noise, generator = sampler.draw_noise(song.seed, conditions.context.shape[1], self.channels)
        times = sampler.schedule(config.steps, config.shift)
        x = noise.to(self.device)
        if clean is not None:
            x = times[first_step] * x + (1 - times[first_step]) * clean
        model = self._sampled_model(conditions, config)
        if then is not None:
            before, after = model, self._sampled_model(then, config)
            until = float(times[switch_step])

            def model(x: torch.Tensor, t: float, guided: bool) -> sampler.Velocity:
                return (before if t > until else after)(x, t, guided)

        steps = sampler.sample(
            model, x, config, generator, first_step=first_step, after_step=after_step
        )
        latents = yield from as_progress(steps, "Denoising", config.steps, self.device)
        if not is_finite(latents):
            raise StudioError("sound-not-finite", model=self.model.title)
        return latents

    def _sampled_model(
        self, conditions: Conditions, config: sampler.SamplerConfig
    ) -> sampler.VelocityModel:
        model = self.conditioned_model(conditions)
        return sampler.Preview(model, config) if config.preview else model

    def conditioned_model(self, conditions: Conditions) -> sampler.VelocityModel:
        """The transformer with `conditions` bound, in the form the sampler calls."""
        import torch

        cond, null, context = conditions.cond, conditions.null, conditions.context
        fast = self.fast
        if fast:
            constants = fast.prepare(cond, null, context.shape[1])
            pair = constants.placeholder.expand(2, -1, -1)
        else:
            pair = torch.cat([cond, null])

        def evaluate(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            rows = len(timestep)
            if fast:
                fast.bind(constants)
            transformer = fast or self.pipe.transformer
            (out,) = transformer(
                hidden_states=x.to(self.dtype).expand(rows, -1, -1),
                timestep=timestep,
                timestep_r=timestep,
                encoder_hidden_states=pair[:rows],
                context_latents=context.expand(rows, -1, -1),
                return_dict=False,
            )
            return out.float()

        steps = {rows: fast.step(evaluate) if fast else evaluate for rows in (1, 2)}

        def velocity(x: torch.Tensor, t: float, guided: bool) -> sampler.Velocity:
            rows = 2 if guided else 1
            out = steps[rows](x, torch.full((rows,), t, device=self.device, dtype=self.dtype))
            return sampler.Velocity(out[:1], out[1:] if guided else None)

        return velocity

    def decode(self, latents: torch.Tensor) -> Generator[Progress, None, torch.Tensor]:
        """Decode latents to audio; see `vae.decode`."""
        return (yield from decode(self.pipe.vae, latents, self.tile))

    def finish(self, wave: torch.Tensor, samples: int, seed: int) -> RenderedAudio:
        """Resample to 48 kHz, cut to `samples` and set the level."""
        sound = levels.resample(wave.numpy(), self.rate, SAMPLE_RATE, samples)
        sound, peak = levels.normalize_peak(sound)
        piece = RenderedAudio(
            sound=sound, peak_dbfs=peak, seed=seed, implementation=self.implementation
        )
        if peak is None or peak < levels.SILENCE_DBFS:
            piece.notes.append("This take is almost silent; try another seed.")
        return piece

    def silence(self, frames: int) -> torch.Tensor:
        """The silence latent [1, frames, channels], repeated if the song is longer."""
        silence = self._silence
        if frames > silence.shape[1]:
            silence = silence.repeat(1, math.ceil(frames / silence.shape[1]), 1)
        return silence[:, :frames]

    def _tokens(self, text: str) -> torch.Tensor:
        return self.pipe.tokenizer([text], return_tensors="pt").input_ids.to(self.device)

    def _fit_caption(self, song: Generate, instruction: str) -> tuple[str, bool]:
        """The longest beginning of the style, cut at a word, that leaves room for the metadata.

        Also returns whether anything was cut.
        """

        def fits(caption: str) -> bool:
            return self._tokens(_prompt_of(song, caption, instruction)).shape[1] <= TEXT_TOKENS

        caption = song.prompt.strip()
        if fits(caption):
            return caption, False
        low, high = 0, len(caption)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(caption[:middle]) else (low, middle - 1)
        kept = caption[:low]
        if not caption[low].isspace():
            words = re.match(r".*\s", kept, re.DOTALL)
            kept = words.group() if words else kept
        return kept.strip(), True


def _prompt_of(song: Generate, caption: str, instruction: str) -> str:
    return prompt_text(
        caption,
        instruction=instruction,
        bpm=song.bpm,
        timesignature=song.timesignature,
        keyscale=song.keyscale,
        duration_s=song.duration_s,
    )


def as_progress(
    steps: Generator[int, None, torch.Tensor], stage: str, total: int, device: str = "cpu"
) -> Generator[Progress, None, torch.Tensor]:
    """Report step numbers as `Progress` of `stage`, and return what the steps return.

    On an accelerator Python only queues a step's work. Here it waits until the step before has
    been computed: the queue never runs dry, and progress and Stop are at most one step off.
    """
    wait = _waiter(device)
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value
        wait()
        yield Progress(stage=stage, step=done, steps=total)


def _waiter(device: str) -> Callable[[], None]:
    """A function that waits for all that `device` was given before the call before."""
    import torch

    if device == "mps":  # its events cannot be waited for one by one
        return torch.mps.synchronize
    if device == "cpu":
        return lambda: None
    previous: list[torch.Event] = []

    def wait() -> None:
        event = torch.Event(device, blocking=True)
        event.record()
        if previous:
            previous.pop().synchronize()
        previous.append(event)

    return wait
