"""Where the parts of a pipeline are: on the device, or in main memory until they run.

A weight that waits is copied to the device before its module runs and dropped there afterwards; the
copy in main memory never changes, so nothing is copied back, and the samples are the same bit for bit.
diffusers' group offloading moves a module only when its model's own forward pass comes by: it would
miss adapters that were added later, and the constants that `fast_transformer` computes once a song.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ENCODERS = ("text_encoder", "condition_encoder")
"""The parts that run once a song, before the first step."""

OWN_MEMORY = ("cuda", "xpu")
"""Devices with memory of their own; main memory is the others' memory too."""


def quantize(transformer: torch.nn.Module, precision: str, dtype: torch.dtype) -> None:
    """Replace, in place, the weights of the transformer's layers by 8-bit ones.

    Each row of a matrix gets a scale; products are computed in `dtype`. What every layer shares,
    1.5 % of XL, stays as it is. Layer by layer, so that no second copy of the model exists.

    Args:
        precision: "int8" or "fp8".
        dtype: number type of everything else.
    """
    import torch
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if precision == "int8" else Float8WeightOnlyConfig()
    for layer in transformer.layers:
        layer.to(dtype)
        quantize_(layer, config, filter_fn=lambda module, _: isinstance(module, torch.nn.Linear))
    for part in transformer.children():
        if part is not transformer.layers:
            part.to(dtype)
    for tensor in (*transformer.parameters(recurse=False), *transformer.buffers(recurse=False)):
        tensor.data = tensor.data.to(dtype)


class OnDemand:
    """Modules whose weights are on the device only while they run.

    Args:
        units: modules that move as a whole, in the order in which they run.
        device: "cuda" or "xpu"; anything else works too, without a gain.
        ahead: whether to copy the next unit while one computes, where the device can do both.
    """

    def __init__(self, units: Sequence[torch.nn.Module], device: str, ahead: bool) -> None:
        import torch

        self._device = device
        self._here: dict[torch.nn.Module, list[tuple[dict[str, Any], str, torch.Tensor]]] = {}
        self._events: dict[torch.nn.Module, Any] = {}
        streams = ahead and device in OWN_MEMORY
        self._backend = getattr(torch, device) if streams else None
        self._copies = self._backend.Stream() if self._backend else None
        following = dict(zip(units, [*units[1:], units[0]], strict=True)) if ahead else {}
        for unit in units:
            if streams:
                _pin(unit)
            unit.register_forward_pre_hook(self._before(unit, following.get(unit)))
            unit.register_forward_hook(self._after(unit), always_call=True)

    @property
    def on_device(self) -> int:
        """How many units are on the device now."""
        return len(self._here)

    @contextmanager
    def resident(self, unit: torch.nn.Module) -> Iterator[None]:
        """Keep `unit` on the device within the block, for calls of its parts alone."""
        self._bring(unit)
        self._wait(unit)
        try:
            yield
        finally:
            self._drop(unit)

    def _before(
        self, unit: torch.nn.Module, following: torch.nn.Module | None
    ) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._bring(unit)
            if following is not None:
                self._bring(following)
            self._wait(unit)

        return hook

    def _after(self, unit: torch.nn.Module) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._drop(unit)

        return hook

    def _bring(self, unit: torch.nn.Module) -> None:
        """Begin to copy the weights of `unit`, adapters included, unless they are there."""
        if unit in self._here:
            return
        copying: AbstractContextManager[Any] = nullcontext()
        if self._backend:
            # Memory that a finished unit has freed is used again only after its last kernel.
            self._copies.wait_stream(self._backend.current_stream())
            copying = self._backend.stream(self._copies)
        moved = self._here[unit] = []
        with copying:
            for table, name, tensor in _tensors(unit):
                moved.append((table, name, tensor))
                table[name] = _changed(tensor, lambda t: t.to(self._device, non_blocking=True))
        if self._backend:
            self._events[unit] = self._backend.Event()
            self._events[unit].record(self._copies)

    def _wait(self, unit: torch.nn.Module) -> None:
        if self._backend:
            self._backend.current_stream().wait_event(self._events[unit])

    def _drop(self, unit: torch.nn.Module) -> None:
        for table, name, tensor in self._here.pop(unit, ()):
            table[name] = tensor
        self._events.pop(unit, None)


