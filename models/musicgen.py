"""MusicGen: instrumental music from a style, generated token by token.

The model is transformers' own; the loop over its decoder is ours, for progress, cancellation and
seeded sampling. The same random draws give the same tokens as transformers' `generate`.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio import levels
from core.errors import StudioError
from core.requests import SAMPLE_RATE, Musicgen
from core.results import Progress
from models import acestep, checkpoints, loading
from models.catalog import MUSICGEN, MusicgenModel
from models.weights import broken, mismatch

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from transformers import MusicgenForConditionalGeneration
    from transformers.cache_utils import Cache


LOADING, COMPOSING, RENDERING = "Loading MusicGen", "Composing", "Decoding the tokens"


WINDOW_S, STRIDE_S = 30, 18
"""The context window the model was trained with, in seconds, and how far it moves in longer
pieces: the last 12 s are kept as context. Source: audiocraft's defaults."""


TILE_S, OVERLAP_S = 10.0, 0.2
"""Seconds decoded at a time, and the overlap on either side that is discarded. Above its frame
rate the codec's receptive field is 3 frames to either side, 0.06 s."""


PULSE_S = 0.05
"""Minimum interval in seconds between two yields; work can be cancelled at each."""


UNUSED = (".inited", ".cluster_size", ".embed_avg")
"""Suffixes of tensors that are needed only to train the codec."""


def choose(folder: str | Path = "") -> MusicgenModel:
    """MusicGen from the hub, or the copy in `folder` if one is given."""
    return replace(MUSICGEN, folder=Path(folder).expanduser().resolve()) if folder else MUSICGEN


