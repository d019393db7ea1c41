"""A fake studio without torch: records requests and returns scripted events.

Run it to see the page: python tests/fake_studio.py PORT [ROOT_PATH]
"""

from __future__ import annotations

import json
import math
import struct
import sys
import threading
import time
import wave
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from audio import lyric_files
from core import files
from core.errors import StudioError
from core.params import AdapterRef, Request
from core.requests import EXPORTS, HELPERS, Lyrics
from core.results import (
    AdapterInfo,
    AudioInfo,
    Cancelled,
    DeviceUsed,
    Download,
    Draft,
    Event,
    ExportedFiles,
    Failed,
    Idea,
    LyricLine,
    ModelEntry,
    ModelInfo,
    ModelUsed,
    Progress,
    SeamCheck,
    Take,
)
from web import page

CARD = ModelInfo(
    name="mini",
    title="ACE-Step mini",
    licence="MIT",
    may_sell=True,
    device="CPU",
    hint="This is the small embedded model; for full songs run xl-sft on a GPU.",
    steps=12,
    guidance=4.0,
    shift=1.0,
    longest_s=240,
    takes_guidance=True,
    planner="ACE-Step mini planner",
    writer="Qwen mini",
    stems="Stems: weights for research use.",
)

CHECK = {
    "tempo": {"asked": 92.0, "measured": 46.0, "verdict": "half"},
    "key": {"asked": None, "measured": None, "verdict": "not sure"},
    "loudness_lufs": -18.4,
    "true_peak_dbtp": -3.1,
    "holes": [{"start_s": 7.5, "length_s": 1.2}],
    "clipped": 12,
}
LOUDER = {
    "target_lufs": -14.0,
    "before_lufs": -18.4,
    "after_lufs": -14.9,
    "true_peak_dbtp": -1.0,
    "gain_db": 4.1,
    "reduction_db": -2.0,
    "reached": False,
}

IDEA = Idea(
    prompt="Slow warm synthwave, gated drums",
    lyrics="[Verse]\nTracks in the rain",
    bpm=84,
    keyscale="D minor",
    timesignature="4",
    vocal_language="en",
    duration_s=42,
)


SONG = (("Loading", 0), ("Denoising", 20), ("Decoding", 3))
WRITING = "Writing the words"
VERSE = "[Verse]\nThe kettle knows my name\nthe window knows the rain"
MODEL = ModelUsed(
    name="mini",
    source="vendor/ace-step-mini",
    revision="0123456789abcdef",
    sha256="ab" * 32,
    licence="MIT",
    may_sell=True,
)
DEVICE = DeviceUsed(kind="cpu", name="Pretended CPU", dtype="float32", threads=2, torch="")
SEAMS = (
    SeamCheck(at_s=3.4, click=1.2, gap_db=-2.1, bump_db=0.4, good=True),
    SeamCheck(at_s=6.7, click=4.4, gap_db=-14.0, bump_db=3.5, good=False),
)


ENTRIES = tuple(
    ModelEntry(
        kind=kind,
        name=name,
        title=title,
        size=size,
        licence=licence,
        may_sell=may_sell,
        on_disk=on_disk,
        in_use=on_disk,
        fits=fits,
        memory="Needs about 3.0 of 16 GB of memory.",
        can_fetch=not on_disk,
    )
    for kind, name, title, size, licence, may_sell, on_disk, fits in (
        ("model", "mini", "ACE-Step mini", "54 MB", "MIT", True, True, True),
        ("model", "xl-sft", "ACE-Step 1.5 XL SFT", "11.5 GB", "MIT", True, False, False),
        ("planner", "0.6B", "ACE-Step 5Hz planner 0.6B", "1.3 GB", "MIT", True, False, True),
        ("songwriter", "qwen-1.5b", "Qwen 1.5B", "3.1 GB", "Apache-2.0", True, True, True),
        ("songwriter", "qwen-0.5b", "Qwen 0.5B", "1.0 GB", "Apache-2.0", True, False, True),
        ("stems", "htdemucs", "HTDemucs", "84 MB", "research use", None, False, True),
    )
)


