"""Adapters beside a transformer: any number at once, each at its strength, in any float type.

They compute beside its weights and never write them, so that taking one away leaves not one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from core.errors import StudioError
from core.params import MAX_ADAPTER_STRENGTH
from core.results import AdapterUsed, Progress
from models import adapter_files

if TYPE_CHECKING:
    import torch


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's names for those of safetensors."""


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer of a transformer that can be adapted, from its config.json.

    Of the convolution at its beginning, `in` is what one patch holds: channels times frames.
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
    adapter: adapter_files.Adapter, there: Mapping[str, tuple[int, int]], title: str
) -> None:
    """Refuse an adapter that was made for another model than the one called `title`.

    Args:
        there: (out, in) by name, as `shapes` has them.

    Raises:
        StudioError: `adapter-wrong-base`, naming what differs.
    """
    if problem := _misfit(adapter.deltas, there):
        raise StudioError("adapter-wrong-base", name=adapter.name, model=title, problem=problem)


class AdapterStack:
    """The adapters that play along with one transformer; there is one stack for each.

    Not thread-safe, like the engine.
    """

    def __init__(self, transformer: torch.nn.Module, title: str) -> None:
        """
        Args:
            transformer: an `AceStepTransformer1DModel`, on any device, in any float type.
            title: what a person calls the model, for messages.
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
        self._held: dict[str, dict[str, torch.nn.Module]] = {}
        self._hooks: list[Any] = []
        self._unused: set[tuple[str, str]] = set()

    def apply(self, chosen: Sequence[tuple[adapter_files.Adapter, float]]) -> Iterator[Progress]:
        """Let these adapters play, and no others, from the next step of the transformer on.

        Order makes no difference, bit for bit. The same file twice is one, at the later strength.
        What has strength 0 is judged and left out. Adapters that played before are not read again.
        Until the generator has ended, and if it fails or is closed, everything stays as it was.

        Args:
            chosen: adapters with their strengths, 0 to `STRONGEST`.

        Returns:
            `used`: what plays now (as the generator's return value).

        Raises:
            StudioError: `value-out-of-range`, `adapter-wrong-base`, `adapter-missing`,
                `adapter-unreadable`, `adapter-refused`.
        """
        wanted = {}
        there = {n: (len(m.weight), m.weight[0].numel()) for n, m in self._layers.items()}
        for adapter, strength in chosen:
            _check_strength(adapter, strength)
            check_fit(adapter, there, self._title)
            wanted[adapter.sha256] = (adapter, float(strength))
        heard = [wanted[sha256] for sha256 in sorted(wanted) if wanted[sha256][1] > 0]
        held = {}
        for step, (adapter, _) in enumerate(heard):
            yield Progress(stage="Reading adapters", step=step, steps=len(heard))
            ready = self._held.get(adapter.sha256)
            held[adapter.sha256] = ready or _load(adapter, self._layers)
        self.clear()
        self._held = held
        self.used = tuple(self._attach(adapter, strength) for adapter, strength in heard)
        return self.used

    def clear(self) -> None:
        """Take all adapters away and free what they held."""
        for hook in self._hooks:
            hook.remove()
        for sha256, matrices in self._held.items():
            for name in matrices:
                delattr(self._layers[name], f"adapter_{sha256}")
        self._hooks, self._held, self.used = [], {}, ()
        self._unused.clear()

    @property
    def unused(self) -> tuple[str, ...]:
        """Layers that an adapter hangs on and that did not run since `play`: none after a song."""
        return tuple(sorted({name for _, name in self._unused}))

    def _attach(self, adapter: adapter_files.Adapter, strength: float) -> AdapterUsed:
        """Hang an adapter's matrices beside the weights, as children: they move with the model."""
        child = f"adapter_{adapter.sha256}"
        for name, matrices in self._held[adapter.sha256].items():
            layer = self._layers[name]
            layer.add_module(child, matrices)
            self._unused.add((child, name))
            heard = partial(self._unused.discard, (child, name))
            add = partial(_add, child, len(adapter.deltas[name].left), strength, heard)
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
    heard: Callable[[], None],
    layer: torch.nn.Linear | torch.nn.Conv1d,
    inputs: tuple[torch.Tensor],
    out: torch.Tensor,
) -> None:
    """Add one delta to what a layer gave: a forward hook.

    Never expanded: kron(w1, w2) x is w1 X w2^T with x as a matrix X, and a LoKr of all of XL would
    be as large as XL. The side that leaves less to carry goes first.
    """
    from torch.nn.functional import linear as times

    heard()
    matrices = list(getattr(layer, child).buffers())
    left, right = matrices[:count], matrices[count:]
    x = inputs[0]
    patches = layer.weight.dim() == 3
    if patches:  # a convolution without overlap: [rows, channels, frames] to what each patch sees
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
    else:  # in one go, and rounded once
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(x.reshape(-1, x.shape[-1]), right[-1].t(), alpha=strength)


def _load(
    adapter: adapter_files.Adapter, layers: Mapping[str, torch.nn.Module]
) -> dict[str, torch.nn.Module]:
    """Read the matrices, alpha / rank folded in, as each layer wants them.

    They are buffers outside the state, so that the model's own tensors stay what they are.
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
            continue  # an alpha: it is in the scale
        name, slot, scale = place[key]
        matrix = torch.frombuffer(numbers, dtype=getattr(torch, DTYPES[dtype])).reshape(
            shape[0], -1
        )
        weight = layers[name].weight
        matrix = (matrix.float() * scale).to(weight.device, weight.dtype)
        if not bool(matrix.isfinite().all()):
            raise adapter_files.unreadable(adapter.name, f"its numbers for {name} are not finite")
        loaded[name][slot] = matrix
    if not any(all(bool(m.any()) for m in matrices.values()) for matrices in loaded.values()):
        raise StudioError(
            "adapter-refused",
            name=adapter.name,
            problem="all that it changes is zero",
            fix="Choose a version of it that was trained",
        )
    held = {}
    for name, matrices in loaded.items():
        held[name] = torch.nn.Module()
        for slot in sorted(matrices):
            held[name].register_buffer(slot, matrices[slot], persistent=False)
    return held


def _misfit(
    deltas: Mapping[str, adapter_files.Delta], there: Mapping[str, tuple[int, int]]
) -> str | None:
    """In what the model is not the one that an adapter was made for, the plainest first."""
    both = [(name, delta.shape, there[name]) for name, delta in deltas.items() if name in there]
    for name, ours, theirs in both:
        if _width(name, ours) != _width(name, theirs):
            made, has = _width(name, ours), _width(name, theirs)
            return f"it was made for width {made}, and this model has {has}"
    made, has = _layers(deltas), _layers(there)
    if made > has:
        return f"it was made for {made} layers or more, and this model has {has}"
    for name, ours, theirs in both:
        if ours != theirs:
            mine, its = ("{1} x {0}".format(*shape) for shape in (ours, theirs))
            return f"its {name} is {mine}, and this model's is {its}"
    lacking = sorted(set(deltas) - set(there))
    return f"this model has no {lacking[0]}" if lacking else None


def _width(name: str, shape: tuple[int, int]) -> int:
    """The width of the model that a layer belongs to."""
    leads_in = name.endswith((".to_out.0", ".down_proj", ".linear_1", "_embedder", "_conv"))
    return shape[0] if leads_in else shape[1]


def _layers(names: Iterable[str]) -> int:
    return max((int(n.split(".")[1]) + 1 for n in names if n.startswith("layers.")), default=0)
