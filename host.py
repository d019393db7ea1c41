"""Where we run: device, number format, threads, private files, ZeroGPU, and how long things take.

The only room that knows `spaces`. Importing it first keeps ZeroGPU able to defer CUDA.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read when torch brings OpenMP in: threads that wait asleep. Spinning ones stall each other as soon
# as another program wants a core; the embedded model then sampled eight times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Loading a model from a folder would otherwise tell the hub what is running here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import spaces

from errors import StudioError
from song import DeviceUsed, Progress

ON_ZERO = spaces.config.Config.zero_gpu
"""Whether this process is a ZeroGPU Space, where GPU work happens in a forked worker."""

ZERO_SECONDS = (60, 300)
"""What is asked of ZeroGPU while nothing was measured, and the most that is ever asked."""

MARGIN = 1.2
"""How much more GPU time than the median need is asked for."""


@dataclass(frozen=True)
class Place:
    """A device as the engine uses it. Picklable, and decided once at the start."""

    device: str
    dtype: str
    threads: int

    @property
    def speed_class(self) -> str:
        """Machines of one class take about equally long for the same work."""
        return f"{self.device}:{device_name(self.device)}:{self.dtype}:{self.threads}"

    def used(self) -> DeviceUsed:
        """This place as a take records it."""
        return DeviceUsed(
            kind=self.device,
            name=device_name(self.device),
            dtype=self.dtype,
            threads=self.threads,
            torch=version("torch"),
        )


def find_place(device: str | None = None) -> Place:
    """The place to work at: `device` if given, else the best this machine has.

    Raises:
        StudioError: `device-missing`.
    """
    have = _devices()
    if device and device not in have:
        raise StudioError("device-missing", device=device)
    device = device or have[0]
    threads = int(os.environ.get("ACE_THREADS") or _physical_cores())
    return Place(device, _dtype(device), threads)


def settle(place: Place) -> None:
    """Fix the number of threads, so that a seed keeps its bits. Call before any computing."""
    import torch

    torch.set_num_threads(place.threads)


@cache
def device_name(device: str) -> str:
    """The device as its maker calls it."""
    if device == "cuda" and not ON_ZERO:
        import torch

        return torch.cuda.get_device_name()
    if device == "cuda":
        return "ZeroGPU"
    return _processor_name()


def memory_gb(device: str) -> float:
    """What `device` has in all, in GB; on Apple's chips and bare CPUs that is the machine's own."""
    if ON_ZERO:
        return 48.0  # a "large" slice, as its documentation says
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory / 1e9
    import psutil

    return psutil.virtual_memory().total / 1e9


def free(device: str, everything: bool = False) -> None:
    """Give memory that nothing holds any more back to the device, and to the machine.

    Args:
        everything: look through what `gc.freeze` set aside, too. Libraries alone are half a
            million objects, and while they are looked through nobody gets an answer.
    """
    import gc

    if everything:
        gc.unfreeze()
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # every job has a thread of its own, and glibc keeps what each of them freed
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
    elif device == "mps":
        import torch

        torch.mps.empty_cache()


def gpu(seconds: Callable[..., float]) -> Callable[[Any], Any]:
    """Decorate a generator function that needs the GPU; `seconds` gets its arguments.

    On ZeroGPU it runs in a forked process that is granted for that long. Elsewhere nothing
    changes.
    """
    return spaces.GPU(duration=seconds)


def gpu_trouble(error: BaseException) -> str | None:
    """What ZeroGPU's exception means: "aborted", or why it refused; None if it is not one.

    `spaces` raises `gr.Error`, told apart here by its title so that this room needs no Gradio.
    """
    title = str(getattr(error, "title", ""))
    if "ZeroGPU" not in title:
        return None
    reason = re.sub(r"<[^>]*>", "", str(getattr(error, "message", error))).strip().rstrip(".")
    return "aborted" if "aborted" in reason.lower() else reason or "no reason given"


@cache
def private_folder() -> Path:
    """A folder of this process that only this user can read; gone when the process ends."""
    import psutil

    root = Path(tempfile.gettempdir())
    for stale in root.glob("ace-studio-*-*"):
        pid = stale.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"ace-studio-{os.getpid()}-"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


def cache_folder() -> Path:
    """Where the studio keeps what it has learned about this machine between starts."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ace-music-studio"


def reach_loopback() -> None:
    """Keep proxies in the environment from being asked for this very machine."""
    for name in ("NO_PROXY", "no_proxy"):
        have = [h for h in os.environ.get(name, "").split(",") if h]
        ours = [h for h in ("127.0.0.1", "localhost", "0.0.0.0", "::1") if h not in have]
        os.environ[name] = ",".join(have + ours)