class FakeStudio:
    """Returns a sine of the requested length for any song and `idea` for any helper.

    "fail" in the style or the idea makes the job fail, "slow" delays every step.
    """

    def __init__(self, card: ModelInfo = CARD, folder: Path | None = None) -> None:
        self._card = card
        self.folder = folder or files.private_folder()
        self.reset()

    def reset(self) -> None:
        """Clear the recorded calls and all takes."""
        self.look_s = 0.0
        self.idea = IDEA
        self.requests: list[Request] = []
        self.inspected: list[Path] = []
        self.stopped: list[str] = []
        self.left: list[str] = []
        self.closed = 0
        self.entries = {entry.name: entry for entry in ENTRIES}
        self.used: list[str] = []
        self._takes: dict[str, list[Take]] = defaultdict(list)
        self._stop: dict[str, threading.Event] = defaultdict(threading.Event)

    def model_info(self) -> ModelInfo:
        return self._card

    def models(self) -> tuple[ModelEntry, ...]:
        """The entries; a running download gets a quarter further, and is done after three."""
        for entry in [*self.entries.values()]:
            if (at := entry.download) and at.state == "running":
                done = at.done + at.total // 4
                at = at.model_copy(update={"done": done})
                if done > at.total * 0.9:
                    at = at.model_copy(update={"state": "done"})
                    usable = {"can_fetch": False, "can_use": not entry.in_use}
                    entry = entry.model_copy(update={"on_disk": True, **usable})
                self.entries[entry.name] = entry.model_copy(update={"download": at})
        return tuple(self.entries.values())

    def fetch(self, name: str) -> None:
        kept = self.entries[name].download
        self._download(name, state="running", done=kept.done if kept else 0)

    def stop_fetch(self, name: str) -> None:
        self._download(name, state="stopped")

    def _download(self, name: str, **changes: Any) -> None:
        entry = self.entries[name]
        at = (entry.download or Download(total=4_000_000_000, rate=5e7)).model_copy(update=changes)
        self.entries[name] = entry.model_copy(update={"download": at})

    def use(self, name: str) -> None:
        self.used.append(name)
        kind = self.entries[name].kind
        for entry in [*self.entries.values()]:
            if entry.kind == kind:
                self.entries[entry.name] = entry.model_copy(
                    update={"in_use": entry.name == name, "can_use": False}
                )

    def run(self, request: Request, visitor: str) -> Iterator[Event]:
        self.requests.append(request)
        stop = self._stop[visitor]
        stop.clear()
        words = f"{getattr(request, 'prompt', '')} {getattr(request, 'idea', '')}"
        is_helper = request.mode in HELPERS
        stages = (("Loading the planner", 0), ("Listening", 9)) if is_helper else SONG
        if request.mode in EXPORTS:
            stages = (("Splitting into stems", 9),)
            words = request.source.stem
        if isinstance(request, Lyrics):
            words, stages = request.brief, (("Loading the songwriter", 0), (WRITING, 9))
        began = time.monotonic()
        done = False
        try:
            for stage, steps in stages:
                for step in range(steps + 1):
                    written = " ".join(VERSE.split(" ")[: step + 1]) if stage == WRITING else ""
                    if stop.is_set():
                        done = True
                        yield Cancelled(stage=stage, elapsed_s=time.monotonic() - began)
                        return
                    yield Progress(
                        stage=stage,
                        step=step,
                        steps=steps,
                        elapsed_s=time.monotonic() - began,
                        left_s=None if stage == "Loading" else (3.0, 8.0),
                        text=written,
                    )
                    slow = "slow" in words.replace("slow stems", "")
                    if slow and stage in (WRITING, "Listening"):
                        stop.wait(2)  # long enough for a page on a busy machine to stop it
                    else:
                        time.sleep(0.3 if slow else 0.002)
            done = True
            if "fail" in words:
                yield Failed(
                    code="out-of-memory",
                    message="There was not enough memory on the CPU for 240 s with ACE-Step mini.",
                    action="Shorten the song to 120 s, or choose a smaller model.",
                )
                return
            if is_helper:
                yield self.idea
                return
            if isinstance(request, Lyrics):
                yield self._draft(request)
                return
            if request.mode in EXPORTS:
                yield self._export(request)
                return
            take = self._record(request, time.monotonic() - began)
            self._takes[visitor].insert(0, take)
            del self._takes[visitor][10:]
            yield take
        finally:
            self.closed += not done

    def inspect_audio(self, path: Path) -> AudioInfo:
        self.inspected.append(path)
        time.sleep(self.look_s)
        try:
            with wave.open(str(path)) as file:
                rate, frames, channels = file.getframerate(), file.getnframes(), file.getnchannels()
        except (wave.Error, EOFError) as error:
            raise StudioError(
                "source-unreadable", name=path.name, problem="it holds no sound"
            ) from error
        envelope = [math.sin(math.pi * n / 500) * (0.6 + 0.4 * math.sin(n)) for n in range(500)]
        return AudioInfo(
            name=path.name,
            seconds=frames / rate,
            rate=rate,
            channels=channels,
            peaks=tuple(x for s in envelope for x in (-abs(s), abs(s))),
            notes=("The sound was mono and now plays on both sides.",) if channels == 1 else (),
        )

    def check_adapter(self, adapter: AdapterRef) -> AdapterInfo:
        """Accept any file that starts like safetensors, unless its name contains "wide"."""
        name = adapter.file.name
        if not adapter.file.read_bytes()[8:9] == b"{":
            raise StudioError(
                "adapter-unreadable", name=name, problem="it is not a safetensors file"
            )
        if "wide" in name:
            problem = "it was made for width 2560, and this model has 256"
            raise StudioError(
                "adapter-wrong-base", name=name, model=self._card.title, problem=problem
            )
        bare = () if adapter.config else (f"{name} came without its adapter_config.json.",)
        return AdapterInfo(name=name, rank=8, modules=48, size_bytes=1_234_567, notes=bare)

    def stop(self, visitor: str) -> None:
        self.stopped.append(visitor)
        self._stop[visitor].set()

    def takes(self, visitor: str) -> tuple[Take, ...]:
        return tuple(self._takes.get(visitor, ()))

    def leave(self, visitor: str) -> None:
        self.left.append(visitor)
        self._stop[visitor].set()
        self._takes.pop(visitor, None)

    def _export(self, request: Request) -> ExportedFiles:
        """Copies of the source under other names; a master reports a target not reached."""
        kinds = {"export": [getattr(request, "format", "")], "master": ["master.wav"]}
        kinds["stems"] = ["stems.zip", *(f"{stem}.wav" for stem in ("vocals", "drums"))]
        paths = [request.source.with_suffix(f".{kind}") for kind in kinds[request.mode]]
        for path in paths:
            if path != request.source:
                path.write_bytes(request.source.read_bytes())
        facts = LOUDER if request.mode == "master" else {}
        notes = (self._card.stems,) if request.mode == "stems" else ()
        return ExportedFiles(
            mode=request.mode, paths=tuple(map(str, paths)), facts=facts, notes=notes
        )

    def _draft(self, request: Lyrics) -> Draft:
        """A draft with a verse only; a repair adds the chorus."""
        repaired = bool(request.repair)
        return Draft(
            id=f"d{len(self.requests)}",
            text=f"{VERSE}\n\n[Chorus]\nrain, rain" if repaired else VERSE,
            asked=("Verse", "Chorus"),
            got=("Verse", "Chorus") if repaired else ("Verse",),
            request=request.model_dump(mode="json") | {"seed": 7},
            model=MODEL,
            device=DEVICE,
            timings_s={WRITING: 0.4},
            made_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            studio="test",
        )

    def _length(self, request: Request) -> float:
        source = getattr(request, "source", None)
        if source is None:
            return request.duration_s
        with wave.open(str(source)) as file:
            kept = file.getnframes() / file.getframerate()
        return kept + getattr(request, "before_s", 0) + getattr(request, "after_s", 0)

    def _record(self, request: Request, spent: float) -> Take:
        number = len(self.requests)
        slow = "-slow-stems" if "slow stems" in getattr(request, "prompt", "") else ""
        path = self.folder / f"take-{number}{slow}.wav"
        samples = round(self._length(request) * 48_000)
        write_tone(path, samples, 220 + 20 * (number % 3))
        applied: dict[str, Any] = request.model_dump(mode="json")
        card = {"inference_steps": "steps", "guidance_scale": "guidance", "shift": "shift"}
        for name, on_card in card.items():
            applied[name] = getattr(self._card, on_card) if applied[name] is None else applied[name]
        applied["seed"] = 1000 + number if applied["seed"] is None else applied["seed"]
        take = Take(
            id=f"t{number}",
            path=str(path),
            mode=request.mode,
            request=applied,
            model=MODEL,
            device=DEVICE,
            sample_rate=48_000,
            samples=samples,
            peak_dbfs=-1.0,
            timings_s={"Loading": 0.2, "Denoising": spent, "Decoding": 0.1},
            notes=("The style was shortened at a word to fit.",),
            plan={"caption": "A bright waltz with a clarinet", "bpm": 92, "language": "en"},
            files={n: "cd" * 32 for n in ("source", "reference") if applied.get(n)},
            check=CHECK,
            adapters=tuple(
                {
                    "name": adapter.file.name,
                    "sha256": "ef" * 32,
                    "strength": adapter.strength,
                    "rank": 8,
                    "modules": 48,
                }
                for adapter in getattr(request, "adapters", ())
            ),
            changed_outside=0 if request.mode in ("extend", "edit") else None,
            seams=SEAMS if request.mode in ("extend", "edit") else (),
            lyric_times=_times(applied.get("lyrics") or "", samples / 48_000),
            made_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            studio="test",
        )
        if take.lyric_times:
            lyric_files.write(take.lyric_times, path, lyric_files.FORMATS)
        path.with_suffix(".json").write_text(json.dumps(take.model_dump(mode="json")))
        return take


