"""What is done to a finished take: its loudness set under a true-peak ceiling, its stems split off.

Sound is float32 [2, samples] at 48 kHz, full scale at 1.0, finite. Long work is a generator.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

import audio
import checkpoints
import measure
from errors import StudioError
from song import SAMPLE_RATE, Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

TARGET_LUFS, CEILING_DBTP = -14.0, -1.0
"""What streaming services play, and the room that lossy coding needs."""

LARGEST_GAIN_DB = 20.0
"""More would raise the noise of a sketch, not its music."""

DEEPEST_DB = 6.0
"""The limiter takes at most this off the highest peak: a quieter master, not a pumping one."""

CLOSE_LU = 0.05
"""The gain is sought until the loudness is this close."""

LOOK_S, RELEASE_DB_S = 0.005, 30.0
"""How far the limiter looks ahead, and how fast it lets go."""

STEMS = ("vocals", "drums", "bass", "other")
"""In the order they are shown and zipped. The model's own order is another."""

SUM_ERROR_DBFS = -120.0
"""How far the sum of the stems may be from the mix: the rounding of 32-bit samples."""

OVERLAP = 0.25
"""Share of a window that the next one hears too: the model's authors' choice."""

RESEARCH = "Stems: HTDemucs weights, for research use; their author keeps them outside its licence."
"""What a badge says where stems are offered."""


class Loudness(BaseModel):
    """What mastering did. The loudnesses are None for silence, which stays as it is.

    `gain_db` is what the whole sound was raised by, `reduction_db` the most that the limiter took
    off a peak (0 or below). `reached` tells whether the target was met within 0.2 LU.
    """

    model_config = ConfigDict(frozen=True)
    target_lufs: float
    before_lufs: float | None
    after_lufs: float | None
    true_peak_dbtp: float | None
    gain_db: float = 0.0
    reduction_db: float = 0.0
    reached: bool = False


def master(
    sound: np.ndarray, target_lufs: float = TARGET_LUFS, ceiling_dbtp: float = CEILING_DBTP
) -> Iterator[Progress]:
    """Bring `sound` to a loudness without any true peak above the ceiling.

    Gain is bounded by `LARGEST_GAIN_DB`, and so that no peak is reduced by more than `DEEPEST_DB`.
    Silence (nothing above -70 LUFS) comes back as it is.

    Args:
        target_lufs: integrated, BS.1770-4.
        ceiling_dbtp: true peak, at four times the rate.

    Returns:
        (sound, Loudness), the sound in a new array.
    """
    import numpy as np

    stage = "Setting the loudness"
    yield Progress(stage=stage)
    before = measure.loudness(sound)
    envelope = measure.envelope(sound)
    highest = float(envelope.max(initial=0.0))
    if before is None:
        peak = 20 * math.log10(highest) if highest else None
        told = Loudness(
            target_lufs=target_lufs, before_lufs=None, after_lufs=None, true_peak_dbtp=peak
        )
        return sound.copy(), told

    ceiling = 10 ** (ceiling_dbtp / 20)
    most = min(LARGEST_GAIN_DB, 20 * math.log10(ceiling / highest) + DEEPEST_DB)
    gain_db, tried = min(target_lufs - before, most), []
    for step in range(1, 6):
        yield Progress(stage=stage, step=step, steps=6)
        gains = _limiter(envelope * np.float32(10 ** (gain_db / 20)), ceiling)
        done = sound * (gains * np.float32(10 ** (gain_db / 20)))
        after = measure.loudness(done)
        off = target_lufs - after
        tried.append((gain_db, after))
        if abs(off) <= CLOSE_LU or (off > 0 and gain_db >= most):
            break
        # A limited sound gains less than it is raised by: go by the slope seen, within reason.
        slope = 1.0
        if len(tried) > 1:
            (g0, l0), (g1, l1) = tried[-2:]
            slope = min(1.0, max(0.2, (l1 - l0) / (g1 - g0)))
        gain_db = min(gain_db + off / slope, most)
    yield Progress(stage=stage, step=6, steps=6)
    # Between samples whose gains differ the wave passes the ceiling by some 1e-5 dB.
    done *= np.float32(min(1.0, ceiling / float(measure.envelope(done).max()) * (1 - 1e-6)))
    after = measure.loudness(done)
    return done, Loudness(
        target_lufs=target_lufs,
        before_lufs=round(before, 2),
        after_lufs=round(after, 2),
        true_peak_dbtp=round(measure.true_peak(done), 2),
        gain_db=round(tried[-1][0], 2),
        reduction_db=round(20 * math.log10(float(gains.min())), 2),
        reached=abs(after - target_lufs) <= 0.2,
    )


