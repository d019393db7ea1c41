"""Which precision, offloading and tile size let a model fit the memory of a device.

A pure function of numbers, decided before anything is loaded. Sizes are in GB of 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

PRECISIONS = ("bf16", "float32", "int8", "fp8")
"""Number types of the transformer; of int8 and fp8 only the weights, which are computed in bfloat16
or float32."""


QUANTIZED = ("int8", "fp8")
"""Precisions that need torchao."""


GET_TORCHAO = "pip install -e '.[int8]'"


DTYPES = {"bf16": "bfloat16", "float32": "float32"}
"""torch's name of a precision; its inverse gives the precision of a device's own number type."""


OFFLOADS = ("none", "encoders", "blocks")
"""What waits in main memory: nothing; the encoders; the transformer's blocks too. Each part is on the
device only while it runs. Where main memory is the device's own, encoders are freed after use and read
from disk again, and blocks stay."""


BYTES = {"bf16": 2.0, "float32": 4.0, "int8": 1.03, "fp8": 1.03}
"""Bytes per weight of the transformer, scales included."""


ACTIVATIONS_GB = 0.51
"""Peak of a guided step at 240 s in bfloat16, by fused attention; float32 doubles it. The encoders'
largest part and their own activations need less."""


TILES_GB = {256: 0.79, 128: 0.51, 64: 0.36}
"""Peak of decoding one tile of so many latent frames in bfloat16; float32 doubles it."""


CONTEXT_GB = 0.7
"""What the driver and its libraries take on a GPU."""


USABLE = {"cpu": 0.85, "mps": 0.8}
"""Share of the memory that may be used; the rest is the system's. On a GPU: `USABLE_GPU`."""


USABLE_GPU = 0.95


STREAMED_BLOCKS = 3
"""Blocks of the transformer on the GPU at a time while the others wait in main memory."""


STEP_GB = 0.1
"""What a smaller plan must save to be worth a second try."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters of the parts of a model, and of its planner (0 for none).

    `encoders` are the condition and the text encoder, `audio_codes` the audio tokenizer and
    detokenizer, `blocks` the number of the transformer's layers.
    """

    transformer: int
    encoders: int
    vae: int
    audio_codes: int
    blocks: int
    planner: int = 0


XL = ModelSizes(4_168_897_088, 1_205_106_176, 168_695_426, 210_043_974, blocks=32)
"""Counted on torch's meta device from the published configurations."""


TWO_B = ModelSizes(1_575_458_880, 1_205_106_176, 168_695_426, 210_043_974, blocks=24)


@dataclass(frozen=True)
class MemoryPlan:
    """How to load a model.

    Attributes:
        precision: one of `PRECISIONS`.
        dtype: number type of what is computed, "float32" or "bfloat16".
        offload: one of `OFFLOADS`.
        planner_in_turn: whether the planner leaves the device before the transformer comes.
        tile: latent frames that the VAE decodes at a time.
        reason: for people: the memory needed, and what else there is to know.
        needed_gb: estimated peak on the device.
        fits: whether that is available; if not, this is the smallest way there is.
        fallback: the next smaller plan, for the case that memory runs out all the same.
    """

    precision: str = "float32"
    dtype: str = "float32"
    offload: str = "none"
    planner_in_turn: bool = False
    tile: int = max(TILES_GB)
    reason: str = ""
    needed_gb: float = 0.0
    fits: bool = True
    fallback: MemoryPlan | None = None

    @property
    def quantized(self) -> str:
        """The precision of quantised weights, or empty."""
        return self.precision if self.precision in QUANTIZED else ""

    @property
    def plain(self) -> bool:
        """Whether everything is loaded as it is, and stays on the device."""
        return not self.quantized and self.offload == "none"

    @property
    def title(self) -> str:
        """A few words for people: "bfloat16", "int8 weights, encoders offloaded"."""
        words = [f"{self.quantized} weights" if self.quantized else self.dtype]
        if self.offload != "none":
            words.append({"encoders": "encoders", "blocks": "layers"}[self.offload] + " offloaded")
        return ", ".join(words)

    def settings(self) -> dict[str, str | bool | int]:
        """What a take records of the plan."""
        return {
            "precision": self.precision,
            "offload": self.offload,
            "planner_in_turn": self.planner_in_turn,
            "tile": self.tile,
        }


PLAIN = MemoryPlan()
"""Everything as it is, in the device's own number type."""


