"""The gates: what the finished model must do on prompts held out, each a share with its confidence.

Everything goes through the studio's own engine, with the page's defaults. Every prompt is reported,
none is chosen.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import pipeline
from audio import levels
from core.requests import SAMPLE_RATE as STUDIO_RATE
from core.requests import Edit, Generate
from mini import measure
from mini.captions import caption
from mini.compose import FRAMES_PER_SECOND, STYLES, Piece, compose
from mini.measure import Key
from mini.synth import SAMPLE_RATE, render
from mini.train_vae import HELD_OUT
from models import catalog
from models.acestep import Engine

PROMPT_SEED = HELD_OUT + 500_000
SECONDS = 12
REPAINT_FROM, REPAINT_TO, REPAINT_SECONDS = 5.0, 11.0, 16


@dataclass(frozen=True)
class Gate:
    """A measured share (or a time) and what is required of it."""

    what: str
    required: str
    value: float
    count: int = 0
    low: float = 0.0
    high: float = 0.0
    note: str = ""
    met: bool = False


def share(what: str, least: float, passed: list[bool], note: str = "") -> Gate:
    """A gate on the share of `passed`, with its 95 % confidence."""
    low, high = measure.wilson(sum(passed), len(passed))
    value = sum(passed) / max(1, len(passed))
    return Gate(
        what,
        f">= {least}",
        round(value, 3),
        len(passed),
        round(low, 3),
        round(high, 3),
        note,
        value >= least,
    )


def held_out_pieces(count: int, seconds: float = 16.0) -> list[Piece]:
    """Pieces of unseen seeds, the styles in turn; what they ask for is in the corpus' range."""
    styles = tuple(STYLES)
    return [
        compose(PROMPT_SEED + i, seconds, style=styles[i % len(styles)], tagged=False)
        for i in range(count)
    ]


def key_of(piece: Piece) -> Key:
    return Key(piece.tonic, piece.mode)


Sound = tuple[np.ndarray, int]  # samples (2, n) and their rate


def as_heard(piece: Piece, seconds: int = SECONDS) -> Sound:
    """A rendered piece at the studio's rate, by the resampler that every song goes through."""
    sound = render(piece, 0, seconds * FRAMES_PER_SECOND)
    return levels.resample(sound, SAMPLE_RATE, STUDIO_RATE, seconds * STUDIO_RATE), STUDIO_RATE


class StyleClassifier:
    """Linear least squares from standardised descriptors to styles, trained on rendered pieces.

    The descriptors depend on the sampling rate, and a studio's song comes at the studio's. So the
    corpus is classified as songs are: resampled to that rate by the studio's own resampler.
    """

    def __init__(self, pieces: int = 240):
        sample = [compose(i, 14.0) for i in range(pieces)]
        features = np.array([self._features(*as_heard(piece)) for piece in sample])
        self.mean, self.spread = features.mean(0), features.std(0) + 1e-6
        targets = np.array([[p.style == style for style in STYLES] for p in sample], float)
        inputs = self._inputs(features)
        ridge = 1e-2 * len(inputs) * np.eye(inputs.shape[1])
        self.weights = np.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets)

    @staticmethod
    def _features(sound: np.ndarray, rate: int) -> np.ndarray:
        return measure.descriptors(sound / (np.abs(sound).max() + 1e-9), rate)

    def _inputs(self, features: np.ndarray) -> np.ndarray:
        scaled = np.clip((features - self.mean) / self.spread, -4, 4)
        return np.concatenate([scaled, scaled**2, np.ones((len(scaled), 1))], axis=1)

    def style(self, sound: np.ndarray, rate: int) -> str:
        scores = self._inputs(self._features(sound, rate)[None]) @ self.weights
        return tuple(STYLES)[int(scores[0].argmax())]


