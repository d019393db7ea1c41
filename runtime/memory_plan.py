"""Which precision, offloading and tile size let a model fit the memory of a device.

A pure function of numbers, decided before anything is loaded. Sizes are in GB of 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PRECISIONS = ("bf16", "float32", "int8", "fp8")
"""Number types of the transformer; int8 and fp8 are weights alone, computed in bfloat16."""


OFFLOADS = ("none", "encoders", "blocks")
"""What leaves the device: nothing; the encoders after use; the transformer's blocks too. Where main
memory is the device's own, encoders are freed and read from disk again."""


BYTES = {"bf16": 2.0, "float32": 4.0, "int8": 1.03, "fp8": 1.03}
"""Bytes per weight of the transformer, scales included."""


ACTIVATIONS_GB = 0.51
"""Peak of a guided step at 240 s in bfloat16, by fused attention; float32 doubles it."""


TILES_GB = {256: 0.79, 128: 0.51, 64: 0.36}
"""Peak of decoding one tile of so many latent frames in bfloat16; float32 doubles it."""


CONTEXT_GB = 0.7
"""What the driver and its libraries take on a GPU."""


USABLE = {"cpu": 0.85, "mps": 0.8}
"""Share of the memory that may be used; the rest is the system's. On a GPU: `USABLE_GPU`."""


USABLE_GPU = 0.95


STREAMED_BLOCKS = 3
"""Blocks of the transformer on the GPU at a time while the others wait in main memory."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters of the parts of a model, and of its planner (0 for none)."""

    transformer: int
    encoders: int
    vae: int
    audio_codes: int
    blocks: int
    planner: int = 0


XL = ModelSizes(4_168_897_088, 1_205_000_000, 168_000_000, 210_000_000, blocks=32)
"""Condition and text encoder together; VAE; audio tokenizer and detokenizer. Counted."""


TWO_B = ModelSizes(1_575_458_880, 1_205_000_000, 168_000_000, 210_000_000, blocks=24)


PLANNERS = {"0.6B": 665_000_000, "1.7B": 1_855_000_000, "4B": 4_190_000_000}
"""Parameters of the planners."""


@dataclass(frozen=True)
class MemoryPlan:
    """How to load a model.

    Attributes:
        precision: one of `PRECISIONS`.
        offload: one of `OFFLOADS`.
        planner_in_turn: whether the planner leaves the device before the transformer comes.
        tile: latent frames that the VAE decodes at a time.
        reason: one sentence for people, with the memory needed.
        needed_gb: estimated peak on the device.
        fits: whether that is available; if not, this is the smallest way there is.
    """

    precision: str
    offload: str
    planner_in_turn: bool
    tile: int
    reason: str
    needed_gb: float
    fits: bool = True


def plan(
    device: str,
    memory_gb: float,
    sizes: ModelSizes,
    *,
    precision: str = "auto",
    offload: str = "auto",
    int8_available: bool = True,
) -> MemoryPlan:
    """Choose the fastest way of loading that fits, the most exact first.

    Args:
        device: "cpu", "mps", or a GPU: "cuda" (ROCm calls itself so too) or "xpu".
        memory_gb: total memory of the device; of the computer for "cpu" and "mps".
        precision, offload: what the person asked for, or "auto".
        int8_available: whether torchao is installed.

    Raises:
        ValueError: an unknown precision or offload.
    """
    if precision not in ("auto", *PRECISIONS) or offload not in ("auto", *OFFLOADS):
        raise ValueError(f"unknown precision or offload: {precision}, {offload}")
    usable_gb = memory_gb * USABLE.get(device, USABLE_GPU)
    smallest = None
    for kind, where, one_at_a_time in _candidates(
        device, sizes, precision, offload, int8_available
    ):
        for tile in TILES_GB:
            needed_gb = round(_needed_gb(device, sizes, kind, where, one_at_a_time, tile), 2)
            fits = needed_gb <= usable_gb
            reason = _reason(device, memory_gb, needed_gb, fits)
            if not int8_available and kind not in ("int8", "fp8") and where == "blocks":
                reason += " int8 would be faster: pip install torchao."
            found = MemoryPlan(kind, where, one_at_a_time, tile, reason, needed_gb, fits)
            if fits:
                return found
            if smallest is None or needed_gb < smallest.needed_gb:
                smallest = found
    assert smallest is not None  # every request leaves at least one candidate
    return smallest


def _candidates(
    device: str, sizes: ModelSizes, precision: str, offload: str, int8_available: bool
) -> Iterator[tuple[str, str, bool]]:
    """(precision, offload, planner in turn), the most exact and fastest first."""
    turns = (False, True) if sizes.planner else (False,)
    if device in ("cpu", "mps"):  # main memory is the device's own: blocks have nowhere to wait
        automatic = ["float32"]  # bfloat16 cannot be trusted on Apple's GPUs
        if device == "cpu":
            automatic += ["int8", "bf16"] if int8_available else ["bf16"]
        for kind in automatic if precision == "auto" else [precision]:
            if offload != "encoders":
                yield from ((kind, "none", one_at_a_time) for one_at_a_time in turns)
            if offload in ("auto", "encoders"):
                yield kind, "encoders", turns[-1]
        return
    automatic = ["bf16", "int8"] if int8_available else ["bf16"]
    kinds = automatic if precision == "auto" else [precision]
    ladder = [(kind, where) for kind in kinds for where in ("none", "encoders")]
    ladder += [(kind, "blocks") for kind in reversed(kinds)]  # fewer bytes to stream first
    for kind, where in ladder:
        if offload in ("auto", where):
            for one_at_a_time in turns if where == "none" else turns[-1:]:
                yield kind, where, one_at_a_time


def _needed_gb(
    device: str, sizes: ModelSizes, precision: str, offload: str, planner_in_turn: bool, tile: int
) -> float:
    """Estimated peak on the device, the weights and the largest working set together."""
    wide = precision == "float32" or device == "cpu"  # on a CPU the small parts stay float32
    rest_bytes = 4.0 if wide else 2.0
    transformer = sizes.transformer * BYTES[precision] / 1e9
    if offload == "blocks":
        transformer *= STREAMED_BLOCKS / sizes.blocks
    encoders = sizes.encoders * rest_bytes / 1e9
    decoding = (sizes.vae + sizes.audio_codes) * rest_bytes / 1e9
    planner = sizes.planner * (4.0 if device in ("cpu", "mps") else 2.0) / 1e9
    activations = max(ACTIVATIONS_GB, TILES_GB[tile]) * (2 if wide else 1)
    song = transformer + decoding + activations
    if offload == "none":
        song += encoders
    else:
        song = max(song, encoders + decoding)
    context = 0.0 if device in ("cpu", "mps") else CONTEXT_GB
    return context + (max(song, planner) if planner_in_turn else song + planner)


def _reason(device: str, memory_gb: float, needed_gb: float, fits: bool) -> str:
    where = "memory" if device in ("cpu", "mps") else "GPU memory"
    if fits:
        return f"Needs about {needed_gb:.1f} of {memory_gb:g} GB of {where}."
    return (
        f"Needs about {needed_gb:.1f} GB of {where}, and there are {memory_gb:g}: "
        "choose a smaller model."
    )
