"""MusicGen beside ACE-Step: a piece without words, composed token by token.

The model is transformers' own, the loop over its decoder is ours: progress, stop and draws are in
one place, and the same draws give the tokens that `generate` would give.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from audio import levels
from core.errors import StudioError
from core.requests import SAMPLE_RATE, Musicgen
from core.results import Progress
from models import acestep, checkpoints, loading
from models.catalog import MUSICGEN, MusicgenModel
from models.weights import broken, mismatch

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import MusicgenForConditionalGeneration
    from transformers.cache_utils import Cache


LOADING, COMPOSING, RENDERING = "Loading MusicGen", "Composing", "Decoding the tokens"


WINDOW_S, STRIDE_S = 30, 18
"""Seconds the model was trained to oversee, and how far they move on in a longer piece: the last
12 s are read again, and what follows them is new. Source: audiocraft's defaults."""


TILE_S, OVERLAP_S = 10.0, 0.2
"""Seconds decoded at a time, and those on either side of them that are decoded and thrown away.
What the codec computes above its frame rate sees 3 frames to either side, 0.06 s."""


PULSE_S = 0.05
"""Seconds between two signs of life, at least: between any two of them the work can be stopped."""


UNUSED = (".inited", ".cluster_size", ".embed_avg")
"""Ends of the names of tensors that only training a codec needs."""


def choose(folder: str | Path = "") -> MusicgenModel:
    """MusicGen from the hub, or the copy of it in `folder` if one is named."""
    return replace(MUSICGEN, folder=Path(folder).expanduser().resolve()) if folder else MUSICGEN