def _times(lyrics: str, seconds: float) -> tuple[LyricLine, ...]:
    """Lines at equal distances; the one that says "silent" is not sung."""
    lines = [line for line in lyrics.split("\n") if line and line[0] != "["]
    each = seconds / max(1, len(lines))
    return tuple(
        LyricLine(
            text=line,
            start_s=round(i * each, 3),
            end_s=round(i * each + 0.9 * each, 3),
            confidence=0.1 if "silent" in line else 0.9,
            sung="silent" not in line,
        )
        for i, line in enumerate(lines)
    )


def write_tone(path: Path, samples: int, hertz: float) -> None:
    """A quiet stereo tone, 24 bits, 48 kHz."""
    tone = _second(hertz) * (samples // 48_000 + 1)
    with wave.open(str(path), "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(3)
        out.setframerate(48_000)
        out.writeframes(tone[: samples * 6])


@lru_cache
def _second(hertz: float) -> bytes:
    return b"".join(
        struct.pack("<i", round(2e6 * math.sin(2 * math.pi * hertz * n / 48_000)))[:3] * 2
        for n in range(48_000)
    )


if __name__ == "__main__":
    studio = FakeStudio()
    studio.look_s = 0.6  # about as long as a real inspection, so that tabs open before it is done
    page.build(studio).queue(max_size=64).launch(
        server_name="127.0.0.1",
        server_port=int(sys.argv[1]),
        quiet=True,
        allowed_paths=[str(studio.folder)],
        root_path=sys.argv[2] if len(sys.argv) > 2 else None,
        **page.launch_options(),
    )
