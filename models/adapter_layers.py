"""Adapters applied to a transformer: any number at once, each at its own strength.

They are computed beside the weights and never merged into them, so that removing one restores the
model exactly. The reason for doing this here and not with PEFT is LoKr, which PEFT expands to full
matrices: one for all layers of XL would be as large as XL.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from core.errors import StudioError
from core.params import MAX_ADAPTER_STRENGTH
from core.results import AdapterUsed, Progress
from models import adapter_files
from models.adapter_config import refused, unreadable
from models.loading import is_finite

if TYPE_CHECKING:
    import torch


DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""torch's number types by their safetensors names."""


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that can be adapted, from the transformer's config.json.

    For the convolution of the patches, `in` is the size of one patch: channels times frames.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    shared = config["num_key_value_heads"] * config["head_dim"]
    found = {
        "condition_embedder": (width, config.get("encoder_hidden_size") or width),
        "proj_in_conv": (width, config["in_channels"] * config["patch_size"]),
    }
    for time in ("time_embed", "time_embed_r"):
        found[f"{time}.linear_1"] = (width, 256)
        found[f"{time}.linear_2"] = (width, width)
        found[f"{time}.time_proj"] = (6 * width, width)
    for layer in range(config["num_hidden_layers"]):
        for block in (f"layers.{layer}.self_attn", f"layers.{layer}.cross_attn"):
            found[f"{block}.to_q"] = (heads, width)
            found[f"{block}.to_k"] = found[f"{block}.to_v"] = (shared, width)
            found[f"{block}.to_out.0"] = (width, heads)
        for side in ("gate", "up"):
            found[f"layers.{layer}.mlp.{side}_proj"] = (inner, width)
        found[f"layers.{layer}.mlp.down_proj"] = (width, inner)
    return found


def check_fit(
    adapter: adapter_files.Adapter, layers: Mapping[str, tuple[int, int]], title: str
) -> None:
    """Check that an adapter was made for this model.

    Args:
        layers: (out, in) by layer name, as from `shapes`.
        title: the model's name, for the message.

    Raises:
        StudioError: `adapter-wrong-base`, naming what differs.
    """
    if problem := _mismatch(adapter.deltas, layers):
        raise StudioError("adapter-wrong-base", name=adapter.name, model=title, problem=problem)


class AdapterStack:
    """The adapters applied to one transformer. A transformer has one stack; not thread-safe."""

    def __init__(self, transformer: torch.nn.Module, title: str) -> None:
        """
        Args:
            transformer: an `AceStepTransformer1DModel`, on any device, in any float type.
            title: the model's name, for messages.
        """
        import torch

        self.used: tuple[AdapterUsed, ...] = ()
        self._title = title
        self._transformer = transformer
        self._layers = {
            name: module
            for name, module in transformer.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)
        }
        self._loaded: dict[str, dict[str, torch.nn.Module]] = {}
        self._hooks: list[Any] = []
        self._not_run: set[tuple[str, str]] = set()

    def apply(
        self, chosen: Sequence[tuple[adapter_files.Adapter, float]]
    ) -> Generator[Progress, None, tuple[AdapterUsed, ...]]:
        """Apply these adapters, and no others, from the next forward pass on.

        Their order makes no difference, bit for bit. Of the same file twice, the later strength
        counts. Strength-0 adapters are validated but not applied. Adapters that are loaded already
        are not read again. Until the generator has ended, and if it fails or is closed, everything
        stays as it was.

        Args:
            chosen: adapters with their strengths, 0 to `STRONGEST`.

        Returns:
            `used`: what is applied now (as the generator's return value).

        Raises:
            StudioError: `value-out-of-range`, `adapter-wrong-base`, `adapter-missing`,
                `adapter-unreadable`, `adapter-refused`.
        """
        requested = {}
        layers = {n: (len(m.weight), m.weight.shape[1:].numel()) for n, m in self._layers.items()}
        for adapter, strength in chosen:
            _check_strength(adapter, strength)
            check_fit(adapter, layers, self._title)
            requested[adapter.sha256] = (adapter, float(strength))
        active = [requested[key] for key in sorted(requested) if requested[key][1] > 0]
        loaded = {}
        for step, (adapter, _) in enumerate(active):
            yield Progress(stage="Reading adapters", step=step, steps=len(active))
            ready = self._loaded.get(adapter.sha256)
            loaded[adapter.sha256] = ready or _load(adapter, self._layers)
        self.clear()
        self._loaded = loaded
        self.used = tuple(self._attach(adapter, strength) for adapter, strength in active)
        return self.used

    def clear(self) -> None:
        """Remove all adapters and free their memory."""
        for hook in self._hooks:
            hook.remove()
        for sha256, matrices in self._loaded.items():
            for name in matrices:
                delattr(self._layers[name], f"adapter_{sha256}")
        self._hooks, self._loaded, self.used = [], {}, ()
        self._not_run.clear()

    @property
    def unused(self) -> tuple[str, ...]:
        """Adapted layers that did not run since `apply`: none after a song."""
        return tuple(sorted({name for _, name in self._not_run}))

    def _attach(self, adapter: adapter_files.Adapter, strength: float) -> AdapterUsed:
        """Add an adapter's matrices to its layers as submodules, which move with the model."""
        child = f"adapter_{adapter.sha256}"
        for name, matrices in self._loaded[adapter.sha256].items():
            layer = self._layers[name]
            layer.add_module(child, matrices)
            self._not_run.add((child, name))
            mark_run = partial(self._not_run.discard, (child, name))
            add = partial(_add, child, len(adapter.deltas[name].left), strength, mark_run)
            self._hooks.append(layer.register_forward_hook(add))
        found = sum(name.endswith(f".{child}") for name, _ in self._transformer.named_modules())
        return AdapterUsed(
            name=adapter.name,
            sha256=adapter.sha256,
            strength=strength,
            rank=adapter.rank,
            modules=found,
        )