def music_gates(
    pieces: list[Piece], sounds: list[Sound], classifier: StyleClassifier
) -> list[Gate]:
    """Tempo, key, style and beat of sounds made from the captions of `pieces`."""
    tempi = [measure.tempo(*sound) for sound in sounds]
    keys = [measure.key(*sound) for sound in sounds]
    styles = [classifier.style(*sound) for sound in sounds]
    others = pieces[5:] + pieces[:5]
    tempo_chance = np.mean(
        [measure.tempo_right(t, p.bpm) for t, p in zip(tempi, others, strict=True)]
    )
    key_chance = np.mean(
        [measure.key_right(k, key_of(p)) for k, p in zip(keys, others, strict=True)]
    )
    return [
        share(
            "tempo within 4 % (x2, /2 allowed)",
            0.85,
            [measure.tempo_right(t, p.bpm) for t, p in zip(tempi, pieces, strict=True)],
            f"chance {tempo_chance:.2f}",
        ),
        share(
            "key or relative right",
            0.6,
            [measure.key_right(k, key_of(p)) for k, p in zip(keys, pieces, strict=True)],
            f"chance {key_chance:.2f}",
        ),
        share(
            "style recognised by a plain classifier",
            0.75,
            [s == p.style for s, p in zip(styles, pieces, strict=True)],
            "chance 0.25",
        ),
        share(
            "requested beat wins over other tempi",
            0.9,
            [measure.beat_wins(*sound, p.bpm) for sound, p in zip(sounds, pieces, strict=True)],
        ),
    ]


class Studio:
    """The studio's engine on a checkpoint."""

    def __init__(self, folder: Path, steps: int, guidance: float, shift: float):
        model = catalog.choose(str(folder))
        self.engine = drain(Engine.load(model, folder, "cpu", "float32"))
        self.sampling = {"inference_steps": steps, "guidance_scale": guidance, "shift": shift}

    def song(self, piece: Piece, seconds: float, seed: int) -> Sound:
        """Text-to-music from what a held-out piece asks for."""
        request = self._request(piece, seconds, seed)
        made = drain(self.engine.text_to_music(request))
        return made.sound, STUDIO_RATE

    def repainted(self, piece: Piece, source: np.ndarray, start: int, end: int, seed: int) -> Sound:
        """A source (2, n) at the studio's rate, samples [start, end) made anew."""
        defaults = [
            Edit.model_fields[name].default for name in ("repaint_mode", "repaint_strength")
        ]
        request = self._request(piece, source.shape[1] / STUDIO_RATE, seed)
        grip = pipeline.RepaintSettings.of(*defaults)
        made = drain(pipeline.repaint(self.engine, request, source, [(start, end)], grip))
        return made.sound, STUDIO_RATE

    def cover(self, piece: Piece, source: np.ndarray, seed: int) -> Sound:
        """A cover of a source (2, n) at the studio's rate."""
        request = self._request(piece, source.shape[1] / STUDIO_RATE, seed)
        return drain(pipeline.cover(self.engine, request, source)).sound, STUDIO_RATE

    def _request(self, piece: Piece, seconds: float, seed: int) -> Generate:
        return Generate(
            prompt=caption(piece, random.Random(piece.seed), mention=0.0),
            instrumental=True,
            duration_s=seconds,
            seed=seed,
            bpm=piece.bpm,
            keyscale=piece.key,
            timesignature=str(piece.beats_per_bar),
            **self.sampling,
        )


