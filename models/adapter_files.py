"""Adapter files: judge a LoRA or LoKr by its header, and name its parts as the transformer does.

Reads bytes and JSON, never a tensor; `stack` plays what this room lets in.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from audio.decode import open_regular_file
from core.errors import StudioError
from core.params import MAX_ADAPTER_RANK

MAX_FILE_BYTES = 500_000_000
"""Bytes of a file."""


MAX_HEADER_BYTES, MAX_CONFIG_BYTES = 4 << 20, 1 << 20
"""Bytes. An adapter for every linear layer of XL has a header of 0.2 MB."""


WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by its safetensors name."""


NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q"}
"""How to unpack a lone number. A BF16 is the upper half of an F32."""


PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


UNSUPPORTED_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lokr_t": "LoKr with a Tucker core",
}
"""Ways of adapting that are not played here, by what they call their tensors."""


UNSUPPORTED_OPTIONS = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
"""Switches in adapter_config.json that change what the same tensors mean. Source: PEFT 0.21."""


BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that had changed the model's own weights before training."""


PREFIX = re.compile(
    r"((base_model|model|diffusion_model|transformer|decoder|module|dit)\."
    r"|(lycoris|lora_unet|lora_transformer)_(decoder_)?)*"
)
"""What trainers put before the name of a module."""


TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<role>lora_A|lora_B|lora[_.]down|lora[_.]up|lokr_w[12](_[ab])?|diff|alpha)"
    r"(\.(?!(weight|bias)$)\w+)?(\.weight)?"
)


MODULE = re.compile(
    r"layers[._](?P<layer>0|[1-9]\d{0,2})[._]"
    r"((?P<block>self_attn|cross_attn)[._]((?P<old>[qkvo])_proj|to_(?P<new>[qkv]|out([._]0)?))"
    r"|mlp[._](?P<mlp>gate|up|down)_proj)"
    r"|(?P<time>time_embed(_r)?)[._](?P<step>linear_1|linear_2|time_proj)"
    r"|(?P<condition>condition_embedder)|(?P<patches>proj_in([._]1|_conv))"
)
"""What can be adapted in the transformer, by its first name (q_proj) or its diffusers name (to_q).

That is every linear layer, and the convolution that takes the patches in, which is one.
"""


ROLES = {"lora_down": "lora_A", "lora.down": "lora_A", "lora_up": "lora_B", "lora.up": "lora_B"}


LAYOUTS = {
    frozenset({"lora_A", "lora_B"}): (("lora_A", "lora_B"), ()),
    frozenset({"diff"}): (("diff",), ()),
    **{
        frozenset({*first, *second}): (second, first)
        for first in (("lokr_w1",), ("lokr_w1_b", "lokr_w1_a"))
        for second in (("lokr_w2",), ("lokr_w2_b", "lokr_w2_a"))
    },
}
"""Tensors that make up a delta: those to the right and to the left, first applied first."""


@dataclass(frozen=True)
class Delta:
    """What one linear layer gets: `scale` * kron(product of left, product of right).

    Attributes:
        right, left: names of tensors in the file, first applied first. A LoRA has none to the
            left; what a LoKr calls w1 stands left, w2 right.
        scale: alpha / rank, or what stands for it.
        shape: (out, in) of the layer it was made for.
        rank: the largest between two factors, 0 where the matrices are whole.
    """

    right: tuple[str, ...]
    left: tuple[str, ...]
    scale: float
    shape: tuple[int, int]
    rank: int


@dataclass(frozen=True)
class Adapter:
    """A file that was judged and can be played, if it fits the model.

    Attributes:
        name: of the file or folder, without its path.
        sha256: of the weights file, followed by its adapter_config.json where it has one.
        deltas: by the transformer's names.
        notes: a sentence for everything that had to be assumed.
    """

    name: str
    path: Path
    sha256: str
    deltas: dict[str, Delta]
    notes: tuple[str, ...] = ()
    config: bytes = field(default=b"", repr=False)

    @property
    def rank(self) -> int:
        return max(delta.rank for delta in self.deltas.values())


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class _Trained:
    """What PEFT's settings say of how an adapter was trained; `way` is LORA or LOKR.

    `root` means that alpha goes over the rank's square root. `alphas` and `ranks` are exceptions
    for modules whose name is or ends in their key.
    """

    way: str
    alpha: float
    rank: float
    root: bool
    alphas: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, float] = field(default_factory=dict)

    def agrees(self, module: str, roles: Iterable[str], rank: int) -> bool:
        """Whether they can be settings of these matrices: of their kind and of their rank."""
        right_kind = ("lora_A" in roles) == (self.way == "LORA")
        return right_kind and rank in (0, self._of(self.ranks, module, self.rank))

    def strength(self, module: str) -> float:
        rank = self._of(self.ranks, module, self.rank)
        return self._of(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.root else rank)

    @staticmethod
    def _of(exceptions: Mapping[str, float], module: str, rule: float) -> float:
        """The first exception counts, as in PEFT."""
        found = (exceptions[key] for key in exceptions if f".{module}".endswith(f".{key}"))
        return next(found, rule)


