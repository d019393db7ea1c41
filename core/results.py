"""What a job yields: progress, then one result (a take, a draft, files, an idea) or a failure."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from core.errors import StudioError
from core.params import MAX_ADAPTER_RANK, MAX_ADAPTER_STRENGTH, Request, with_file_names
from core.requests import SONGS

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


class ModelUsed(BaseModel):
    """Which weights made a take."""

    model_config = ConfigDict(frozen=True)
    name: str
    source: str
    revision: str
    sha256: str
    licence: str
    may_sell: bool | None


class DeviceUsed(BaseModel):
    """Where a take was made. Equal values and an equal request mean equal samples."""

    model_config = ConfigDict(frozen=True)
    kind: str
    name: str
    dtype: str
    threads: int
    torch: str


class ModelInfo(BaseModel):
    """What is playing: the model on its device, and the defaults that suit it.

    `hint` is one plain sentence for people whose machine plays a smaller model than it could be,
    or slowly; None where there is nothing to explain. `planner` names the 5Hz planner; where there
    is none it is empty, and `no_planner` says why; so it is with the songwriter, `writer`. `stems`
    is what has to be said wherever a song can be split, and `no_stems` why it cannot be.
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
    planner: str = ""
    no_planner: str = ""
    writer: str = ""
    no_writer: str = ""
    stems: str = ""
    no_stems: str = ""


class Progress(BaseModel):
    """A sign of life: what is being done, how far it is, how long it will take.

    `elapsed_s` counts from the start of the job; `left_s` is the range (soonest, latest) in which
    the end is expected, or None while nothing is known. `text` is what has been written so far,
    where somebody reads along.
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
    """How an edge of an edit measures: see `audio.splice.measure_seam`, whose limits decide `good`."""

    model_config = ConfigDict(frozen=True)
    at_s: float
    click: float
    gap_db: float
    bump_db: float
    good: bool


class Take(BaseModel):
    """A finished piece: its file, and the request as it was really run.

    `edition` is `core.requests.EDITION` as of then. `plan` is what the planner wrote or heard
    (fields of `plan_format.Plan`), `codes` what it composed, five a second. `files` are the sha256 of the files that went in, by field. For an edit that
    keeps part of its source, `changed_outside` counts the samples that differ outside the region
    and its crossfade, and `seams` says of each edge where it is and how it measures. `adapters` are
    those that played (`stack.AdapterUsed`), `check` is what was measured (`measure.Check`).
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
    edition: int = 1
    made_at: datetime
    studio: str

    @property
    def duration_s(self) -> float:
        return self.samples / self.sample_rate

    def for_sharing(self) -> Self:
        """The take as it leaves the studio: names of files in place of where they lie."""
        request = with_file_names(SONGS[self.mode], self.request)
        return self.model_copy(update={"path": Path(self.path).name, "request": request})

    def to_request(self, **changes: Any) -> Request:
        """The request that made this take, with `changes`. A retake changes the seed."""
        return SONGS[self.mode].of({**self.request, **changes})


class Draft(BaseModel):
    """Finished words: the text, the sections asked for and those that came."""

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
        """Whether the draft has just the sections that were asked for."""
        return self.asked == self.got


class ExportedFiles(BaseModel):
    """Files made of a take: where they are, and what is to be said of them."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["made"] = "made"
    mode: str
    paths: tuple[str, ...]
    facts: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


class Idea(BaseModel):
    """What the planner thought up or heard: values for the fields of a form, where it had any."""

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
    """A file that was brought, before anything is made of it.

    `peaks` are the lowest and highest sample of each stretch, in turn (see `audio.levels.waveform_peaks`).
    """

    model_config = ConfigDict(frozen=True)
    name: str
    seconds: float
    rate: int
    channels: int
    peaks: tuple[float, ...]
    notes: tuple[str, ...] = ()


class AdapterInfo(BaseModel):
    """An adapter that was brought and fits: its largest rank, how many layers it changes."""

    model_config = ConfigDict(frozen=True)
    name: str
    rank: int
    modules: int
    size_bytes: int
    notes: tuple[str, ...] = ()


class Cancelled(BaseModel):
    """The musician stopped it. `stage` is where it stood."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["cancelled"] = "cancelled"
    stage: str
    elapsed_s: float


class Failed(BaseModel):
    """It could not be done: the code, one sentence, one action."""

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


Event = Progress | Take | Draft | Idea | ExportedFiles | Cancelled | Failed


class AdapterUsed(BaseModel):
    """What a take says of an adapter that was played. `modules` were found in the transformer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    strength: float = Field(gt=0, le=MAX_ADAPTER_STRENGTH)
    rank: int = Field(ge=0, le=MAX_ADAPTER_RANK)
    modules: int = Field(ge=1)
