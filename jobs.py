"""A job as data: what the device is to do, which of it is the planner's, and what it will cost.

Picklable throughout, since on ZeroGPU it goes to another process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoints
import grammar
import host
import musicgen
from errors import StudioError
from finishing import FINISHES
from knobs import Request
from song import (
    HELPERS,
    INSTRUMENTAL,
    SAMPLE_RATE,
    Edit,
    Extend,
    Generate,
    Lyrics,
    Musicgen,
    Sound,
)

if TYPE_CHECKING:
    import numpy as np

    from loras import Adapter
    from lyrics import Writer
    from planner import Size


STAGES = (
    *("Reading the file", "Loading", "Encoding", "Loading the planner", "Listening", "Planning"),
    *("Thinking of a song", "Rewriting", "Composing codes", "Reading adapters"),
    *("Reading the words", "Denoising", "Decoding", "Writing"),
)
"""All that a job may go through, in order, once its turn has come and its models are on disk."""


FINISHING = {"export": "Writing", "master": "Setting the loudness", "stems": "Splitting into stems"}
"""The stage that finishing a take spends its time in."""


@dataclass(frozen=True)
class Job:
    """All that the GPU worker needs to know. Picklable: it may run in another process.

    `folder` is the job's own, empty at first. `sounds` are the decoded files that came in, by
    field, as `sources.Known.sound`; `files` their sha256. `adapters` come with their strengths.
    `planner` is None where none thinks.
    """

    id: str
    request: Request
    model: checkpoints.Weights
    source: Path
    place: host.Place
    folder: Path
    notes: tuple[str, ...]
    gpu_seconds: int = 0
    planner: Size | None = None
    planner_folder: Path | None = None
    writer: Writer | None = None
    writer_folder: Path | None = None
    in_turn: bool = False
    sounds: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    adapters: tuple[tuple[Adapter, float], ...] = ()

    @property
    def flag(self) -> Path:
        """The file whose existence means stop: the one signal that crosses processes."""
        return self.folder / "stop"

    @property
    def wav(self) -> Path:
        """Where the song goes, under a name that is worth downloading."""
        words = "-".join(re.findall(r"\w+", self.request.prompt.lower()))[:40].strip("-_")
        return self.folder / f"{words or self.request.mode}-{self.request.seed}.wav"

    @property
    def duration_s(self) -> float:
        """How long the piece will be."""
        request, source = self.request, self.seconds.get("source")
        if isinstance(request, Extend):
            return request.before_s + source + request.after_s
        return request.duration_s if source is None else source

    def sound(self, field: str) -> np.ndarray:
        """The file that came in as `field`: float32 [2, samples] at 48 kHz."""
        import numpy as np

        return np.load(self.sounds[field])

    def stopped(self) -> bool:
        return self.flag.exists()


def wanted(request: Request) -> set[str]:
    """The fields of a plan that a request leaves to the planner; empty where it is not asked.

    In Generate the planner also composes codes if it thinks; elsewhere thinking is listening.
    """
    if request.mode in HELPERS:
        return set(grammar.FIELDS)
    new = isinstance(request, Generate)
    if not new and not request.thinking:
        return set()
    found = {"bpm", "keyscale", "timesignature"} if request.use_cot_metas else set()
    if request.use_cot_caption and (new or not request.prompt.strip()):
        found.add("caption")
    if (
        request.use_cot_language
        and request.vocal_language == "unknown"
        and not request.instrumental
    ):
        found.add("language")
    if isinstance(request, Edit) and request.kind == "morph" and not request.source_prompt.strip():
        found.add("caption")
    return found - grammar.given_by(request, 0.0).keys()


def lyrics_of(request: Sound) -> str:
    """The lyrics as the planner reads them: a piece without words says so."""
    return INSTRUMENTAL if request.instrumental or not request.lyrics.strip() else request.lyrics


def sung(request: Sound, duration_s: float) -> Generate:
    """The request as the engine reads it: words and knobs, and how long the piece is.

    Not checked again: the style of an edit may be empty, its length is what it comes to.
    """
    shared = {name: getattr(request, name) for name in Sound.model_fields}
    return Generate.model_construct(**shared, duration_s=duration_s, reference=None)


def region_of(request: Edit, samples: int) -> tuple[int, int]:
    """First and last sample of a repaint.

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