class Reread:
    """Encoders that are freed after use and read from disk again before the next song.

    Args:
        read: makes the encoders new, on the CPU, by their names in the pipeline.
    """

    def __init__(
        self, pipe: Any, device: str, read: Callable[[], dict[str, torch.nn.Module]]
    ) -> None:
        self._pipe, self._device, self._read, self._freed = pipe, device, read, False

    @contextmanager
    def loaded(self) -> Iterator[torch.nn.Module]:
        """Have the encoders in memory within the block; gives the condition encoder."""
        if self._freed:
            for name, part in self._read().items():
                setattr(self._pipe, name, part.to(self._device))
            self._freed = False
        try:
            yield self._pipe.condition_encoder
        finally:
            for name in ENCODERS:
                getattr(self._pipe, name).to("meta")
            self._freed = True


def reread_encoders(
    pipe: Any, device: str, offload: str, model: Any, folder: Path, dtype: torch.dtype
) -> Reread | None:
    """What reads the encoders of the checkpoint in `folder` again, where the plan frees them."""
    from models.loading import load_encoders

    if offload != "encoders" or device in OWN_MEMORY:
        return None
    return Reread(pipe, device, partial(load_encoders, model, folder, dtype))


def move(pipe: Any, device: str, offload: str) -> OnDemand | None:
    """Move the pipeline to `device`, and let wait what the plan wants to wait.

    Args:
        offload: "none", "encoders" or "blocks"; see `runtime.memory_plan`.

    Returns:
        The transformer's layers, where they wait.
    """
    if offload == "none" or device not in OWN_MEMORY:
        pipe.to(device)
        return None
    for part in ENCODERS:
        encoder = getattr(pipe, part)
        units = list(_units(encoder))
        OnDemand(units, device, ahead=False)
        _move_rest(encoder, units, device)
    layers = None
    if offload == "blocks":
        units = list(pipe.transformer.layers)
        layers = OnDemand(units, device, ahead=True)
        _move_rest(pipe.transformer, units, device)
    else:
        pipe.transformer.to(device)
    for part in ("vae", "audio_tokenizer", "audio_token_detokenizer"):
        if getattr(pipe, part) is not None:
            getattr(pipe, part).to(device)
    return layers


def _units(encoder: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers of an encoder, and its embedding of words, which is as large as eight of them."""
    import torch

    for module in encoder.modules():
        if isinstance(module, torch.nn.ModuleList):
            yield from module
        elif isinstance(module, torch.nn.Embedding):
            yield module


def _move_rest(model: torch.nn.Module, units: Sequence[torch.nn.Module], device: str) -> None:
    """Move what belongs to none of `units` for good."""
    waiting = {id(table) for unit in units for table, *_ in _tensors(unit)}
    for table, name, tensor in _tensors(model):
        if id(table) not in waiting:
            table[name] = _changed(tensor, lambda t: t.to(device))


def _tensors(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every parameter and buffer below `module`, with the table that holds it and its name."""
    for each in list(module.modules()):
        for kind in ("_parameters", "_buffers"):
            table = vars(each)[kind]
            for name, tensor in list(table.items()):
                if tensor is not None:
                    yield table, name, tensor


def _changed(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`tensor` with its numbers replaced by what `change` makes of them.

    A quantised tensor is taken apart: its own `to` does not accept `non_blocking`.
    """
    import torch

    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        inner = {name: change(getattr(tensor, name)) for name in names}
        size, stride = tensor.size(), tensor.stride()
        changed = type(tensor).__tensor_unflatten__(inner, context, size, stride)
    else:
        changed = change(tensor.detach())
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(changed, requires_grad=False)
    return changed


def _pin(unit: torch.nn.Module) -> None:
    """Lock the weights in main memory, from where copies do not hold up the computation."""
    for table, name, tensor in _tensors(unit):
        try:
            table[name] = _changed(tensor, lambda t: t.pin_memory())
        except (NotImplementedError, RuntimeError):
            return  # copies are slower from here, and the same