def _check_strength(adapter: adapter_files.Adapter, strength: float) -> None:
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not 0 <= strength <= MAX_ADAPTER_STRENGTH:
        raise StudioError(
            "value-out-of-range",
            label=f"Strength of {adapter.name}",
            problem=f"runs from 0 to {MAX_ADAPTER_STRENGTH:g}, not {str(strength)[:20]}",
            fix=f"Set it between 0 and {MAX_ADAPTER_STRENGTH:g}",
        )


def _add(
    child: str,
    count: int,
    strength: float,
    mark_run: Callable[[], None],
    layer: torch.nn.Linear | torch.nn.Conv1d,
    inputs: tuple[torch.Tensor],
    out: torch.Tensor,
) -> None:
    """Add one delta to a layer's output; used as a forward hook.

    A Kronecker product is never expanded: kron(w1, w2) x is w1 X w2^T with x as a matrix X. The
    side that leaves the smaller intermediate goes first.
    """
    from torch.nn.functional import linear as times

    mark_run()
    matrices = list(getattr(layer, child).buffers())
    left, right = matrices[:count], matrices[count:]
    x = inputs[0]
    patches = layer.weight.dim() == 3
    if patches:  # convolution without overlap: [batch, channels, frames] to the patches
        x = x.unfold(-1, layer.kernel_size[0], layer.stride[0]).transpose(1, 2).flatten(2)
        out = out.transpose(1, 2)
    if left:
        x = x.unflatten(-1, (left[0].shape[1], right[0].shape[1]))
        first = left[0].shape[1] * right[-1].shape[0] <= left[-1].shape[0] * right[0].shape[1]
        for on_right in (first, not first):
            for matrix in right if on_right else left:
                x = times(x, matrix) if on_right else matrix @ x
        out.add_(x.flatten(-2), alpha=strength)
        return
    for matrix in right[:-1]:
        x = times(x, matrix)
    if patches:
        out.add_(times(x, right[-1]), alpha=strength)
    else:  # in one operation, which rounds once
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(x.reshape(-1, x.shape[-1]), right[-1].t(), alpha=strength)


def _load(
    adapter: adapter_files.Adapter, layers: Mapping[str, torch.nn.Module]
) -> dict[str, torch.nn.Module]:
    """Read the matrices, multiplied by alpha / rank, in the type and on the device of each layer.

    They are buffers outside of the state dict, so that the model's own tensors stay as they are.
    fp8 matrices are widened to the layer's type.
    """
    import torch

    place = {
        key: (name, f"m{i}", delta.scale if key == delta.right[-1] else 1.0)
        for name, delta in adapter.deltas.items()
        for i, key in enumerate((*delta.left, *delta.right))
    }
    loaded: dict[str, dict[str, torch.Tensor]] = {name: {} for name in adapter.deltas}
    for key, dtype, shape, numbers in adapter_files.read(adapter):
        if key not in place:
            continue  # an alpha, which is part of the scale
        name, slot, scale = place[key]
        matrix = torch.frombuffer(numbers, dtype=getattr(torch, DTYPES[dtype])).reshape(
            shape[0], -1
        )
        weight = layers[name].weight
        matrix = (matrix.float() * scale).to(weight.device, weight.dtype)
        if not is_finite(matrix):
            raise unreadable(adapter.name, f"its numbers for {name} are not finite")
        loaded[name][slot] = matrix
    if not any(all(bool(m.any()) for m in matrices.values()) for matrices in loaded.values()):
        raise refused(
            adapter.name, "all its changes are zero", "Choose a version of it that was trained"
        )
    modules = {}
    for name, matrices in loaded.items():
        modules[name] = torch.nn.Module()
        for slot in sorted(matrices):
            modules[name].register_buffer(slot, matrices[slot], persistent=False)
    return modules


def _mismatch(
    deltas: Mapping[str, adapter_files.Delta], layers: Mapping[str, tuple[int, int]]
) -> str | None:
    """How the model differs from the one that an adapter was made for, most telling first."""
    shared = [(name, delta.shape, layers[name]) for name, delta in deltas.items() if name in layers]
    for name, adapter, model in shared:
        if _width(name, adapter) != _width(name, model):
            made, has = _width(name, adapter), _width(name, model)
            return f"it was made for width {made}, and this model has {has}"
    made, has = _layer_count(deltas), _layer_count(layers)
    if made > has:
        return f"it was made for {made} layers or more, and this model has {has}"
    for name, adapter, model in shared:
        if adapter != model:
            ours, its = ("{1} x {0}".format(*shape) for shape in (adapter, model))
            return f"its {name} is {ours}, and this model's is {its}"
    missing = sorted(set(deltas) - set(layers))
    return f"this model has no {missing[0]}" if missing else None


def _width(name: str, shape: tuple[int, int]) -> int:
    """The width of the model that a layer belongs to."""
    leads_in = name.endswith((".to_out.0", ".down_proj", ".linear_1", "_embedder", "_conv"))
    return shape[0] if leads_in else shape[1]


def _layer_count(names: Iterable[str]) -> int:
    return max((int(n.split(".")[1]) + 1 for n in names if n.startswith("layers.")), default=0)