def _limiter(envelope: np.ndarray, ceiling: float) -> np.ndarray:
    """The gain, 0 to 1 for each sample, that keeps an envelope [samples] under `ceiling`.

    It is down before a peak comes, stays while it passes, rises by at most `RELEASE_DB_S` after it,
    and bends smoothly: a running minimum over the look-ahead to both sides, then two running means
    that together are no wider. A mean of values that are low enough is low enough.
    """
    import numpy as np
    from scipy.ndimage import minimum_filter1d, uniform_filter1d

    if envelope.max(initial=0.0) <= ceiling:
        return np.ones_like(envelope)
    look = round(LOOK_S * SAMPLE_RATE)
    # A point between two samples is moved by both their gains.
    either = np.maximum(envelope, np.pad(envelope[:-1], (1, 0)))
    needed_db = 20 * np.log10(np.minimum(1.0, ceiling / np.maximum(either, 1e-9)))
    held_db = minimum_filter1d(needed_db, 2 * look + 1, mode="nearest")
    slope = RELEASE_DB_S / SAMPLE_RATE * np.arange(len(held_db))
    held_db = np.minimum.accumulate(held_db - slope) + slope
    gains = 10 ** (np.minimum(held_db, 0.0) / 20)
    for _ in range(2):
        gains = uniform_filter1d(gains, look + 1 - look % 2, mode="nearest")
    return np.minimum(gains, 1.0).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class StemWeights(checkpoints.Weights):
    """A separator's weights: one safetensors file, known by its size and sha256."""

    sha256: str
    proof: ClassVar[str] = "955717e8.safetensors"
    files: ClassVar[tuple[str, ...]] = (proof,)


HTDEMUCS = StemWeights(
    name="htdemucs",
    title="HTDemucs",
    repo="adefossez/HTDemucs",
    revision="bf35a81b663819a8255c8fefee17f9d812b786b5",
    licence="research use",
    may_sell=None,
    size_bytes=84_025_440,
    sha256="d9fa14133cfcc034a6758923bb3a8ca9f8dfd0b582134643bbf83f72c17576dd",
)
"""Its hub page says MIT; its author says that the weights are outside that licence and meant for
research (facebookresearch/demucs, issues 327 and 508)."""


@dataclass(frozen=True)
class Separator:
    """A loaded HTDemucs in float32 on its device."""

    model: torch.nn.Module
    device: str


def find(weights: StemWeights = HTDEMUCS) -> Path:
    """The folder of a separator's weights. Raises `stems-missing`, with the command to get them."""
    folder = checkpoints.locate(weights)
    if folder is None or weights.missing(folder):
        raise StudioError(
            "stems-missing", model=weights.title, size=weights.size, command=weights.command
        )
    return folder


def load(weights: StemWeights = HTDEMUCS, device: str = "cpu") -> Iterator[Progress]:
    """Load a separator (returned) from its file, of which nothing is run.

    The file's bytes must be the ones of the table; it names a class, which is only compared, and
    that class's settings.

    Raises:
        StudioError: `stems-missing`, or `model-broken`, naming the file.
    """
    path = find(weights) / weights.proof
    yield Progress(stage=f"Loading {weights.title}")
    size = path.stat().st_size
    if size != weights.size_bytes:
        problem = f"is {size} bytes long and should be {weights.size_bytes}"
        raise checkpoints.broken(weights, path.name, problem)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != weights.sha256:
            raise checkpoints.broken(weights, path.name, "has other contents than published")

    from demucs.htdemucs import HTDemucs
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if said.get("klass") != f"{HTDemucs.__module__}.{HTDemucs.__qualname__}":
        raise checkpoints.broken(weights, path.name, "holds another kind of model")
    known = inspect.signature(HTDemucs).parameters
    settings = dict(zip(known, json.loads(said.get("args", "[]")), strict=False))
    settings |= json.loads(said["kwargs"], object_hook=_fraction)
    model = HTDemucs(**{name: value for name, value in settings.items() if name in known})
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise checkpoints.broken(weights, path.name, "lacks some of its tensors") from error
    if {*model.sources} != {*STEMS}:
        raise checkpoints.broken(weights, path.name, "splits into other stems")
    return Separator(model.eval().to(device), device)


def _fraction(value: dict[str, Any]) -> Any:
    """JSON for numbers such as 39/5, which the length of the model's window is."""
    from fractions import Fraction

    if value.get("_type") == "fraction":
        return Fraction(value["numerator"], value["denominator"])
    return value


