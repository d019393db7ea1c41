"""Events of a job: progress, then one result (take, draft, files or idea), a stop or a failure."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from core.errors import StudioError
from core.params import MAX_ADAPTER_RANK, MAX_ADAPTER_STRENGTH, Request, with_file_names
from core.requests import SONGS

log = logging.getLogger(__name__)


MOST_SECONDS = 24 * 3600
"""Latest time that a file may name."""


class ModelUsed(BaseModel):
    """The model weights that made a take."""

    model_config = ConfigDict(frozen=True)
    name: str
    source: str
    revision: str
    sha256: str
    licence: str
    may_sell: bool | None


class DeviceUsed(BaseModel):
    """The device a take was made on. Equal values and an equal request give equal samples.

    `implementation` is the code that computed ACE-Step's transformer: "reference" for diffusers'
    own, or as `models/fast_transformer` names it.
    """

    model_config = ConfigDict(frozen=True)
    kind: str
    name: str
    dtype: str
    threads: int
    torch: str
    implementation: str = "reference"


class ModelInfo(BaseModel):
    """The loaded model, its device, its default settings, and what else is available.

    `hint` is one sentence for people whose computer runs a smaller model, or runs it slowly; None
    where there is nothing to explain. `planner` names the 5 Hz planner; it is empty where there is
    none, and `no_planner` says why. `writer` and `no_writer` say the same of the songwriter.
    `stems` is the notice to show wherever a song can be split, `no_stems` why it cannot. A model
    that does not sing makes instrumental music whatever its lyrics are. `memory`
    says how much of it the model needs.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    title: str
    licence: str
    may_sell: bool | None
    device: str
    hint: str | None
    steps: int
    guidance: float
    shift: float
    longest_s: float
    takes_guidance: bool
    edits_tracks: bool = False
    sings: bool = True
    planner: str = ""
    no_planner: str = ""
    writer: str = ""
    no_writer: str = ""
    stems: str = ""
    no_stems: str = ""
    memory: str = ""


class Progress(BaseModel):
    """What a job is doing, how far it is, and how long it will take.

    `elapsed_s` counts from the start of the job; `left_s` is the expected time left as a range
    (soonest, latest), or None while nothing is known. `text` is the draft so far, where text is
    written.
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["progress"] = "progress"
    stage: str
    step: int = 0
    steps: int = 0
    elapsed_s: float = 0.0
    left_s: tuple[float, float] | None = None
    text: str = ""


class SeamCheck(BaseModel):
    """Measurements at one edge of an edit: see `audio.splice.measure_seam`, whose limits decide `good`."""

    model_config = ConfigDict(frozen=True)
    at_s: float
    click: float
    gap_db: float
    bump_db: float
    good: bool


class LyricWord(BaseModel):
    """A word of the lyrics and when it is sung, in seconds from the start."""

    model_config = ConfigDict(frozen=True)
    text: str
    start_s: float = Field(ge=0, le=MOST_SECONDS)
    end_s: float = Field(ge=0, le=MOST_SECONDS)


class LyricLine(BaseModel):
    """A line of the lyrics and when it is sung, in seconds from the start.

    `confidence` is the share, 0 to 1, of the model's attention in that time that lies on this line
    and not on others. A line with little of it is probably not sung: `sung` is False then, and its
    times are where it would be.
    """

    model_config = ConfigDict(frozen=True)
    text: str
    start_s: float = Field(ge=0, le=MOST_SECONDS)
    end_s: float = Field(ge=0, le=MOST_SECONDS)
    words: tuple[LyricWord, ...] = ()
    confidence: float = Field(ge=0, le=1)
    sung: bool = True


class Take(BaseModel):
    """A finished piece: its file, and the request as it was run.

    `edition` is `core.requests.EDITION` as of then. `plan` is what the planner wrote or detected
    (fields of `plan_format.Plan`), `codes` the audio codes it composed, five per second. `files` are the sha256 of the input files, by field. For an
    edit that keeps part of its source, `changed_outside` counts the samples that differ outside the
    region and its crossfade, and `seams` holds the measurements at each edge. `adapters` are those
    applied (`AdapterUsed`), `check` is what was measured (`analysis.Check`). `lyric_times` are the lines
    of the lyrics where they could be timed. `memory_plan` is how the model was
    loaded (`MemoryPlan.settings`).
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["take"] = "take"
    id: str
    path: str
    mode: str
    request: dict[str, Any]
    model: ModelUsed
    planner: ModelUsed | None = None
    device: DeviceUsed
    sample_rate: int
    samples: int
    peak_dbfs: float | None
    timings_s: dict[str, float]
    notes: tuple[str, ...] = ()
    plan: dict[str, Any] = {}
    codes: tuple[int, ...] = ()
    files: dict[str, str] = {}
    changed_outside: int | None = None
    seams: tuple[SeamCheck, ...] = ()
    adapters: tuple[dict[str, Any], ...] = ()
    check: dict[str, Any] = {}
    lyric_times: tuple[LyricLine, ...] = ()
    memory_plan: dict[str, str | bool | int] = {}
    edition: int = 1
    made_at: datetime
    studio: str

    @property
    def duration_s(self) -> float:
        """The length in seconds."""
        return self.samples / self.sample_rate

    def for_sharing(self) -> Self:
        """The take without paths of this computer: only the names of its files."""
        request = with_file_names(SONGS[self.mode], self.request)
        return self.model_copy(update={"path": Path(self.path).name, "request": request})

    def to_request(self, **changes: Any) -> Request:
        """The request that made this take, with `changes`. A retake changes the seed.

        Raises:
            StudioError: what the mode says of the changes.
        """
        return SONGS[self.mode].stored({**self.request, **changes})