def inspect(path: Path, config: Path | None = None) -> Adapter:
    """Judge an adapter: its header first, then the lone numbers in it. No matrix is read.

    Args:
        path: a safetensors file, or a folder with one, such as PEFT saves.
        config: its adapter_config.json, if that is not beside it. One beside a file counts where
            the file is PEFT's `adapter_model.safetensors` or the only one there.

    Raises:
        StudioError: `adapter-missing`, `adapter-unreadable`, `adapter-too-big`, `adapter-refused`.
    """
    path = Path(path)
    name = _printable(path.name or path.resolve().name)
    weights, config = _find(path, config, name)
    said = None
    if config:
        with open_regular_file(config, name, "adapter") as file:
            said = file.read(MAX_CONFIG_BYTES + 1)
    with open_regular_file(weights, name, "adapter") as file:
        tensors, metadata, data = _header(file, os.fstat(file.fileno()).st_size, name)
        if not tensors:
            raise unreadable(name, "there is nothing in it")
        parts = _parts(tensors, name)
        trained = _training(said, metadata, name)
        alphas = {}
        for module, roles in parts.items():
            if key := roles.pop("alpha", None):
                alphas[module] = _number(file, data, tensors[key], name)
        deltas = {
            module: _delta(module, roles, tensors, alphas.get(module), trained, name)
            for module, roles in parts.items()
        }
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
    digest.update(said or b"")
    notes = []
    if not trained and not alphas and any(key.startswith("base_model.") for key in tensors):
        notes.append(
            f"{name} came without its adapter_config.json, which says how strongly to play it. "
            "It is played as if alpha were its rank; ACE-Step's own trainer takes twice that."
        )
    return Adapter(name, weights, digest.hexdigest(), deltas, tuple(notes), said or b"")


def read(adapter: Adapter) -> Iterator[tuple[str, str, tuple[int, ...], bytearray]]:
    """Every tensor of an adapter: name, type of number, shape, bytes (little-endian).

    Raises:
        StudioError: `adapter-missing`, or `adapter-unreadable` if it is not what was judged.
    """
    with open_regular_file(adapter.path, adapter.name, "adapter") as file:
        whole = file.read(MAX_FILE_BYTES + 1)
        digest = hashlib.sha256(whole)
        digest.update(adapter.config)
        if digest.hexdigest() != adapter.sha256:
            raise unreadable(adapter.name, "it changed after it was chosen")
    tensors, _, data = _header(io.BytesIO(whole), len(whole), adapter.name)
    for key, tensor in tensors.items():
        numbers = bytearray(memoryview(whole)[data + tensor.start : data + tensor.end])
        yield key, tensor.dtype, tensor.shape, numbers


def _find(path: Path, config: Path | None, name: str) -> tuple[Path, Path | None]:
    """The weights file and the settings file of what a person pointed at."""
    try:
        inside = path.is_dir()
        near = list((path if inside else path.parent).iterdir())
    except FileNotFoundError as error:
        raise StudioError("adapter-missing", name=name) from error
    except (OSError, ValueError) as error:
        raise unreadable(name, "it cannot be opened") from error
    stored = [file for file in near if file.suffix == ".safetensors"]
    peft = [file for file in stored if file.name == "adapter_model.safetensors"]
    weights = path
    if inside:
        if not stored and PICKLES & {file.suffix for file in near}:
            raise _pickled(name)
        if len(peft or stored) != 1:
            raise unreadable(name, f"there are {len(stored) or 'no'} safetensors files in it")
        (weights,) = peft or stored
    if config is None and (weights.name == "adapter_model.safetensors" or stored == [weights]):
        config = next((file for file in near if file.name == "adapter_config.json"), None)
    return weights, config