class Rates:
    """What work has cost on one class of device: seconds for one unit of each stage.

    Kept on disk, the last `KEEP` measurements of each. A unit is whatever makes a stage's cost
    proportional: see `backend.work_of`.
    """

    KEEP = 16

    def __init__(self, key: str, path: Path | None = None) -> None:
        self._key = key
        self._path = path or cache_folder() / "rates.json"
        self._lock = threading.Lock()
        self._seen: dict[str, list[float]] = defaultdict(list, self._read().get(key, {}))

    def learn(self, seconds: dict[str, float], work: dict[str, float]) -> None:
        """Remember that `work` units of each stage took `seconds`."""
        with self._lock:
            for stage in seconds.keys() & work.keys():
                if work[stage] > 0:
                    self._seen[stage] = [*self._seen[stage], seconds[stage] / work[stage]]
                    self._seen[stage] = self._seen[stage][-self.KEEP :]
            everyone = {**self._read(), self._key: dict(self._seen)}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            half = self._path.with_suffix(f".{os.getpid()}.part")
            half.write_text(json.dumps(everyone))
            os.replace(half, self._path)
        except OSError:
            return  # a read-only home only means that estimates start afresh next time

    def predict(self, stage: str, work: float) -> tuple[float, float] | None:
        """Seconds that `work` units of `stage` will take, (least, most); None if unknown.

        Of many measurements the middle half counts: one song made beside a video call is no reason
        to expect that of the next sixteen.
        """
        seen = sorted(self._seen.get(stage, ()))
        aside = len(seen) // 4
        return (seen[aside] * work, seen[-1 - aside] * work) if seen else None

    def usual(self, work: dict[str, float]) -> float | None:
        """The median seconds for all of `work`, or None while any stage is unknown."""
        if any(not self._seen.get(stage) for stage in work):
            return None
        return sum(statistics.median(self._seen[stage]) * units for stage, units in work.items())

    def _read(self) -> dict[str, dict[str, list[float]]]:
        try:
            found = json.loads(self._path.read_text())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}


def gpu_seconds(usual: float | None, guess: float, attempt: int = 1) -> int:
    """How many seconds to ask of ZeroGPU.

    Args:
        usual: the median need, if it was ever measured here.
        guess: a cautious estimate for when it was not.
        attempt: 2 after the first was aborted: twice as much is asked.
    """
    low, high = ZERO_SECONDS
    wanted = usual * MARGIN if usual is not None else min(max(guess, low), high)
    return min(math.ceil(wanted * attempt), high)


class Clock:
    """Says how long a job will still take, from what it has shown and what others have cost.

    Args:
        rates: the costs known so far.
        work: units of every stage that lies ahead, in order.
    """

    def __init__(self, rates: Rates, work: dict[str, float], now: Callable[[], float]) -> None:
        self._rates, self._work, self._now = rates, work, now
        self._began = now()
        self._stage, self._since = "", self._began
        self._first = self._newest = (0, self._began)
        self._last = Progress(stage="Waiting")

    def expect(self, work: dict[str, float]) -> None:
        """What lies ahead has become clearer: the units of every stage, in order."""
        self._work = work

    def tick(self, event: Progress | None = None) -> Progress:
        """`event` (or the last one again) with the time gone and the range of time left."""
        now = self._now()
        if event is not None:
            if event.stage != self._stage:
                self._stage, self._since, self._first = event.stage, now, (event.step, now)
            elif event.step and not self._first[0]:
                self._first = (event.step, now)  # the first step also pays for warming up
            self._newest, self._last = (event.step, now), event
        return self._last.model_copy(
            update={"elapsed_s": now - self._began, "left_s": self._left(now)}
        )

    def _left(self, now: float) -> tuple[float, float] | None:
        event, stages = self._last, list(self._work)
        if event.stage not in stages:
            return None
        here = self._left_here(now)
        ahead = [
            self._rates.predict(stage, self._work[stage])
            for stage in stages[stages.index(event.stage) + 1 :]
        ]
        if here is None or None in ahead:
            return None
        low, high = (here[i] + sum(span[i] for span in ahead) for i in (0, 1))
        return max(0.0, low * 0.9), max(0.0, high * 1.15)

    def _left_here(self, now: float) -> tuple[float, float] | None:
        event, (first, first_at), (newest, newest_at) = self._last, self._first, self._newest
        if first and newest > first:
            each = (newest_at - first_at) / (newest - first)
            left = max(0.0, each * (event.steps - newest) - (now - newest_at))
            return left, left
        span = self._rates.predict(event.stage, self._work[event.stage])
        gone = now - self._since
        return span and (max(0.0, span[0] - gone), max(0.0, span[1] - gone))


def _devices() -> list[str]:
    """What this machine can compute on, best first; asks torch only where it could say CUDA."""
    if ON_ZERO:
        return ["cuda", "cpu"]
    if sys.platform == "darwin":
        return ["mps", "cpu"] if os.uname().machine == "arm64" else ["cpu"]
    if "+cpu" in version("torch") or not _has_nvidia():
        return ["cpu"]
    import torch

    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def _has_nvidia() -> bool:
    return sys.platform == "win32" or any(
        Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version")
    )


def _dtype(device: str) -> str:
    """bfloat16 where the hardware computes it, else float32; never float16, which overflows.

    On a CPU it pays with AMX or AVX512-BF16: 1.9 times at the embedded model's width of 256, 4.3
    times at XL's 2560 (see `bench.py`). On Apple's GPUs it is not reliable.
    """
    if device == "cuda":
        if ON_ZERO:
            return "bfloat16"
        import torch

        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    if device == "cpu" and re.search(r"\b(amx_bf16|avx512_bf16)\b", _cpuinfo()):
        return "bfloat16"
    return "float32"


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


@cache
def _processor_name() -> str:
    import platform

    found = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _physical_cores() -> int:
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed or 1))