def separate(separator: Separator, sound: np.ndarray) -> Iterator[Progress]:
    """Split `sound` into its stems, one window of the model at a time; closing stops there.

    What the model gives to no stem (the air above 22 kHz, small errors) goes to "other", so that
    the stems sum to the mix: within `SUM_ERROR_DBFS` as long as none rises above 16. The same sound
    gives the same bits on the same device: nothing is shifted at random.

    Returns:
        float32 [2, samples] at 48 kHz for each of `STEMS`, as long as `sound`.

    Raises:
        StudioError: `stems-memory`.
    """
    import numpy as np
    import torch

    samples, rate = sound.shape[1], separator.model.samplerate
    if not np.any(sound):
        return {name: np.zeros_like(sound) for name in STEMS}
    heard = audio.resample(sound, SAMPLE_RATE, rate, math.ceil(samples * rate / SAMPLE_RATE))
    # As the model was trained: by the mean and the deviation of the mono sum.
    mono = heard.mean(0, dtype=np.float64)
    middle, spread = np.float32(mono.mean()), np.float32(mono.std() + 1e-8)
    parts = yield from _windows(separator, torch.from_numpy((heard - middle) / spread))
    stems = {}
    for name in STEMS[:-1]:
        part = parts[separator.model.sources.index(name)].numpy() * spread + middle
        stems[name] = audio.resample(part, rate, SAMPLE_RATE, samples)
    rest = sound.astype(np.float64)
    for part in stems.values():
        rest -= part
    return {**stems, STEMS[-1]: rest.astype(np.float32)}


def _windows(separator: Separator, mix: torch.Tensor) -> Iterator[Progress]:
    """Run the model over `mix` [2, n] in windows that fade into each other like triangles.

    A short last window hears what is before it and silence after, as the model's authors do it.
    Returns float32 [stems, 2, n] on the CPU, the stems in the model's order.
    """
    import torch
    from torch.nn.functional import pad

    model, length = separator.model, mix.shape[1]
    window = int(model.samplerate * model.segment)
    starts = range(0, length, int((1 - OVERLAP) * window))
    rising = torch.arange(1, window // 2 + 1)
    weight = torch.cat([rising, torch.arange(window - window // 2, 0, -1)])
    weight = weight / weight.max()
    total = torch.zeros(len(model.sources), mix.shape[0], length)
    weights = torch.zeros(length)
    for step, start in enumerate(starts):
        yield Progress(stage="Splitting into stems", step=step, steps=len(starts))
        end = min(start + window, length)
        early = (window - (end - start)) // 2
        first, last = start - early, start - early + window
        part = pad(
            mix[:, max(0, first) : min(last, length)], (max(0, -first), max(0, last - length))
        )
        found = _heard(separator, part)[..., early : early + end - start]
        total[..., start:end] += weight[: end - start] * found
        weights[start:end] += weight[: end - start]
    yield Progress(stage="Splitting into stems", step=len(starts), steps=len(starts))
    return total / weights


def _heard(separator: Separator, part: torch.Tensor) -> torch.Tensor:
    """One window [2, n] through the model: [stems, 2, n] on the CPU."""
    import torch

    try:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True),
        ):
            return separator.model(part[None].to(separator.device))[0].cpu()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StudioError("stems-memory", device=separator.device) from error


@dataclass(frozen=True)
class StemFiles:
    """Where the stems are: a WAV for each name of `STEMS`, and one zip of them all."""

    wavs: dict[str, Path]
    zip: Path


def save_stems(stems: dict[str, np.ndarray], folder: Path, name: str) -> Iterator[Progress]:
    """Write the stems into `folder` as "`name`-vocals.wav" and so on, and "`name`-stems.zip".

    WAVs hold 32-bit floats: a stem may rise above full scale where the mix does not. Files appear
    all together or not at all, whatever stops the writing. The same stems make the same bytes.

    Returns:
        StemFiles.

    Raises:
        StudioError: `disk-full` or `not-writable`.
    """
    import numpy as np
    from scipy.io import wavfile

    steps = 2 * len(stems)
    archive = folder / f"{name}-stems.zip"
    half = None
    try:
        half = Path(tempfile.mkdtemp(prefix=".stems-", dir=folder))
        wavs = {stem: half / f"{name}-{stem}.wav" for stem in stems}
        with zipfile.ZipFile(half / archive.name, "w") as together:
            for step, (stem, path) in enumerate(wavs.items()):
                yield Progress(stage="Writing the stems", step=2 * step, steps=steps)
                # Not by libsndfile, which writes the time of day into a WAV of floats.
                wavfile.write(path, SAMPLE_RATE, np.ascontiguousarray(stems[stem].T))
                yield Progress(stage="Writing the stems", step=2 * step + 1, steps=steps)
                inside = zipfile.ZipInfo(path.name)
                inside.external_attr, inside.file_size = 0o644 << 16, path.stat().st_size
                with path.open("rb") as source, together.open(inside, "w") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        done = {stem: folder / path.name for stem, path in wavs.items()}
        for path in (*wavs.values(), half / archive.name):
            os.replace(path, folder / path.name)
    except OSError as error:
        needed = sum(sound.nbytes for sound in stems.values()) * 2
        raise audio.no_room(archive, error, needed) from error
    finally:
        if half:
            shutil.rmtree(half, ignore_errors=True)
    return StemFiles(done, archive)
