"""Trains the autoencoder on crops rendered on the spot; its latents also learn to show the notes."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mini.compose import compose
from mini.synth import HIGHEST, HOP, LOWEST, piano_roll, render
from mini.training import Run, Trained, fit, rank
from mini.vae import LATENTS, Codec, initialise

HELD_OUT = 10_000_000  # seeds from here on are never trained on
WINDOWS = ((4096, 256), (2048, 128), (1024, 512, 64))  # spectra compared, one group a step
NOISE = 0.15  # of a latent's spread: the decoder must bear that much error


class Crops(IterableDataset):
    """Endless batches of (audio (B, 2, n), piano roll (B, pitches, T)), four crops a piece."""

    def __init__(self, batch: int, frames: int, seed: int):
        self.batch, self.frames, self.seed = batch, frames, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = random.Random(self.seed + 1000 * rank())
        while True:
            sounds, rolls = [], []
            while len(sounds) < self.batch:
                piece = compose(rng.randrange(HELD_OUT), seconds=16.0)
                for _ in range(4):
                    start = rng.randrange(piece.frames - self.frames - 1)
                    sound = render(piece, start, self.frames + 1)
                    offset = rng.randrange(HOP) if rng.random() < 0.15 else 0
                    sound = sound[:, offset : offset + self.frames * HOP]
                    if rng.random() < 0.4:
                        sound = sound * 10 ** (rng.uniform(-9, 3) / 20)
                    if rng.random() < 0.02:
                        sound = sound * 0
                    sounds.append(sound)
                    rolls.append(piano_roll(piece, start, self.frames))
            yield (
                torch.from_numpy(np.stack(sounds[: self.batch])),
                torch.from_numpy(np.stack(rolls[: self.batch])),
            )


def mid_side(audio: Tensor) -> Tensor:
    """(B, 2, n) to (2 B, n): sum and difference of the channels."""
    both = torch.stack([audio[:, 0] + audio[:, 1], audio[:, 0] - audio[:, 1]], dim=1)
    return both.flatten(0, 1) * 0.5**0.5


def spectral_loss(made: Tensor, true: Tensor, windows: tuple[int, ...]) -> Tensor:
    """Relative error of magnitudes plus half the error of log magnitudes, over window sizes."""
    made, true, loss = mid_side(made), mid_side(true), 0.0
    for size in windows:
        window = torch.hann_window(size, device=made.device)
        spectra = [
            torch.stft(x, size, size // 4, window=window, return_complex=True).abs() / size**0.5
            for x in (made, true)
        ]
        relative = (spectra[0] - spectra[1]).abs().mean() / (spectra[1].mean() + 1e-3)
        logarithmic = ((spectra[0] + 1e-3).log() - (spectra[1] + 1e-3).log()).abs().mean()
        loss = loss + relative + 0.5 * logarithmic
    return loss / len(windows)


class CodecWithRoll(nn.Module):
    """The codec and a linear reader of its latents: which pitches sound in each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.codec = Codec()
        self.roll = nn.Conv1d(LATENTS, HIGHEST - LOWEST + 1, 3, padding=1)


class TrainedCodec(Trained):
    """Spectra, waveform, a mild pull of the latents to unit scale, and the piano roll."""

    def __init__(self, steps: int, rate: float = 4e-4, roll_weight: float = 0.3):
        super().__init__(steps, rate, warmup=100, average=0.997)
        self.save_hyperparameters()
        self.roll_weight = roll_weight
        self.model = CodecWithRoll()
        self.start_average()

    def loss(
        self, model: CodecWithRoll, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        audio, roll = batch
        latents = model.codec.encode(audio)
        spread = latents.detach().std((0, 2), keepdim=True)
        ramp = NOISE * min(1.0, self.global_step / 500) if self.training else 0.0
        noisy = latents + ramp * spread * torch.randn_like(latents)
        made = model.codec.decode(noisy).float()
        windows = WINDOWS[self.global_step % len(WINDOWS)] if self.training else (2048, 512, 128)
        spectrum = spectral_loss(made, audio, windows)
        wave = (made - audio).abs().mean() / (audio.abs().mean() + 1e-2)
        notes = F.binary_cross_entropy_with_logits(model.roll(noisy).float(), roll)
        loss = (
            spectrum
            + 1.5 * wave
            + self.roll_weight * 10 * notes
            + 2e-4 * latents.square().sum(1).mean()
        )
        return loss, {"spectrum": spectrum.detach(), "wave": wave.detach(), "roll": notes.detach()}


def train_vae(run: Run, frames: int = 32) -> Codec:
    """Trains, or resumes training."""
    module = TrainedCodec(run.steps)
    if not (run.folder / "last.ckpt").exists():
        initialise(module.model.codec, next(iter(Crops(2 * run.batch, 128, seed=1)))[0])
        module.start_average()
    held_out = [next(iter(Crops(2 * run.batch, 75, seed=HELD_OUT)))]
    crops = DataLoader(Crops(run.batch, frames, seed=run.steps), batch_size=None)
    fit(module, crops, DataLoader(held_out, batch_size=None), run, clip=0.5)
    return module.average.module.codec


def load_codec(folder: Path) -> Codec:
    """The averaged codec of a run's last checkpoint."""
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    prefix = "average.module.codec."
    codec = Codec()
    codec.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return codec.eval()