def drain(events: Iterator) -> object:
    """Runs a generator of events to its end and hands back what it returns."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def repaint_gate(studio: Studio, pieces: list[Piece]) -> Gate:
    """The region painted anew differs from the source, and its tempo is the source's."""
    begin, end = int(REPAINT_FROM * STUDIO_RATE), int(REPAINT_TO * STUDIO_RATE)
    changed, kept = [], []
    for index, piece in enumerate(pieces):
        source, _ = as_heard(piece, REPAINT_SECONDS)
        made, rate = studio.repainted(piece, source, begin, end, index)
        inside, before = made[:, begin:end], source[:, begin:end]
        alike = np.corrcoef(measure.mono(inside), measure.mono(before))[0, 1]
        changed.append(bool(alike < 0.9))
        kept.append(measure.tempo_right(measure.tempo(inside, rate), piece.bpm))
    return share(
        "repaint: inside changes, tempo kept",
        0.8,
        [one and other for one, other in zip(changed, kept, strict=True)],
        f"changes {np.mean(changed):.2f}, tempo {np.mean(kept):.2f}",
    )


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of onset envelopes plus correlation of chroma over time, of two sounds."""
    onsets = [measure.onset_envelope(x, STUDIO_RATE) for x in (a, b)]
    chroma = [measure.chroma_frames(x, STUDIO_RATE, 0.2).ravel() for x in (a, b)]
    length, size = min(map(len, onsets)), min(map(len, chroma))
    return float(
        np.corrcoef(onsets[0][:length], onsets[1][:length])[0, 1]
        + np.corrcoef(chroma[0][:size], chroma[1][:size])[0, 1]
    )


def cover_gate(studio: Studio, pieces: list[Piece]) -> Gate:
    """A cover is closer to its own source than to another source."""
    sources = [as_heard(piece)[0] for piece in pieces]
    covers = [
        studio.cover(piece, source, index)[0]
        for index, (piece, source) in enumerate(zip(pieces, sources, strict=True))
    ]
    others = sources[1:] + sources[:1]
    passed = [
        likeness(made, own) > likeness(made, other)
        for made, own, other in zip(covers, sources, others, strict=True)
    ]
    return share("cover: closer to its source than to another", 0.9, passed)


def timing_gates(studio: Studio, piece: Piece) -> list[Gate]:
    """Seconds for a 30 s song on two threads; level of a 240 s song."""
    torch.set_num_threads(2)
    began = time.monotonic()
    studio.song(piece, 30, seed=1)
    spent = time.monotonic() - began
    sound, rate = studio.song(piece, 240, seed=1)
    seconds = sound[:, : sound.shape[1] // rate * rate].reshape(2, -1, rate)
    level = 20 * np.log10(seconds.std((0, 2)) + 1e-9)
    blocks = level[: len(level) // 10 * 10].reshape(-1, 10).mean(1)
    steady = bool(np.ptp(blocks[1:-1]) < 6 and (level[2:-3] > level.max() - 40).all())
    note = (
        f"10 s blocks within {np.ptp(blocks[1:-1]):.1f} dB, quietest second {level.min():.0f} dBFS"
    )
    return [
        Gate(
            "30 s song on two cores", "<= 10 s", round(spent, 1), 1, note="seconds", met=spent <= 10
        ),
        Gate(
            "240 s: level steady, no silence over 1 s",
            "yes",
            float(steady),
            1,
            note=note,
            met=steady,
        ),
    ]


def run(
    folder: Path, count: int, steps: int, guidance: float, shift: float
) -> tuple[list[Gate], list[Sound]]:
    """All gates of a checkpoint but the planner's, and the sounds of the text-to-music prompts."""
    torch.set_num_threads(2)
    studio, pieces = Studio(folder, steps, guidance, shift), held_out_pieces(count)
    sounds = [studio.song(piece, SECONDS, seed=index) for index, piece in enumerate(pieces)]
    gates = music_gates(pieces, sounds, StyleClassifier())
    gates.append(repaint_gate(studio, pieces))
    gates.append(cover_gate(studio, pieces))
    gates += timing_gates(studio, pieces[1])
    return gates, sounds


def table(gates: list[Gate]) -> str:
    """The gates as a Markdown table."""
    lines = ["| what | required | measured | n | 95 % | note |", "|---|---|---|---|---|---|"]
    for gate in gates:
        interval = f"{gate.low:.2f} to {gate.high:.2f}" if gate.count > 1 else ""
        mark = "" if gate.met else " (not met)"
        lines.append(
            f"| {gate.what} | {gate.required} | {gate.value}{mark} | {gate.count} | {interval} | {gate.note} |"
        )
    return "\n".join(lines)


def as_json(gates: list[Gate]) -> list[dict]:
    return [asdict(gate) for gate in gates]
