"""Adapter files: check a LoRA or LoKr by its safetensors header and map its tensors to layers.

Files come from strangers, so the header is parsed here, with limits that safetensors' own reader
does not have. `adapter_layers` loads the matrices.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from audio.decode import open_regular_file
from core.errors import StudioError
from core.params import MAX_ADAPTER_RANK
from core.text import printable
from models import adapter_config
from models.adapter_config import refused, unreadable, unsupported

MAX_FILE_BYTES = 500_000_000
"""Largest file, in bytes."""


MAX_HEADER_BYTES = 4 << 20
"""An adapter for every linear layer of XL has a header of 0.2 MB."""


FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Bytes per number of the types that matrices may have, by their safetensors names."""


INTEGER_BYTES = {
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per number of the other types, which only an alpha may have."""


SCALAR_FORMATS = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "I16": "<h",
    "I8": "<b",
    "U8": "<B",
}
"""struct formats of a single number. A BF16 is the upper half of an F32."""


PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


UNSUPPORTED_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lokr_t": "LoKr with a Tucker core",
}
"""Unsupported kinds of adapters, by a part of their tensor names."""


QUANTISATION_SCALES = ("weight_scale", "scale_weight", "input_scale", ".absmax", ".quant_map")
"""Parts of the names of tensors that hold the scales of quantised matrices."""


PREFIX = re.compile(
    r"((base_model|model|diffusion_model|transformer|decoder|module|dit)\."
    r"|(lycoris|lora_unet|lora_transformer)_(decoder_)?)*"
)
"""Prefixes that trainers put before a module's name."""


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
"""Layers that can be adapted, by their original names (q_proj) or diffusers' (to_q).

These are all linear layers, and the convolution of the patches, which is linear too.
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
"""Roles of the tensors of a delta: right and left factors, in the order of application."""


@dataclass(frozen=True)
class Delta:
    """The change to one linear layer: `scale` * kron(product of left, product of right).

    Attributes:
        right, left: names of tensors in the file, in the order of application. A LoRA has no left
            factors; LoKr's w1 is left and w2 right.
        scale: alpha / rank, or its equivalent.
        shape: (out, in) of the layer it was trained for.
        rank: the largest rank of a factorised side, 0 if both are full matrices.
    """

    right: tuple[str, ...]
    left: tuple[str, ...]
    scale: float
    shape: tuple[int, int]
    rank: int


@dataclass(frozen=True)
class Adapter:
    """A checked adapter file, ready for a model that it fits.

    Attributes:
        name: of the file or folder, without its path.
        sha256: of the weights file, followed by its adapter_config.json if there is one.
        deltas: by the transformer's layer names.
        notes: a sentence for each assumption that had to be made.
    """

    name: str
    path: Path
    sha256: str
    deltas: dict[str, Delta]
    notes: tuple[str, ...] = ()
    config: bytes = field(default=b"", repr=False)

    @property
    def rank(self) -> int:
        """The largest rank of its deltas."""
        return max(delta.rank for delta in self.deltas.values())


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def inspect(path: Path, config: Path | None = None) -> Adapter:
    """Check an adapter by its header and its scalars. No matrix is read.

    Args:
        path: a safetensors file, or a folder that holds one, as PEFT saves it.
        config: its adapter_config.json, if it is not beside the file. One beside a file is used
            if the file is PEFT's `adapter_model.safetensors` or the only one in its folder.

    Raises:
        StudioError: `adapter-missing`, `adapter-unreadable`, `adapter-too-big`, `adapter-refused`.
    """
    path = Path(path)
    name = printable(path.name or path.resolve().name)
    weights, config = _find(path, config, name)
    config_text = None
    if config:
        with open_regular_file(config, name, "adapter") as file:
            config_text = file.read(adapter_config.MAX_CONFIG_BYTES + 1)
    with open_regular_file(weights, name, "adapter") as file:
        tensors, metadata, data = _header(file, os.fstat(file.fileno()).st_size, name)
        if not tensors:
            raise unreadable(name, "there is nothing in it")
        parts = _group_by_module(tensors, name)
        peft = adapter_config.parse(config_text, metadata, name)
        alphas = {}
        for module, roles in parts.items():
            if key := roles.pop("alpha", None):
                alphas[module] = _scalar(file, data, tensors[key], name)
        deltas = {
            module: _delta(module, roles, tensors, alphas.get(module), peft, name)
            for module, roles in parts.items()
        }
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
    digest.update(config_text or b"")
    notes = []
    if not peft and not alphas and any(key.startswith("base_model.") for key in tensors):
        notes.append(
            f"{name} came without its adapter_config.json, which holds its alpha. It is applied "
            "as if alpha were its rank. ACE-Step's own trainer uses twice the rank: if the effect "
            "is weak, set its strength to 2, or add its adapter_config.json."
        )
    return Adapter(name, weights, digest.hexdigest(), deltas, tuple(notes), config_text or b"")


def read(adapter: Adapter) -> Iterator[tuple[str, str, tuple[int, ...], bytearray]]:
    """Every tensor of an adapter: name, safetensors type, shape, bytes (little-endian).

    Raises:
        StudioError: `adapter-missing`, or `adapter-unreadable` if the file changed since
            `inspect`.
    """
    with open_regular_file(adapter.path, adapter.name, "adapter") as file:
        content = file.read(MAX_FILE_BYTES + 1)
        digest = hashlib.sha256(content)
        digest.update(adapter.config)
        if digest.hexdigest() != adapter.sha256:
            raise unreadable(adapter.name, "it changed after it was chosen")
    tensors, _, data = _header(io.BytesIO(content), len(content), adapter.name)
    for key, tensor in tensors.items():
        numbers = bytearray(memoryview(content)[data + tensor.start : data + tensor.end])
        yield key, tensor.dtype, tensor.shape, numbers


def _find(path: Path, config: Path | None, name: str) -> tuple[Path, Path | None]:
    """The weights file and the adapter_config.json of a chosen file or folder."""
    try:
        is_folder = path.is_dir()
        siblings = list((path if is_folder else path.parent).iterdir())
    except FileNotFoundError as error:
        raise StudioError("adapter-missing", name=name) from error
    except (OSError, ValueError) as error:
        raise unreadable(name, "it cannot be opened") from error
    stored = [file for file in siblings if file.suffix == ".safetensors"]
    peft = [file for file in stored if file.name == "adapter_model.safetensors"]
    weights = path
    if is_folder:
        if not stored and PICKLES & {file.suffix for file in siblings}:
            raise _pickled(name)
        if len(peft or stored) != 1:
            raise unreadable(name, f"there are {len(stored) or 'no'} safetensors files in it")
        (weights,) = peft or stored
    if config is None and (weights.name == "adapter_model.safetensors" or stored == [weights]):
        config = next((file for file in siblings if file.name == "adapter_config.json"), None)
    return weights, config


def _header(file: BinaryIO, size: int, name: str) -> tuple[dict[str, _Tensor], dict[str, Any], int]:
    """The tensors and the metadata of a safetensors header, and the offset of the data.

    Format: 8 bytes little-endian header length, JSON header, data without gaps. The length of the
    file must equal what its header says.
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
        tensors = {key: _entry(entry) for key, entry in header.items()}
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


def _entry(entry: dict[str, Any]) -> _Tensor:
    """One entry of a header. Raises ValueError, KeyError or TypeError for anything irregular."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = [*shape, start, end]
    if len(shape) > 4 or any(type(n) is not int or n < 0 for n in whole) or 0 in shape:
        raise ValueError("not a shape")
    if end - start != math.prod(shape) * (FLOAT_BYTES | INTEGER_BYTES)[dtype]:
        raise ValueError("not as long as its shape")
    return _Tensor(dtype, tuple(shape), start, end)


def _scalar(file: BinaryIO, data: int, tensor: _Tensor, name: str) -> float:
    """The single number in `tensor`."""
    if math.prod(tensor.shape) != 1:
        raise unreadable(name, "an alpha in it is not one number")
    file.seek(data + tensor.start)
    raw, code = file.read(tensor.end - tensor.start), SCALAR_FORMATS.get(tensor.dtype)
    if not code and tensor.dtype != "BF16":
        raise unreadable(name, f"an alpha in it is a {tensor.dtype}")
    (value,) = struct.unpack(code, raw) if code else struct.unpack("<f", b"\0\0" + raw)
    if not math.isfinite(value):
        raise unreadable(name, "an alpha in it is not finite")
    return float(value)


def _group_by_module(tensors: Mapping[str, _Tensor], name: str) -> dict[str, dict[str, str]]:
    """Tensor names by the transformer's layer name, then by role."""
    parts: dict[str, dict[str, str]] = {}
    for key in tensors:
        for sign, kind in UNSUPPORTED_TENSORS.items():
            if sign in key:
                raise unsupported(name, kind)
        if any(sign in key for sign in QUANTISATION_SCALES):
            raise _quantised(name, f"with scales of its own ({printable(key)})")
        found = TENSOR.fullmatch(key) if len(key) <= 200 else None
        module = _module(found["module"]) if found else None
        if not found or not module:
            raise refused(
                name,
                f"it holds {printable(key)}, which adapts nothing in ACE-Step 1.5",
                "Choose a LoRA or LoKr that was made for ACE-Step 1.5",
            )
        roles = parts.setdefault(module, {})
        role = ROLES.get(found["role"], found["role"])
        if role in roles:
            raise unreadable(name, f"it holds two tensors for the same part of {module}")
        roles[role] = key
    return dict(sorted(parts.items()))


def _module(name: str) -> str | None:
    """The transformer's name for a module under any trainer's name, or None.

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
    peft: adapter_config.PeftConfig | None,
    name: str,
) -> Delta:
    """Combine the matrices of one module, after checking that their shapes chain."""
    layout = LAYOUTS.get(frozenset(roles))
    if not layout:
        raise unreadable(name, f"parts for {module} are missing, or too many")
    right, left = (tuple(roles[role] for role in side) for side in layout)
    sizes, ranks = [], [0]
    for side in (right, left):
        for key in side:
            if tensors[key].dtype not in FLOAT_BYTES:
                raise _quantised(name, f"to {tensors[key].dtype}, by a method it does not name")
        chain = [(math.prod(t.shape[:1]), math.prod(t.shape[1:])) for t in map(tensors.get, side)]
        matrices = all(len(tensors[key].shape) > 1 for key in side)
        if not matrices or any(b[1] != a[0] for a, b in pairwise(chain)):
            raise unreadable(name, f"its matrices for {module} do not fit together")
        ranks += [out for out, _ in chain[:-1]]
        sizes.append((chain[-1][0], chain[0][1]) if chain else (1, 1))
        if left and len(chain) > 1 and ranks[-1] > max(sizes[-1]):  # a small file, a huge product
            raise unreadable(name, f"its matrices for {module} do not fit together")
    rank = max(ranks)
    if rank > MAX_ADAPTER_RANK:
        raise _too_big(name, f"rank {rank}", f"rank {MAX_ADAPTER_RANK}")
    shape = (sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1])
    original = TENSOR.fullmatch(right[0])["module"]
    if peft and not peft.fits(original, roles, rank):
        raise unreadable(name, f"its adapter_config.json describes other matrices for {module}")
    return Delta(right, left, _scale(original, rank, alpha, peft), shape, rank)


def _scale(
    module: str, rank: int, alpha: float | None, peft: adapter_config.PeftConfig | None
) -> float:
    """The factor before the product: alpha / rank, or 1 if no alpha is known.

    An alpha in the file takes precedence. LyCORIS trains full w1 and w2 at 1, whatever alpha it
    writes, and a full delta has no scale. Sources: PEFT's `lora/layer.py` and `lokr/layer.py`,
    LyCORIS' `modules/lokr.py`.
    """
    if alpha is not None and rank:
        return alpha / rank
    return peft.scale(module) if peft else 1.0


def _too_big(name: str, found: str, limit: str) -> StudioError:
    return StudioError("adapter-too-big", name=name, found=found, limit=limit)


def _quantised(name: str, how: str) -> StudioError:
    problem = f"its matrices are quantised {how}"
    return refused(name, problem, "Choose its bfloat16, float16 or float32 version")


def _pickled(name: str) -> StudioError:
    problem = "it is a pickle, which may run programs when it is opened"
    return refused(name, problem, "Choose its safetensors version")