class MusicgenEngine:
    """One loaded MusicGen, in float32. Not thread-safe: one piece at a time, from any thread.

    On a GPU the time goes into starting its many small steps, not into their width, so that a
    narrower number format would cost precision and gain little.
    """

    def __init__(
        self,
        weights: MusicgenModel,
        tokenizer: Tokenizer,
        model: MusicgenForConditionalGeneration,
        device: str,
    ) -> None:
        self.weights, self.tokenizer, self.model, self.device = weights, tokenizer, model, device
        self.books: int = model.decoder.num_codebooks
        self.words: int = model.config.decoder.vocab_size
        self.pad: int = model.config.decoder.pad_token_id
        self.rate: int = model.config.audio_encoder.sampling_rate
        self.hop: int = math.prod(model.config.audio_encoder.upsampling_ratios)

    @classmethod
    def load(cls, weights: MusicgenModel, folder: Path, device: str) -> Iterator[Progress]:
        """Load the MusicGen in `folder`, and prove that it is whole.

        Args:
            device: "cpu", "cuda" or "mps".

        Returns:
            The composer (as the generator's return value).

        Raises:
            StudioError: `model-broken`, `model-mismatch`, `out-of-memory`.
        """
        yield Progress(stage=LOADING, step=0, steps=2)
        tokenizer = _judged(weights, folder)
        yield Progress(stage=LOADING, step=1, steps=2)
        with loading.memory_errors(device, weights, 0.0):
            model = _model(weights, folder).to(device)
        yield Progress(stage=LOADING, step=2, steps=2)
        return cls(weights, tokenizer, model, device)

    def generate(self, request: Musicgen) -> Iterator[Progress]:
        """Make a piece. Progress counts tokens, 50 for a second; closing stops before the next.

        Args:
            request: with its seed resolved. The same request makes the same samples on the same
                device with the same number of threads, whatever else draws random numbers.

        Returns:
            `acestep.RenderedAudio` (as the generator's return value): two equal channels, since the
            model is mono, of just the length asked for.

        Raises:
            StudioError: `sound-not-finite`, `out-of-memory`.
        """
        import numpy as np

        with loading.memory_errors(self.device, self.weights, request.duration_s):
            frames = math.ceil(round(request.duration_s * self.rate / self.hop, 6))
            tokens = yield from self.tokens(request, frames)
            wave = yield from self.decode(tokens)
        if not np.isfinite(wave).all():
            raise StudioError("sound-not-finite", model=self.weights.title)
        samples = round(request.duration_s * SAMPLE_RATE)
        mono = levels.resample(wave, self.rate, SAMPLE_RATE, samples)
        sound, peak = levels.normalize_peak(np.repeat(mono, 2, axis=0))
        return acestep.RenderedAudio(sound=sound, peak_dbfs=peak, seed=request.seed)

    def tokens(self, request: Musicgen, frames: int) -> Iterator[Progress]:
        """Compose `frames` frames: int64 [codebooks, frames], on the device (returned).

        A piece longer than the model oversees is composed in windows that overlap; what is written
        stays as it is, so that tokens know no seam, and neither does the sound made of them.
        """
        import torch

        if request.seed is None:
            raise ValueError("the seed is to be resolved before anything is composed")
        window, stride = (s * self.rate // self.hop for s in (WINDOW_S, STRIDE_S))
        yield Progress(stage=COMPOSING, step=0, steps=frames)
        words = self._read(request)
        random = torch.Generator().manual_seed(request.seed)
        made = torch.empty(self.books, 0, dtype=torch.long, device=self.device)
        start = 0
        while made.shape[1] < frames:
            grid = self._grid(made[:, start:], min(window, frames - start))
            for done in self._fill(grid, words, random, request):
                yield Progress(stage=COMPOSING, step=start + done, steps=frames)
            made = torch.cat([made[:, :start], self._straight(grid)], 1)
            start += stride
        return made

    def decode(self, tokens: torch.Tensor) -> Iterator[Progress]:
        """Tokens [codebooks, frames] to sound: float32 numpy [1, frames * hop] (returned).

        Up to its recurrent layer, which remembers all that came before, the codec computes the
        whole; above, where memory goes, it works in overlapping tiles, equal to rounding.
        """
        import torch

        layers = self.model.audio_encoder.decoder.layers
        cut = 1 + next(i for i, layer in enumerate(layers) if hasattr(layer, "lstm"))
        frames, per_s = tokens.shape[1], self.rate / self.hop
        tile, overlap = round(TILE_S * per_s), round(OVERLAP_S * per_s)
        wave, starts = torch.empty(1, frames * self.hop), range(0, frames, tile)
        yield Progress(stage=RENDERING, step=0, steps=len(starts))
        with torch.inference_mode():
            outline = self.model.audio_encoder.quantizer.decode(tokens[:, None])
            for layer in layers[:cut]:
                outline = layer(outline)
        for i, start in enumerate(starts):
            end, left = min(start + tile, frames), min(start, overlap)
            with torch.inference_mode():
                part = outline[:, :, start - left : end + overlap]
                for layer in layers[cut:]:
                    part = layer(part)
                keep = part[0, :, left * self.hop : (left + end - start) * self.hop]
                wave[:, start * self.hop : end * self.hop] = keep.float().cpu()
            yield Progress(stage=RENDERING, step=i + 1, steps=len(starts))
        return wave.numpy()

    def _read(self, request: Musicgen) -> torch.Tensor:
        """The style as the decoder sees it, [1, words, width]; below it nothing at all, where the
        difference between the two is to guide."""
        import torch

        ids = self.tokenizer.encode(request.prompt).ids
        with torch.inference_mode():
            words = self.model.text_encoder(torch.tensor([ids], device=self.device))[0]
            if hasattr(self.model, "enc_to_dec_proj"):
                words = self.model.enc_to_dec_proj(words)
            return torch.cat([words, 0 * words]) if request.guidance_scale > 1 else words

    def _grid(self, known: torch.Tensor, frames: int) -> torch.Tensor:
        """What the decoder reads, [codebooks, frames + codebooks], -1 where nothing is known yet.

        Each codebook begins one column after the one above it: the delay pattern of the paper
        (Copet et al. 2023, Simple and Controllable Music Generation).
        """
        import torch

        grid = torch.full((self.books, frames + self.books), self.pad, device=self.device)
        for k in range(self.books):
            grid[k, k + 1 : k + 1 + frames] = -1
            grid[k, k + 1 : k + 1 + known.shape[1]] = known[k]
        return grid

    def _straight(self, grid: torch.Tensor) -> torch.Tensor:
        """The frames of a full grid, [codebooks, frames]."""
        import torch

        frames = grid.shape[1] - self.books
        return torch.stack([grid[k, k + 1 : k + 1 + frames] for k in range(self.books)])

    def _fill(
        self, grid: torch.Tensor, words: torch.Tensor, random: torch.Generator, request: Musicgen
    ) -> Iterator[int]:
        """Fill a grid column by column; yields how many frames are there, now and then."""
        import torch

        columns, told = grid.shape[1], time.monotonic()
        first = int((grid[0] == -1).nonzero()[0])
        cache, sound = _cache(self.model, columns), torch.ones((), dtype=bool, device=self.device)
        read = grid[:, :first]
        for column in range(first, columns):
            with torch.inference_mode():
                logits = self._logits(read, words, cache, request.guidance_scale)
                sound &= logits.isfinite().all()
                noise = gumbel(random, logits.shape).to(self.device)
                said = pick(logits, noise, request.temperature, request.top_k)
                free = grid[:, column] == -1
                grid[:, column] = torch.where(free, said, grid[:, column])
            read = grid[:, column : column + 1]
            last = column == columns - 1
            if last or time.monotonic() - told > PULSE_S:
                if not sound:
                    raise StudioError("sound-not-finite", model=self.weights.title)
                yield min(column, columns - self.books)
                told = time.monotonic()

    def _logits(
        self, read: torch.Tensor, words: torch.Tensor, cache: Cache, guidance: float
    ) -> torch.Tensor:
        """What may follow the columns `read`: float32 [codebooks, words of each]."""
        told = self.model.decoder(
            input_ids=read.repeat(len(words), 1),
            encoder_hidden_states=words,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        if len(words) == 1:
            return told
        guided, free = told.chunk(2)
        return free + guidance * (guided - free)


def pick(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """One token a row of `logits` [rows, words], drawn from the `top_k` likeliest.

    The largest of logits plus Gumbel noise is a draw from their softmax (Gumbel 1954), and the
    noise can be drawn anywhere beforehand.
    """
    raised = logits / temperature
    least = raised.topk(min(top_k, raised.shape[-1])).values[:, -1:]
    return raised.masked_fill(raised < least, -math.inf).add(noise).argmax(-1)


def gumbel(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard Gumbel noise, float32 on the CPU: drawn in float64, where no draw is too coarse."""
    import torch

    return -torch.rand(shape, generator=random, dtype=torch.float64).log().neg().log().float()


def _cache(model: MusicgenForConditionalGeneration, columns: int) -> Cache:
    """Keys and values of a window in room that is taken once.

    transformers' own grows by a column at a time, and copies 600 MB for each of the last tokens
    of a window in doing so.
    """
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

    class Layer(DynamicLayer):
        def update(self, keys, values, *_, **__):
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.room = keys.new_empty(2, *keys.shape[:2], columns, keys.shape[3])
            seen = self.get_seq_length()
            end = seen + keys.shape[2]
            self.room[0, :, :, seen:end], self.room[1, :, :, seen:end] = keys, values
            self.keys, self.values = self.room[:, :, :, :end]
            return self.keys, self.values

    layers = [Layer() for _ in range(model.config.decoder.num_hidden_layers)]
    return EncoderDecoderCache(Cache(layers=layers), DynamicCache())


def _judged(weights: MusicgenModel, folder: Path) -> Tokenizer:
    """Its tokenizer, once the files are those of a whole MusicGen that plays in mono."""
    from tokenizers import Tokenizer

    if lacking := weights.missing(folder):
        raise broken(weights, lacking, "is missing")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        musicgen = config["model_type"] == "musicgen"
        decoder, codec = config["decoder"], config["audio_encoder"]
        mono = decoder.get("audio_channels", 1) == codec.get("audio_channels", 1) == 1
        vocabulary = config["text_encoder"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(weights, "config.json", "cannot be read") from error
    if not musicgen or not mono:
        raise broken(weights, "config.json", "is not that of a MusicGen in mono")
    checkpoints.tensor_names(folder / "model.safetensors", weights, folder)
    try:  # tokenizers raises nothing narrower than Exception
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        raise broken(weights, "tokenizer.json", "cannot be read") from error
    if tokenizer.get_vocab_size() > vocabulary:
        problem = f"{tokenizer.get_vocab_size()} words for {vocabulary} embeddings"
        raise mismatch(weights, problem)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a mark in somebody's style is only text
    return tokenizer


def _model(weights: MusicgenModel, folder: Path) -> MusicgenForConditionalGeneration:
    """The model in `folder`, with every tensor that playing needs."""
    import torch
    from safetensors import SafetensorError
    from transformers import MusicgenForConditionalGeneration
    from transformers.utils import logging

    gc.freeze()  # as in `pipeline`
    logging.disable_progress_bar()
    file = "model.safetensors"
    try:
        model, said = MusicgenForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
            raise
        raise broken(weights, file, f"does not load ({type(error).__name__})") from error
    lacking = sorted(key for key in said["missing_keys"] if not key.endswith(UNUSED))
    if lacking:
        raise broken(weights, file, f"lacks the tensor {lacking[0]}")
    if wrong := sorted(map(str, said["mismatched_keys"])):
        raise broken(weights, file, f"holds {wrong[0]} in another shape")
    decoder, quantizer = model.decoder.config, model.audio_encoder.quantizer
    books, size = decoder.num_codebooks, decoder.vocab_size
    if books > len(quantizer.layers) or size != quantizer.codebook_size:
        raise mismatch(
            weights, f"the decoder writes {books} codebooks of {size} words, which the codec lacks"
        )
    return model.eval().requires_grad_(False)