class MusicgenEngine:
    """One loaded MusicGen, in float32. Not thread-safe: one piece at a time, from any thread.

    On a GPU its many small steps are bound by launches, so that a narrower number format would
    cost precision and gain little.
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
    def load(
        cls, weights: MusicgenModel, folder: Path, device: str
    ) -> Generator[Progress, None, MusicgenEngine]:
        """Load the MusicGen in `folder` and check that it is complete.

        Args:
            device: "cpu", "cuda" or "mps".

        Returns:
            The engine (as the generator's return value).

        Raises:
            StudioError: `model-broken`, `model-mismatch`, `out-of-memory`.
        """
        yield Progress(stage=LOADING, step=0, steps=2)
        tokenizer = _load_tokenizer(weights, folder)
        yield Progress(stage=LOADING, step=1, steps=2)
        with loading.memory_errors(device, weights, 0.0):
            model = _load_model(weights, folder).to(device)
        yield Progress(stage=LOADING, step=2, steps=2)
        return cls(weights, tokenizer, model, device)

    def generate(self, request: Musicgen) -> Generator[Progress, None, acestep.RenderedAudio]:
        """Generate a piece. Progress counts frames of tokens, 50 a second; closing cancels.

        Args:
            request: with its seed resolved. The same request gives the same samples on the same
                device with the same number of threads, whatever else uses random numbers.

        Returns:
            `acestep.RenderedAudio` (as the generator's return value): two equal channels, since the
            model is mono, of exactly the requested length.

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

    def tokens(self, request: Musicgen, frames: int) -> Generator[Progress, None, torch.Tensor]:
        """Generate `frames` frames: int64 [codebooks, frames], on the device (returned).

        A piece longer than the context window is generated in overlapping windows. Tokens once
        written stay, so that there is no seam, in the tokens or in the sound.
        """
        import torch

        if request.seed is None:
            raise ValueError("the seed has to be resolved first")
        window, stride = (s * self.rate // self.hop for s in (WINDOW_S, STRIDE_S))
        yield Progress(stage=COMPOSING, step=0, steps=frames)
        condition = self._encode_style(request)
        random = torch.Generator().manual_seed(request.seed)
        done = torch.empty(self.books, 0, dtype=torch.long, device=self.device)
        start = 0
        while done.shape[1] < frames:
            grid = self._delayed(done[:, start:], min(window, frames - start))
            for step in self._fill(grid, condition, random, request):
                yield Progress(stage=COMPOSING, step=start + step, steps=frames)
            done = torch.cat([done[:, :start], self._undelayed(grid)], 1)
            start += stride
        return done

    def decode(self, tokens: torch.Tensor) -> Generator[Progress, None, np.ndarray]:
        """Decode tokens [codebooks, frames] to audio: float32 numpy [1, frames * hop] (returned).

        Up to its recurrent layer the codec runs on the whole piece; the layers after it, which
        take the memory, run in overlapping tiles, equal up to rounding.
        """
        import torch

        layers = self.model.audio_encoder.decoder.layers
        cut = 1 + next(i for i, layer in enumerate(layers) if hasattr(layer, "lstm"))
        frames, per_s = tokens.shape[1], self.rate / self.hop
        tile, overlap = round(TILE_S * per_s), round(OVERLAP_S * per_s)
        wave, starts = torch.empty(1, frames * self.hop), range(0, frames, tile)
        yield Progress(stage=RENDERING, step=0, steps=len(starts))
        with torch.inference_mode():
            hidden = self.model.audio_encoder.quantizer.decode(tokens[:, None])
            for layer in layers[:cut]:
                hidden = layer(hidden)
        for i, start in enumerate(starts):
            end, left = min(start + tile, frames), min(start, overlap)
            with torch.inference_mode():
                part = hidden[:, :, start - left : end + overlap]
                for layer in layers[cut:]:
                    part = layer(part)
                keep = part[0, :, left * self.hop : (left + end - start) * self.hop]
                wave[:, start * self.hop : end * self.hop] = keep.float().cpu()
            yield Progress(stage=RENDERING, step=i + 1, steps=len(starts))
        return wave.numpy()

    def _encode_style(self, request: Musicgen) -> torch.Tensor:
        """The encoded style, [1, tokens, width]; [2, …] with zeros as the unconditional half if
        there is guidance."""
        import torch

        ids = self.tokenizer.encode(request.prompt).ids
        with torch.inference_mode():
            style = self.model.text_encoder(torch.tensor([ids], device=self.device))[0]
            if hasattr(self.model, "enc_to_dec_proj"):
                style = self.model.enc_to_dec_proj(style)
            return torch.cat([style, 0 * style]) if request.guidance_scale > 1 else style

    def _delayed(self, known: torch.Tensor, frames: int) -> torch.Tensor:
        """The decoder's input, [codebooks, frames + codebooks], -1 where a token is to be chosen.

        Each codebook begins one column after the one above it: the delay pattern of the paper
        (Copet et al. 2023, Simple and Controllable Music Generation).
        """
        import torch

        grid = torch.full((self.books, frames + self.books), self.pad, device=self.device)
        for k in range(self.books):
            grid[k, k + 1 : k + 1 + frames] = -1
            grid[k, k + 1 : k + 1 + known.shape[1]] = known[k]
        return grid

    def _undelayed(self, grid: torch.Tensor) -> torch.Tensor:
        """The frames of a complete grid, [codebooks, frames]."""
        import torch

        frames = grid.shape[1] - self.books
        return torch.stack([grid[k, k + 1 : k + 1 + frames] for k in range(self.books)])

    def _fill(
        self,
        grid: torch.Tensor,
        condition: torch.Tensor,
        random: torch.Generator,
        request: Musicgen,
    ) -> Iterator[int]:
        """Choose the tokens of a grid column by column; yields now and then how many frames exist."""
        import torch

        columns, reported = grid.shape[1], time.monotonic()
        first = int((grid[0] == -1).nonzero()[0])
        cache, finite = _cache(self.model, columns), torch.ones((), dtype=bool, device=self.device)
        new = grid[:, :first]
        for column in range(first, columns):
            with torch.inference_mode():
                logits = self._logits(new, condition, cache, request.guidance_scale)
                finite &= logits.isfinite().all()
                noise = gumbel(random, logits.shape).to(self.device)
                chosen = pick(logits, noise, request.temperature, request.top_k)
                free = grid[:, column] == -1
                grid[:, column] = torch.where(free, chosen, grid[:, column])
            new = grid[:, column : column + 1]
            last = column == columns - 1
            if last or time.monotonic() - reported > PULSE_S:
                if not finite:
                    raise StudioError("sound-not-finite", model=self.weights.title)
                yield min(column, columns - self.books)
                reported = time.monotonic()

    def _logits(
        self, new: torch.Tensor, condition: torch.Tensor, cache: Cache, guidance: float
    ) -> torch.Tensor:
        """The guided logits after the columns `new`: float32 [codebooks, tokens of each]."""
        logits = self.model.decoder(
            input_ids=new.repeat(len(condition), 1),
            encoder_hidden_states=condition,
            use_cache=True,
            **{loading.cache_argument(self.model.decoder): cache},
        ).logits[:, -1]
        if len(condition) == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + guidance * (conditional - unconditional)


def pick(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """Sample one token for each row of `logits` [rows, tokens] from the `top_k` likeliest.

    The argmax of logits plus Gumbel noise is a sample of their softmax (Gumbel 1954), and the
    noise can be drawn on any device beforehand.
    """
    scaled = logits / temperature
    least = scaled.topk(min(top_k, scaled.shape[-1])).values[:, -1:]
    return scaled.masked_fill(scaled < least, -math.inf).add(noise).argmax(-1)


def gumbel(random: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard Gumbel noise, float32 on the CPU, drawn in float64 for its finer tail."""
    import torch

    return -torch.rand(shape, generator=random, dtype=torch.float64).log().neg().log().float()


def _cache(model: MusicgenForConditionalGeneration, columns: int) -> Cache:
    """A key/value cache that is allocated once for a window of `columns` columns.

    transformers' own grows by one column at a time, and copies 600 MB for each of the last tokens
    of a window.
    """
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

    class Layer(DynamicLayer):
        def update(self, keys: Any, values: Any, *_: Any, **__: Any):
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.buffer = keys.new_empty(2, *keys.shape[:2], columns, keys.shape[3])
            start = self.get_seq_length()
            end = start + keys.shape[2]
            self.buffer[0, :, :, start:end], self.buffer[1, :, :, start:end] = keys, values
            self.keys, self.values = self.buffer[:, :, :, :end]
            return self.keys, self.values

    layers = [Layer() for _ in range(model.config.decoder.num_hidden_layers)]
    return EncoderDecoderCache(Cache(layers=layers), DynamicCache())


def _load_tokenizer(weights: MusicgenModel, folder: Path) -> Tokenizer:
    """The tokenizer, after checking that the files are those of a complete mono MusicGen."""
    from tokenizers import Tokenizer

    if missing := weights.missing(folder):
        raise broken(weights, missing, "is missing")
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
    tokenizer.encode_special_tokens = True  # special tokens in a style are plain text
    return tokenizer


def _load_model(weights: MusicgenModel, folder: Path) -> MusicgenForConditionalGeneration:
    """The model in `folder`, with every tensor that inference needs."""
    import torch
    from transformers import MusicgenForConditionalGeneration

    gc.freeze()  # as in `acestep`
    model = loading.load_transformers(
        MusicgenForConditionalGeneration,
        folder,
        partial(broken, weights),
        unused=UNUSED,
        surplus_allowed=True,
        dtype=torch.float32,
    )
    decoder, quantizer = model.decoder.config, model.audio_encoder.quantizer
    books, size = decoder.num_codebooks, decoder.vocab_size
    if books > len(quantizer.layers) or size != quantizer.codebook_size:
        raise mismatch(
            weights, f"the decoder writes {books} codebooks of {size} words, which the codec lacks"
        )
    return model