def thinks(request: Request) -> bool:
    """Whether the planner has anything to do for `request`."""
    if not isinstance(request, Sound):
        return request.mode in HELPERS
    composes = isinstance(request, Generate) and bool(request.thinking)
    return composes or bool(wanted(request))


def work_of(job: Job, loaded: bool = False, planned: bool = False) -> dict[str, float]:
    """How many units each stage of a job costs, in order: what `host.Rates` multiplies.

    Loading, planning and reading count once; denoising by rows times seconds of sound; the rest by
    seconds. `loaded` and `planned` say whether the engine and the planner are in memory already.
    """
    import sampler

    planned = planned or job.planner is None
    if isinstance(job.request, Lyrics):
        return {"Loading the songwriter": 1.0, "Writing the words": 1.0}
    if job.request.mode in FINISHES:
        return {FINISHING[job.request.mode]: job.seconds["source"]}
    if isinstance(job.request, Musicgen):
        return _told(
            {
                musicgen.LOADING: float(not loaded),
                musicgen.COMPOSING: job.duration_s,
                musicgen.RENDERING: job.duration_s,
                "Writing": job.duration_s,
            }
        )
    if job.request.mode in HELPERS:
        heard = job.seconds.get("source", 0.0)
        return _told(
            {
                "Loading": float(bool(heard) and not loaded),
                "Encoding": heard,
                "Loading the planner": float(not planned),
                {"inspire": "Thinking of a song", "rewrite": "Rewriting"}.get(
                    job.request.mode, "Listening"
                ): 1.0 + heard,
            }
        )
    seconds, heard = job.duration_s, sum(job.seconds.values())
    listens = job.planner is not None and bool(job.sounds) and job.request.mode != "generate"
    plans = job.planner is not None and not listens
    composes = plans and isinstance(job.request, Generate) and bool(job.request.thinking)
    course = sampler.Course.of(job.request)
    rows = sampler.evaluations(course)
    return _told(
        {
            "Loading": float(not loaded),
            "Encoding": heard,
            "Loading the planner": float(not planned),
            "Listening": heard * listens,
            "Planning": float(plans and bool(wanted(job.request))),
            "Composing codes": seconds * composes,
            "Reading adapters": float(len(job.adapters)),
            "Reading the words": 1.0,
            "Denoising": rows * seconds,
            "Decoding": seconds,
            "Writing": seconds,
        }
    )


def _told(work: dict[str, float]) -> dict[str, float]:
    return {stage: units for stage, units in work.items() if units}


def cautious(work: dict[str, float], model: checkpoints.Model) -> float:
    """Seconds a job may need on a GPU nobody has measured: 20 s to get going, then by arithmetic.

    XL computes 0.13 TFLOP a row and second of sound (27 guided steps of 240 s: 1.6 PFLOP), taken
    at 42 TFLOP/s, far below what such a card reaches; other models by their size. A planner says
    at least 30 codes a second there, and a plan of 200 tokens; MusicGen, 25 tokens a second.
    """
    share = model.size_bytes / checkpoints.MODELS["xl-sft"].size_bytes or 1.0
    thought = 10 * sum(stage in work for stage in ("Planning", "Listening", "Rewriting"))
    composed = work.get("Composing codes", 0.0) * grammar.CODE_RATE / 30
    composed += 2 * work.get(musicgen.COMPOSING, 0.0)
    sound = 0.003 * share * work.get("Denoising", 0.0) + 0.05 * work.get("Decoding", 0.0)
    return 20 + sound + thought + composed