def _header(file: BinaryIO, size: int, name: str) -> tuple[dict[str, _Tensor], dict[str, Any], int]:
    """What a safetensors file announces: tensors, metadata, and where the data begin.

    Format: 8 bytes little-endian header length, JSON header, data without gaps. The file must be
    as long as its header says.
    """
    if size > MAX_FILE_BYTES:
        raise _too_big(name, f"{size / 1e6:.0f} MB", f"{MAX_FILE_BYTES / 1e6:.0f} MB")
    start = file.read(9)
    length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    if start[8:] != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
        if start.startswith((b"PK\3\4", b"\x80")) or Path(name).suffix in PICKLES:
            raise _pickled(name)
        raise unreadable(name, "it is not a safetensors file")
    if 8 + length > size:
        raise unreadable(name, "it is cut off")
    try:
        header = json.loads(b"{" + file.read(length - 1))
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {key: _announced(entry) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(name, "it has no readable header") from error
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start != end:
            raise unreadable(name, "its tensors overlap or leave gaps")
        end = tensor.end
    if 8 + length + end != size:
        cut = 8 + length + end > size
        raise unreadable(name, "it is cut off" if cut else "it is longer than it says")
    return tensors, metadata, 8 + length


def _announced(entry: dict[str, Any]) -> _Tensor:
    """One entry of a header. Anything out of the ordinary raises ValueError, KeyError, TypeError."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = [*shape, start, end]
    if len(shape) > 4 or any(type(n) is not int or n < 0 for n in whole) or 0 in shape:
        raise ValueError("not a shape")
    if end - start != math.prod(shape) * (8 if dtype == "I64" else WIDTHS[dtype]):
        raise ValueError("not as long as its shape")
    return _Tensor(dtype, tuple(shape), start, end)


def _number(file: BinaryIO, data: int, tensor: _Tensor, name: str) -> float:
    """The one number in `tensor`."""
    if math.prod(tensor.shape) != 1:
        raise unreadable(name, "an alpha in it is not one number")
    file.seek(data + tensor.start)
    raw, code = file.read(tensor.end - tensor.start), NUMBERS.get(tensor.dtype)
    (value,) = struct.unpack(code, raw) if code else struct.unpack("<f", b"\0\0" + raw)
    if not math.isfinite(value):
        raise unreadable(name, "an alpha in it is not finite")
    return float(value)


def _parts(tensors: Mapping[str, _Tensor], name: str) -> dict[str, dict[str, str]]:
    """Names of tensors by module, as the transformer calls it, and role."""
    parts: dict[str, dict[str, str]] = {}
    for key in tensors:
        for sign, way in UNSUPPORTED_TENSORS.items():
            if sign in key:
                raise _not_played(name, way)
        found = TENSOR.fullmatch(key) if len(key) <= 200 else None
        module = _module(found["module"]) if found else None
        if not module:
            raise _refused(
                name,
                f"it holds {_printable(key)}, which adapts nothing in ACE-Step 1.5",
                "Choose a LoRA or LoKr that was made for ACE-Step 1.5",
            )
        roles = parts.setdefault(module, {})
        role = ROLES.get(found["role"], found["role"])
        if role in roles:
            raise unreadable(name, f"it speaks twice of {module}")
        roles[role] = key
    return dict(sorted(parts.items()))


def _module(name: str) -> str | None:
    """The transformer's name of a module that any trainer may have named, or None.

    Source: diffusers' `convert_ace_step_to_diffusers.py`.
    """
    found = MODULE.fullmatch(name, PREFIX.match(name).end())
    if not found:
        return None
    if found["condition"] or found["patches"]:
        return found["condition"] or "proj_in_conv"
    if found["time"]:
        return f"{found['time']}.{found['step']}"
    if found["mlp"]:
        return f"layers.{found['layer']}.mlp.{found['mlp']}_proj"
    letter = found["old"] or found["new"][0]
    end = "to_out.0" if letter == "o" else f"to_{letter}"
    return f"layers.{found['layer']}.{found['block']}.{end}"


def _delta(
    module: str,
    roles: Mapping[str, str],
    tensors: Mapping[str, _Tensor],
    alpha: float | None,
    trained: _Trained | None,
    name: str,
) -> Delta:
    """Fit the matrices of one module together."""
    way = LAYOUTS.get(frozenset(roles))
    if not way:
        raise unreadable(name, f"parts for {module} are missing, or too many")
    right, left = (tuple(roles[role] for role in side) for side in way)
    sizes, ranks = [], [0]
    for side in (right, left):
        chain = [(math.prod(t.shape[:1]), math.prod(t.shape[1:])) for t in map(tensors.get, side)]
        flat = all(len(tensors[key].shape) > 1 and tensors[key].dtype in WIDTHS for key in side)
        if not flat or any(b[1] != a[0] for a, b in pairwise(chain)):
            raise unreadable(name, f"its matrices for {module} do not fit together")
        ranks += [out for out, _ in chain[:-1]]
        sizes.append((chain[-1][0], chain[0][1]) if chain else (1, 1))
        if left and len(chain) > 1 and ranks[-1] > max(sizes[-1]):  # a thin file, a vast product
            raise unreadable(name, f"its matrices for {module} do not fit together")
    rank = max(ranks)
    if rank > MAX_ADAPTER_RANK:
        raise _too_big(name, f"rank {rank}", f"rank {MAX_ADAPTER_RANK}")
    shape = (sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1])
    raw = TENSOR.fullmatch(right[0])["module"]
    if trained and not trained.agrees(raw, roles, rank):
        raise unreadable(name, f"its settings speak of other matrices for {module}")
    return Delta(right, left, _scale(raw, rank, alpha, trained), shape, rank)


def _scale(raw: str, rank: int, alpha: float | None, trained: _Trained | None) -> float:
    """What stands before the product: alpha / rank, which are equal where nobody says.

    An alpha in the file itself counts first. LyCORIS trains whole w1 and w2 at 1, whatever alpha
    it writes, and a full delta is what it is. Sources: PEFT's `lora/layer.py` and
    `lokr/layer.py`, LyCORIS' `modules/lokr.py`.
    """
    if alpha is not None and rank:
        return alpha / rank
    return trained.strength(raw) if trained else 1.0


def _training(said: bytes | None, metadata: Mapping[str, Any], name: str) -> _Trained | None:
    """How strongly the adapter was trained to play, from its adapter_config.json or its header.

    No expression in it is run: exceptions whose key is more than a name are refused.
    """
    try:
        if len(said or b"") > MAX_CONFIG_BYTES:
            raise ValueError("too long")
        if said is not None:
            told = json.loads(said)
        elif text := metadata.get("lora_adapter_metadata"):
            told = {k.removeprefix("transformer."): v for k, v in json.loads(text).items()}
        else:
            return None
        way = told["peft_type"]
        if strange := [switch for switch in UNSUPPORTED_OPTIONS if told.get(switch)]:
            raise _not_played(name, strange[0])
        if way not in ("LORA", "LOKR") or str(told.get("init_lora_weights")).startswith(
            BASE_CHANGING_INITS
        ):
            raise _not_played(name, str(way if way != "LORA" else told["init_lora_weights"]))
        return _Trained(
            way=way,
            alpha=_count(told["lora_alpha" if way == "LORA" else "alpha"]),
            rank=_count(told["r"]),
            root=told.get("use_rslora") is True,
            alphas=_exceptions(told.get("alpha_pattern")),
            ranks=_exceptions(told.get("rank_pattern")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(name, "its settings are not those of a LoRA or LoKr") from error


def _exceptions(told: dict[str, Any] | None) -> dict[str, float]:
    found = {key.removeprefix("^"): _count(value) for key, value in (told or {}).items()}
    if not all(re.fullmatch(r"[\w.]+", key) for key in found):
        raise ValueError("an expression, not a name")
    return found


def _count(value: Any) -> float:
    """A positive number."""
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise ValueError("not a positive number")
    return float(value)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[-80:]


def unreadable(name: str, problem: str) -> StudioError:
    """The error for a file that is damaged, or none of ours."""
    return StudioError("adapter-unreadable", name=name, problem=problem)


def _too_big(name: str, found: str, limit: str) -> StudioError:
    return StudioError("adapter-too-big", name=name, found=found, limit=limit)


def _refused(name: str, problem: str, fix: str) -> StudioError:
    return StudioError("adapter-refused", name=name, problem=problem, fix=fix)


def _not_played(name: str, way: str) -> StudioError:
    problem = f"the studio does not know this way of adapting ({_printable(way)})"
    return _refused(name, problem, "Choose an ordinary LoRA or LoKr version of it")


def _pickled(name: str) -> StudioError:
    problem = "it is a pickle, which may run programs when it is opened"
    return _refused(name, problem, "Choose its safetensors version")