def plan(
    device: str,
    memory_gb: float,
    sizes: ModelSizes,
    *,
    precision: str = "auto",
    offload: str = "auto",
    int8_available: bool = True,
    native: str = "",
) -> MemoryPlan:
    """Choose the fastest way of loading that fits, the most exact first.

    Args:
        device: "cpu", "mps", or a GPU: "cuda" (ROCm calls itself so too) or "xpu".
        memory_gb: total memory of the device; of the computer for "cpu" and "mps".
        precision, offload: what the person asked for, or "auto".
        int8_available: whether torchao is installed.
        native: "bf16" or "float32", the number type that the device computes best; float32 on
            "cpu" and "mps" and bf16 on a GPU if empty.

    Raises:
        ValueError: an unknown precision or offload.
    """
    if precision not in ("auto", *PRECISIONS) or offload not in ("auto", *OFFLOADS):
        raise ValueError(f"unknown precision or offload: {precision}, {offload}")
    native = native or ("float32" if device in USABLE else "bf16")
    remark = ""
    if precision in QUANTIZED and not int8_available:
        remark = f" {precision} needs torchao: {GET_TORCHAO}."
        precision = "auto"
    if offload == "blocks" and device in USABLE:
        remark += " Layers stay: this device has no memory of its own."
        offload = "auto"
    plans = list(_plans(device, memory_gb, sizes, precision, offload, int8_available, native))
    chosen = next((i for i, each in enumerate(plans) if each.fits), None)
    if chosen is None:
        chosen = min(range(len(plans)), key=lambda i: plans[i].needed_gb)
    found = plans[chosen]
    if not int8_available and not found.quantized and found.offload == "blocks" and not remark:
        remark = f" int8 would be faster, and needs torchao: {GET_TORCHAO}."
    smaller = (r for r in plans[chosen + 1 :] if r.needed_gb <= found.needed_gb - STEP_GB)
    return replace(found, reason=found.reason + remark, fallback=next(smaller, None))


def _plans(
    device: str,
    memory_gb: float,
    sizes: ModelSizes,
    precision: str,
    offload: str,
    int8_available: bool,
    native: str,
) -> Iterator[MemoryPlan]:
    """Every plan that the request allows, the best first."""
    usable_gb = memory_gb * USABLE.get(device, USABLE_GPU)
    for kind, where, one_at_a_time in _candidates(
        device, sizes, precision, offload, int8_available, native
    ):
        dtype = DTYPES.get(kind, DTYPES[native])
        for tile in TILES_GB:
            needed_gb = _needed_gb(device, sizes, kind, dtype, where, one_at_a_time, tile)
            needed_gb = round(needed_gb, 2)
            fits = needed_gb <= usable_gb
            reason = _reason(device, memory_gb, needed_gb, fits)
            yield MemoryPlan(kind, dtype, where, one_at_a_time, tile, reason, needed_gb, fits)


def _candidates(
    device: str, sizes: ModelSizes, precision: str, offload: str, int8_available: bool, native: str
) -> Iterator[tuple[str, str, bool]]:
    """(precision, offload, planner in turn), the most exact and fastest first."""
    turns = (False, True) if sizes.planner else (False,)
    kinds = [precision]
    if precision == "auto":
        kinds = [native]
        if int8_available and device != "mps":
            kinds.append("int8")
        if device == "cpu" and native != "bf16":
            kinds.append("bf16")  # half the memory, but slow where the processor lacks it
    if device in USABLE:  # main memory is the device's own: blocks have nowhere to wait
        for kind in kinds:
            if offload != "encoders":
                yield from ((kind, "none", one_at_a_time) for one_at_a_time in turns)
            if offload in ("auto", "encoders"):
                yield kind, "encoders", turns[-1]
        return
    plans = [(kind, where) for kind in kinds for where in ("none", "encoders")]
    plans += [(kind, "blocks") for kind in reversed(kinds)]  # fewer bytes to stream first
    for kind, where in plans:
        if offload in ("auto", where):
            for one_at_a_time in turns if where == "none" else turns[-1:]:
                yield kind, where, one_at_a_time


def _needed_gb(
    device: str,
    sizes: ModelSizes,
    precision: str,
    dtype: str,
    offload: str,
    planner_in_turn: bool,
    tile: int,
) -> float:
    """Estimated peak on the device, the weights and the largest working set together."""
    wide = dtype == "float32" or device == "cpu"  # on a CPU the small parts stay float32
    rest_bytes = 4.0 if wide else 2.0
    transformer = sizes.transformer * BYTES[precision] / 1e9
    if offload == "blocks":
        transformer *= STREAMED_BLOCKS / sizes.blocks
    encoders = sizes.encoders * rest_bytes / 1e9
    decoding = (sizes.vae + sizes.audio_codes) * rest_bytes / 1e9
    planner = sizes.planner * (4.0 if device in USABLE else rest_bytes) / 1e9
    share = min(1.0, sizes.transformer / TWO_B.transformer)  # of a model far smaller than these
    activations = share * max(ACTIVATIONS_GB, TILES_GB[tile]) * (2 if wide else 1)
    if offload == "none":
        song = transformer + decoding + encoders + activations
    elif device in USABLE:  # freed after use, and until then there beside the transformer
        song = transformer + decoding + max(encoders, activations)
    else:
        song = transformer + decoding + activations
    context = 0.0 if device in USABLE else CONTEXT_GB
    return context + (max(song, planner) if planner_in_turn else song + planner)


def _reason(device: str, memory_gb: float, needed_gb: float, fits: bool) -> str:
    where = "memory" if device in USABLE else "GPU memory"
    if fits:
        return f"Needs about {needed_gb:.1f} of {memory_gb:.3g} GB of {where}."
    return (
        f"Needs about {needed_gb:.1f} GB of {where}, and there are {memory_gb:.3g}: "
        "choose a smaller model."
    )
