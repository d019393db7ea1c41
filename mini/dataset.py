"""The corpus as latents: composed, rendered and encoded once, then cropped endlessly."""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mini.compose import FRAMES_PER_SECOND, Piece, compose
from mini.synth import HOP, render
from mini.train_vae import HELD_OUT, load_codec
from mini.training import bfloat16_is_fast
from mini.vae import LATENTS, Codec, LatentScale

FRAMES = 640  # 25.6 s of each piece
CORPUS_SEED, SCALE_PIECES, SHARD = 1_000, 96, 125


@torch.no_grad()
def encode(codec: Codec, sound: np.ndarray) -> Tensor:
    """Latents (frames, 64), float32, in the codec's own scale, of stereo sound (2, n)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast()):
        return codec.encode(torch.from_numpy(sound)[None])[0].T.float()


def measure_scale(codec: Codec, pieces: int) -> LatentScale:
    """Mean and spread of each latent over a sample of a corpus of so many pieces."""
    sample = [
        encode(codec, render(compose(CORPUS_SEED + i), 0, FRAMES))
        for i in range(min(pieces, SCALE_PIECES))
    ]
    values = torch.cat(sample)
    return LatentScale(values.mean(0), values.std(0))


def encode_silence(codec: Codec, scale: LatentScale) -> Tensor:
    """One frame (64,) of encoded silence, unit scale, far from any edge."""
    silent = encode(codec, np.zeros((2, 250 * HOP), np.float32))
    return scale.normalise(silent.T[None])[0, :, 125]


def _encode_shard(job: tuple[str, str, int, int]) -> None:
    """Encodes the pieces of seeds [first, first + count) into one file."""
    run, path, first, count = job
    codec = load_codec(Path(run))
    scale = load_scale(Path(path).parent)
    latents = np.zeros((count, FRAMES, LATENTS), np.float16)
    for row in range(count):
        encoded = encode(codec, render(compose(first + row), 0, FRAMES))
        latents[row] = scale.normalise(encoded.T[None])[0].T.half().numpy()
    partial = Path(path).with_suffix(".partial.npy")
    np.save(partial, latents)
    partial.rename(path)


def load_scale(folder: Path) -> LatentScale:
    return LatentScale(**torch.load(folder / "scale.pt", weights_only=True))


def build_corpus(
    run: Path, folder: Path, pieces: int, held_out: bool = False, workers: int = 2
) -> None:
    """Encodes `pieces` with the codec of `run` into files of `SHARD` pieces; resumes where it stopped.

    The scale is measured on the training corpus; for held-out pieces it must be there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "scale.pt").exists():
        scale = measure_scale(load_codec(run), pieces)
        torch.save({"mean": scale.mean, "std": scale.std}, folder / "scale.pt")
    first = HELD_OUT if held_out else CORPUS_SEED
    jobs = []
    for begin in range(0, pieces, SHARD):
        path = folder / f"latents-{first + begin}.npy"
        if not path.exists():
            jobs.append((str(run), str(path), first + begin, min(SHARD, pieces - begin)))
    if len(jobs) == 1:  # a process would take longer to start
        _encode_shard(jobs[0])
    elif jobs:
        own = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with ProcessPoolExecutor(workers, get_context("spawn"), **own) as pool:
            list(pool.map(_encode_shard, jobs))


@dataclass(frozen=True)
class Crop:
    """A stretch of a piece: latents (frames, 64) of unit variance, and where it lies."""

    index: int
    piece: Piece
    start: int
    latents: Tensor

    @property
    def seconds(self) -> float:
        return len(self.latents) / FRAMES_PER_SECOND


class Corpus:
    """An encoded corpus: its pieces (without their notes) and their latents."""

    def __init__(self, folder: Path):
        self.scale = load_scale(folder)
        paths = sorted(path for path in folder.glob("latents-*.npy") if "partial" not in path.name)
        self.shards = [np.load(path, mmap_mode="r") for path in paths]
        self.places = [
            (shard, row) for shard, latents in enumerate(self.shards) for row in range(len(latents))
        ]
        self.firsts = [int(path.stem.removeprefix("latents-")) for path in paths]  # seeds
        self.pieces = [
            replace(compose(self.firsts[shard] + row), notes=()) for shard, row in self.places
        ]

    def __len__(self) -> int:
        return len(self.places)

    def latents(self, index: int) -> np.ndarray:
        """All latents (640, 64), float16, of a piece."""
        shard, row = self.places[index]
        return self.shards[shard][row]

    def cut(self, index: int, start: int, frames: int) -> Crop:
        latents = torch.from_numpy(self.latents(index)[start : start + frames].astype(np.float32))
        return Crop(index, self.pieces[index], start, latents)

    def crop(self, frames: int, rng: random.Random, aligned: bool = True) -> Crop:
        """A random crop; an aligned one starts with the chord loop (now and then any bar)."""
        index = rng.randrange(len(self))
        piece = self.pieces[index]
        if not aligned:
            return self.cut(index, rng.randrange(FRAMES - frames + 1), frames)
        bars = 1 if rng.random() < 0.1 else 4
        starts = range(0, min(FRAMES, piece.frames) - frames + 1, bars * piece.bar_frames)
        return self.cut(index, rng.choice(starts), frames)
