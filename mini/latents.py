"""The corpus as latents: composed, rendered and encoded once, then cropped endlessly."""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mini.compose import FRAMES_PER_SECOND, Piece, compose
from mini.render import HOP, render
from mini.train_vae import HELD_OUT, load_codec
from mini.vae import LATENTS, Codec, LatentScale

FRAMES = 640  # 25.6 s of each piece
CORPUS_SEED, SCALE_PIECES = 1_000, 96


@torch.no_grad()
def encode(codec: Codec, sound: np.ndarray) -> Tensor:
    """Latents (frames, 64), float32, in the codec's own scale, of stereo sound (2, n)."""
    with torch.autocast("cpu", torch.bfloat16):
        return codec.encode(torch.from_numpy(sound)[None])[0].T.float()


def measure_scale(codec: Codec) -> LatentScale:
    """Mean and spread of each latent over a sample of the corpus."""
    sample = [
        encode(codec, render(compose(CORPUS_SEED + i), 0, FRAMES)) for i in range(SCALE_PIECES)
    ]
    values = torch.cat(sample)
    return LatentScale(values.mean(0), values.std(0))


def encode_silence(codec: Codec, scale: LatentScale) -> Tensor:
    """One frame (64,) of encoded silence, unit scale, far from any edge."""
    silent = encode(codec, np.zeros((2, 250 * HOP), np.float32))
    return scale.normalise(silent.T[None])[0, :, 125]


def _encode_range(job: tuple[str, str, int, int, int]) -> None:
    run, store, first, begin, end = job
    torch.set_num_threads(1)
    codec = load_codec(Path(run))
    scale = LatentScale(**torch.load(Path(store) / "scale.pt", weights_only=True))
    latents = np.load(Path(store) / "latents.npy", mmap_mode="r+")
    for index in range(begin, end):
        encoded = encode(codec, render(compose(first + index), 0, FRAMES))
        latents[index] = scale.normalise(encoded.T[None])[0].T.half().numpy()
    latents.flush()


def build_corpus(
    run: Path, folder: Path, pieces: int, held_out: bool = False, workers: int = 2
) -> None:
    """Encodes `pieces` into `folder` with the codec of `run`; the scale is the training corpus'."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(workers)
    if not (folder / "scale.pt").exists():
        scale = measure_scale(load_codec(run))
        torch.save({"mean": scale.mean, "std": scale.std}, folder / "scale.pt")
    first = HELD_OUT if held_out else CORPUS_SEED
    path = folder / "latents.npy"
    np.lib.format.open_memmap(path, "w+", np.float16, (pieces, FRAMES, LATENTS)).flush()
    cuts = np.linspace(0, pieces, workers + 1).astype(int)
    jobs = [(str(run), str(folder), first, int(a), int(b)) for a, b in zip(cuts, cuts[1:])]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_encode_range, jobs))
    (folder / "corpus.json").write_text(json.dumps({"first": first, "pieces": pieces}))


@dataclass(frozen=True)
class Crop:
    """A stretch of a piece: latents (frames, 64) of unit variance, and where it lies."""

    piece: Piece
    start: int
    latents: Tensor

    @property
    def seconds(self) -> float:
        return len(self.latents) / FRAMES_PER_SECOND


class Corpus:
    """An encoded corpus: its pieces (without their notes) and their latents."""

    def __init__(self, folder: Path):
        told = json.loads((folder / "corpus.json").read_text())
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        self.scale = LatentScale(**torch.load(folder / "scale.pt", weights_only=True))
        self.pieces = [replace(compose(told["first"] + i), notes=()) for i in range(told["pieces"])]

    def __len__(self) -> int:
        return len(self.pieces)

    def cut(self, index: int, start: int, frames: int) -> Crop:
        latents = torch.from_numpy(self.latents[index, start : start + frames].astype(np.float32))
        return Crop(self.pieces[index], start, latents)

    def crop(self, frames: int, rng: random.Random, aligned: bool = True) -> Crop:
        """A random crop; an aligned one starts with the chord loop (now and then any bar)."""
        index = rng.randrange(len(self))
        piece = self.pieces[index]
        if not aligned:
            return self.cut(index, rng.randrange(FRAMES - frames + 1), frames)
        bars = 1 if rng.random() < 0.1 else 4
        starts = range(0, min(FRAMES, piece.frames) - frames + 1, bars * piece.bar_frames)
        return self.cut(index, rng.choice(starts), frames)
