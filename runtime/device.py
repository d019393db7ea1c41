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


# Where torchao is installed, importing diffusers makes these warn of nothing that is used here.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)


ON_ZERO = spaces.config.Config.zero_gpu
"""Whether this process is a ZeroGPU Space, where GPU work happens in a forked worker."""


ON_SPACE = ON_ZERO or bool(os.environ.get("SPACE_ID"))
"""Whether this is a Space, whose visitors may not change its models."""


KINDS = ("cpu", "cuda", "mps", "xpu")
"""Every kind of device, by torch's name: "cuda" is NVIDIA's or AMD's, "xpu" Intel's, "mps" Apple's."""


@dataclass(frozen=True)
class Device:
    """A device, chosen once at the start. Picklable.

    Attributes:
        kind: one of `KINDS`. AMD's GPUs are "cuda", as in torch.
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
    found = available()
    if device and device not in found:
        raise StudioError("device-missing", device=device)
    device = device or found[0]
    return Device(device, _dtype(device), startup.threads_set() or _physical_cores())


def set_threads(device: Device) -> None:
    """Fix the number of threads, so that a seed gives the same bits. Call before computing."""
    import torch

    torch.set_num_threads(device.threads)


@cache
def device_name(device: str) -> str:
    """The manufacturer's name of the device."""
    if has_own_memory(device):
        return "ZeroGPU" if ON_ZERO else str(backend(device).get_device_name())
    return _processor_name()


def backend(device: str) -> Any:
    """torch's module for a device, such as `torch.cuda` for "cuda"."""
    import torch

    return getattr(torch, device)


def has_own_memory(device: str) -> bool:
    """Whether the device is a GPU with memory of its own; Apple's share that of the machine."""
    return device in ("cuda", "xpu")


def memory_gb(device: str) -> float:
    """Total memory of `device` in GB; for Apple's chips and CPUs that of the machine.

    0 for a GPU that is not there.
    """
    if ON_ZERO:
        return 48.0  # a "large" slice, as its documentation says
    if has_own_memory(device):
        if device not in available():
            return 0.0
        return backend(device).get_device_properties(0).total_memory / 1e9
    import psutil

    return psutil.virtual_memory().total / 1e9


def free_gb(device: str) -> float:
    """Memory of `device` in GB that no program uses."""
    if has_own_memory(device):
        return backend(device).mem_get_info()[0] / 1e9
    import psutil

    return psutil.virtual_memory().available / 1e9


def driver(device: str) -> str:
    """The software that torch reaches the device by: "CUDA 13.0", "ROCm 6.4", "Metal"."""
    if device == "mps":
        return "Metal"
    if device == "cpu":
        return "none"
    import torch

    if device == "xpu":
        version_ = getattr(backend(device).get_device_properties(0), "driver_version", "")
        return f"Level Zero {version_}".strip()
    hip = getattr(torch.version, "hip", None)
    if hip:
        return f"ROCm {hip}"
    try:
        text = Path("/proc/driver/nvidia/version").read_text("ascii", "replace")
    except OSError:
        text = ""
    number = re.search(r"Kernel Module\D*([\d.]+)", text)
    return f"CUDA {torch.version.cuda}" + (f", driver {number[1]}" if number else "")


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
    if device != "cpu":
        backend(device).empty_cache()


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


def available() -> list[str]:
    """The devices of this machine, best first; imports torch only where there may be a GPU."""
    if ON_ZERO:
        return ["cuda", "cpu"]
    if sys.platform == "darwin":
        return ["mps", "cpu"] if os.uname().machine == "arm64" else ["cpu"]
    build = version("torch")
    if "+cpu" in build:
        return ["cpu"]
    kind = "xpu" if "+xpu" in build else "cuda"  # a build of torch is for one maker's GPUs
    if not _has_driver(kind):
        return ["cpu"]
    return [kind, "cpu"] if backend(kind).is_available() else ["cpu"]


DRIVER_FILES = {
    "cuda": ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version", "/dev/kfd"),
    "xpu": ("/dev/dri", "/dev/dxg"),
}
"""Files that a GPU's driver makes on Linux; /dev/kfd is AMD's, /dev/dxg is of Windows' subsystem."""


def _has_driver(kind: str) -> bool:
    return sys.platform == "win32" or any(Path(p).exists() for p in DRIVER_FILES[kind])


def _dtype(device: str) -> str:
    """bfloat16 where the hardware computes it, else float32; never float16, which overflows.

    On a CPU it pays with AMX or AVX512-BF16: 1.9 times at the embedded model's width of 256, 4.3
    times at XL's 2560 (see `bench.py`). On Apple's GPUs it is not reliable. AMD's and Intel's GPUs
    that torch supports have it; of NVIDIA's those since Ampere.
    """
    if ON_ZERO and device == "cuda":
        return "bfloat16"
    if device == "xpu":
        return "bfloat16"
    if device == "cuda":
        import torch

        recent = torch.cuda.get_device_capability() >= (8, 0)
        return "bfloat16" if getattr(torch.version, "hip", None) or recent else "float32"
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