class Draft(BaseModel):
    """Finished lyrics: the text, the sections that were requested and those that were written."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["draft"] = "draft"
    id: str
    text: str
    asked: tuple[str, ...]
    got: tuple[str, ...]
    request: dict[str, Any]
    model: ModelUsed
    device: DeviceUsed
    timings_s: dict[str, float]
    notes: tuple[str, ...] = ()
    made_at: datetime
    studio: str

    @property
    def matches_request(self) -> bool:
        """Whether the draft has exactly the sections that were requested."""
        return self.asked == self.got


class ExportedFiles(BaseModel):
    """Files exported from a take: their paths, and what was measured or noted."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["made"] = "made"
    mode: str
    paths: tuple[str, ...]
    facts: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


class Idea(BaseModel):
    """What the planner suggested or detected: values for the fields of a form."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["idea"] = "idea"
    prompt: str = ""
    lyrics: str = ""
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    vocal_language: str = "unknown"
    duration_s: float | None = None


class AudioInfo(BaseModel):
    """An uploaded audio file.

    `peaks` alternates the lowest and highest sample of each section (see
    `audio.levels.waveform_peaks`).
    """

    model_config = ConfigDict(frozen=True)
    name: str
    seconds: float
    rate: int
    channels: int
    peaks: tuple[float, ...]
    notes: tuple[str, ...] = ()


class AdapterInfo(BaseModel):
    """An uploaded adapter that fits the model: its largest rank, the number of layers it changes."""

    model_config = ConfigDict(frozen=True)
    name: str
    rank: int
    modules: int
    size_bytes: int
    notes: tuple[str, ...] = ()


class Cancelled(BaseModel):
    """The job was stopped during `stage`."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["cancelled"] = "cancelled"
    stage: str
    elapsed_s: float


class Failed(BaseModel):
    """The job failed: an error code, what happened, and what to do."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["failed"] = "failed"
    code: str
    message: str
    action: str

    @classmethod
    def from_error(cls, error: Exception) -> Self:
        """The failure that `error` means; any but a `StudioError` is `internal`, and is logged."""
        if not isinstance(error, StudioError):
            log.error("Unexpected %s", type(error).__name__, exc_info=error)
            error = StudioError("internal", kind=type(error).__name__)
        return cls(code=error.code, message=error.message, action=error.action)

    def as_dict(self) -> dict[str, str]:
        """The code, the message and the action, for callers that are programs."""
        return self.model_dump(exclude={"kind"})


class Download(BaseModel):
    """A download that was started from the page: bytes on disk, bytes a second, and its state.

    `failed` says why, where the state is "failed".
    """

    model_config = ConfigDict(frozen=True)
    state: Literal["running", "stopping", "stopped", "done", "failed"] = "running"
    done: int = 0
    total: int = 0
    rate: float = 0.0
    failed: Failed | None = None


class ModelEntry(BaseModel):
    """A model that can be downloaded or used: where it is, what it may be used for, if it fits.

    `kind` is "model", "planner", "songwriter", "stems" or "musicgen". `fits` is None where that
    is unknown, and `memory` says how, or why not. `can_fetch` and `can_use` say whether
    visitors of this studio may download it, and let later jobs use it.
    """

    model_config = ConfigDict(frozen=True)
    kind: str
    name: str
    title: str
    size: str
    licence: str
    may_sell: bool | None
    on_disk: bool
    in_use: bool = False
    fits: bool | None = None
    memory: str = ""
    can_fetch: bool = False
    can_use: bool = False
    download: Download | None = None


Event = Progress | Take | Draft | Idea | ExportedFiles | Cancelled | Failed


class AdapterUsed(BaseModel):
    """An adapter as a take records it. `modules` is the number of layers it changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    strength: float = Field(gt=0, le=MAX_ADAPTER_STRENGTH)
    rank: int = Field(ge=0, le=MAX_ADAPTER_RANK)
    modules: int = Field(ge=1)
