"""Trains the audio tokenizer and detokenizer: latents at 25 Hz to codes at 5 Hz and back."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mini.attention import use_grouped_attention
from mini.dataset import Corpus
from mini.model import WINDOW, Sizes, build_audio_tokenizer
from mini.training import Run, Trained, fit, rank


class Codes(nn.Module):
    """Tokenizer and detokenizer; in training the rounding lets gradients through."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.tokenizer, self.detokenizer = build_audio_tokenizer(sizes)
        quantizer = self.tokenizer.quantizer
        rounded = quantizer._quantize  # noqa: SLF001

        def straight_through(x: Tensor) -> Tensor:
            bounded = x.clamp(-1, 1)
            return bounded + (rounded(x) - bounded).detach()

        quantizer._quantize = straight_through  # noqa: SLF001

    def encode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized vectors (B, T / 5, width) and code ids (B, T / 5) of latents (B, T, 64)."""
        quantized, ids = self.tokenizer.tokenize(latents)
        return quantized, ids[..., 0] if ids.ndim == 3 else ids

    def forward(self, latents: Tensor) -> Tensor:
        """The latents as the codes represent them (B, T, 64); T is a multiple of five."""
        return self.detokenizer(self.encode(latents)[0])

    @torch.no_grad()
    def hint(self, latents: Tensor) -> Tensor:
        """What a cover reads of its source, any T: the last frames are padded by repetition."""
        frames = latents.shape[1]
        short = -frames % WINDOW
        padded = (
            torch.cat([latents, latents[:, -1:].expand(-1, short, -1)], dim=1) if short else latents
        )
        return self(padded)[:, :frames]


class TrainedCodes(Trained):
    """Mean squared error of the latents, which have unit variance."""

    def __init__(self, steps: int, sizes: Sizes, rate: float = 2e-3):
        super().__init__(steps, rate, warmup=60, average=0.99)
        self.model = Codes(sizes)
        use_grouped_attention(self.model)
        self.average = None
        self.codes = self.model

    def start_average(self) -> None:
        """Rounding is not averaged well; the last weights are used."""

    def on_train_batch_end(self, *_: object) -> None:
        pass

    def loss(self, model: Codes, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = (model(batch) - batch).square().mean()
        return error, {"error": error.detach()}

    def validation_step(self, batch: Tensor, _: int) -> None:
        _, ids = self.model.encode(batch)
        error = (self.model(batch) - batch).square().mean()
        self.log_dict(
            {"held_error": error, "held_codes": float(ids.unique().numel())}, batch_size=1
        )


class LatentBatches(IterableDataset):
    """Endless batches of latents (B, T, 64) from anywhere in the corpus."""

    def __init__(self, corpus: Corpus, batch: int, frames: int, seed: int):
        self.corpus, self.batch, self.frames, self.seed = corpus, batch, frames, seed

    def __iter__(self) -> Iterator[Tensor]:
        rng = random.Random(self.seed + 1000 * rank())
        while True:
            crops = [
                self.corpus.crop(self.frames, rng, aligned=rng.random() < 0.7)
                for _ in range(self.batch)
            ]
            yield torch.stack([crop.latents for crop in crops])


def train_tokens(run: Run, corpus: Corpus, held_out: Corpus, sizes: Sizes) -> Codes:
    module = TrainedCodes(run.steps, sizes)
    train = DataLoader(LatentBatches(corpus, run.batch, 40, seed=3), batch_size=None)
    held = [next(iter(LatentBatches(held_out, 16, 200, seed=4)))]
    fit(module, train, DataLoader(held, batch_size=None), run)
    return module.model


def load_codes(folder: Path, sizes: Sizes) -> Codes:
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    codes = Codes(sizes)
    codes.load_state_dict(
        {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    )
    return codes.eval()
