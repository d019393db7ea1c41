"""The device: its kind, number format, threads and memory, and ZeroGPU.

The only module that imports `spaces`. It must be imported before anything touches CUDA, so that
ZeroGPU can defer it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import spaces
import spaces.config

from core import startup
from core.errors import StudioError
from core.results import DeviceUsed

# OpenMP reads this when torch loads it: waiting threads sleep. Spinning ones stall each other as soon
# as another program wants a core; the embedded model then sampled eight times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# Loading a model from a folder would otherwise tell the hub what is running here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


# diffusers imports it where it is installed, and it reports each of its CUDA kernels that this
# computer cannot load.
logging.getLogger("torchao").setLevel(logging.ERROR)


ON_ZERO = spaces.config.Config.zero_gpu
"""Whether this process is a ZeroGPU Space, where GPU work happens in a forked worker."""


ON_SPACE = ON_ZERO or bool(os.environ.get("SPACE_ID"))
"""Whether this is a Space, whose visitors may not change its models."""


@dataclass(frozen=True)
class Device:
    """A device, chosen once at the start. Picklable.

    Attributes:
        kind: "cpu", "cuda" or "mps".
        dtype: of the transformer, "float32" or "bfloat16".
        threads: for work on the CPU; their number decides how sums round.
    """

    kind: str
    dtype: str
    threads: int

    @property
    def speed_class(self) -> str:
        """The key under which rates are kept: such machines take about equally long."""
        return f"{self.kind}:{device_name(self.kind)}:{self.dtype}:{self.threads}"

    def used(self) -> DeviceUsed:
        """This device as a take records it."""
        return DeviceUsed(
            kind=self.kind,
            name=device_name(self.kind),
            dtype=self.dtype,
            threads=self.threads,
            torch=version("torch"),
        )


def find_device(device: str | None = None) -> Device:
    """The device to use: `device` if given, else the best that this machine has.

    Raises:
        StudioError: `device-missing`; `value-out-of-range` for a wrong ACE_THREADS.
    """
    available = _devices()
    if device and device not in available:
        raise StudioError("device-missing", device=device)
    device = device or available[0]
    return Device(device, _dtype(device), startup.threads_set() or _physical_cores())


def set_threads(device: Device) -> None:
    """Fix the number of threads, so that a seed gives the same bits. Call before computing."""
    import torch

    torch.set_num_threads(device.threads)


@cache
def device_name(device: str) -> str:
    """The manufacturer's name of the device."""
    if device == "cuda" and not ON_ZERO:
        import torch

        return torch.cuda.get_device_name()
    if device == "cuda":
        return "ZeroGPU"
    return _processor_name()


def memory_gb(device: str) -> float:
    """Total memory of `device` in GB; for Apple's chips and CPUs that of the machine."""
    if ON_ZERO:
        return 48.0  # a "large" slice, as its documentation says
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory / 1e9
    import psutil

    return psutil.virtual_memory().total / 1e9


def exceed_memory(sizes: Sequence[int], device: str) -> bool:
    """Whether models of these sizes in bytes do not fit into memory together.

    Counted are all of them with a tenth more, and 4 GB to work in.
    """
    return 1.1 * sum(sizes) / 1e9 + 4 > memory_gb(device)


def free(device: str, everything: bool = False) -> None:
    """Return unused memory to the device and to the machine.

    Args:
        everything: also collect what `gc.freeze` set aside. The libraries alone are half a million
            objects, and while they are traversed no request is answered.
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


def gpu(seconds: Callable[..., int]) -> Callable[[Any], Any]:
    """A decorator for generator functions that need the GPU; `seconds` gets their arguments.

    On ZeroGPU they run in a forked process that is granted for that long. Elsewhere nothing
    changes.
    """
    return spaces.GPU(duration=seconds)


def gpu_trouble(error: BaseException) -> str | None:
    """What an exception of ZeroGPU means: "aborted", or why it refused; None for any other.

    `spaces` raises `gr.Error`, which is recognised by its title, so that Gradio is not needed here.
    """
    title = str(getattr(error, "title", ""))
    if "ZeroGPU" not in title:
        return None
    reason = re.sub(r"<[^>]*>", "", str(getattr(error, "message", error))).strip().rstrip(".")
    return "aborted" if "aborted" in reason.lower() else reason or "no reason given"


def reach_loopback() -> None:
    """Keep requests to this machine away from the proxies in the environment."""
    for name in ("NO_PROXY", "no_proxy"):
        have = [h for h in os.environ.get(name, "").split(",") if h]
        ours = [h for h in ("127.0.0.1", "localhost", "0.0.0.0", "::1") if h not in have]
        os.environ[name] = ",".join(have + ours)


def _devices() -> list[str]:
    """The devices of this machine, best first; imports torch only where there may be CUDA."""
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
