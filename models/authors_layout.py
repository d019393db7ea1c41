"""Checkpoints in the layout of ACE-Step's authors, loaded as the components of diffusers.

Such a folder holds config.json and one or several safetensors files whose tensors begin with
decoder., encoder., tokenizer. and detokenizer.; and silence_latent.pt. Nothing is unpickled, every
tensor is accounted for, and no converted copy is written. VAE, text encoder and tokenizer are
published apart, in the repository ACE-Step/Ace-Step1.5.

Source of the names: diffusers' scripts/convert_ace_step_to_diffusers.py.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.weights import Weights, broken, missing_shard, read_json

if TYPE_CHECKING:
    import torch


SHARED = {
    "vae": (("vae",), "config.json"),
    "text_encoder": (("text_encoder", "Qwen3-Embedding-0.6B"), "config.json"),
    "tokenizer": (("tokenizer", "Qwen3-Embedding-0.6B"), "tokenizer.json"),
}
"""Components that are published apart: the folders they may be in, and a file that proves it."""


SILENCE_FILES = ("silence_latent.pt", "acestep-v15-turbo/silence_latent.pt")
"""Where the silence latent may be: it depends on the VAE alone, so that one serves all models."""


SHARED_FILES = (
    *("vae/*.json", "vae/*.safetensors"),
    *("Qwen3-Embedding-0.6B/*.json", "Qwen3-Embedding-0.6B/*.safetensors"),
    "acestep-v15-turbo/silence_latent.pt",
)
"""Patterns of the shared files in ACE-Step/Ace-Step1.5."""


PREFIXES = {
    "decoder": "transformer",
    "encoder": "condition_encoder",
    "tokenizer": "audio_tokenizer",
    "detokenizer": "audio_token_detokenizer",
}
"""Component by the first part of a tensor's name."""


RENAMED = (
    *((".q_proj.", ".to_q."), (".k_proj.", ".to_k."), (".v_proj.", ".to_v.")),
    *((".o_proj.", ".to_out.0."), (".q_norm.", ".norm_q."), (".k_norm.", ".norm_k.")),
    *(("proj_in.1.", "proj_in_conv."), ("proj_out.1.", "proj_out_conv.")),
)
"""Parts of tensor names: the authors' and diffusers'."""


LAYER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
COMMON = (
    *("head_dim", "rope_theta", "attention_bias", "attention_dropout", "rms_norm_eps"),
    "sliding_window",
)
"""Settings of every transformer layer, by the names that both sides use."""


MAX_SILENCE_BYTES = 64 << 20
"""The published one has 3.84 MB in float32."""


STORAGES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}
"""torch's number types by the classes that its files name."""


def matches(folder: Path) -> bool:
    """Whether `folder` is a checkpoint in the authors' layout, by its config.json."""
    if (folder / "model_index.json").is_file():
        return False
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    needed = {"hidden_size", "audio_acoustic_hidden_dim", "timbre_hidden_dim", "in_channels"}
    return isinstance(config, dict) and needed <= config.keys()


def weight_files(model: Weights, folder: Path, file: str = "") -> list[Path]:
    """The safetensors files of the checkpoint in `folder`.

    Args:
        file: the name of the one to take where there are several checkpoints.

    Raises:
        StudioError: `model-broken` if a file is missing, or several are there and none is named.
    """
    if missing := missing_file(model, folder, file):
        raise broken(model, missing, "is missing")
    if file:
        return [folder / file]
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return [
            folder / name for name in sorted(set(read_json(model, index)["weight_map"].values()))
        ]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1 and (folder / "model.safetensors") in files:
        return [folder / "model.safetensors"]
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:3])
        raise broken(model, names, "are several checkpoints; choose one by its file name")
    return files


def missing_file(model: Weights, folder: Path, file: str = "") -> str | None:
    """The first file that the checkpoint in `folder` needs and lacks, or None."""
    if file:
        return None if (folder / file).is_file() else file
    if shard := missing_shard(model, folder):
        return shard
    return None if any(folder.glob("*.safetensors")) else "model.safetensors"


def shared_parts(*folders: Path) -> dict[str, Path]:
    """The shared parts found in `folders`, the first folder first.

    Returns:
        Paths by "vae", "text_encoder", "tokenizer" and "silence"; without those that are missing.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for part, (names, marker) in SHARED.items():
            for name in names:
                if (folder / name / marker).is_file():
                    found.setdefault(part, folder / name)
        for name in SILENCE_FILES:
            if (folder / name).is_file():
                found.setdefault("silence", folder / name)
    return found


def has_shared_parts(folder: Path) -> bool:
    """Whether all shared parts are in the checkpoint's folder or in the one above it."""
    return len(shared_parts(folder, folder.parent)) == len(SHARED) + 1


def missing_shared_files(folder: Path) -> Iterator[str]:
    """The shared files that a copy of ACE-Step/Ace-Step1.5 lacks."""
    found = shared_parts(folder)
    for part, (names, marker) in SHARED.items():
        if part not in found:
            yield f"{names[-1]}/{marker}"
        elif part != "tokenizer" and not any(found[part].glob("*.safetensors")):
            yield f"{names[-1]}/*.safetensors"
    if "silence" not in found:
        yield SILENCE_FILES[-1]


def component_configs(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """diffusers' configurations of the four components, from the authors' config.json.

    A setting counts for all components; `encoder_` before its name makes it that of the condition
    encoder and the tokenizers (XL), `tokenizer_` that of the tokenizers alone.

    Raises:
        KeyError: naming a setting that is missing.
    """

    def settings(names: Iterable[str], *prefixes: str) -> dict[str, Any]:
        keys = {name: [f"{prefix}_{name}" for prefix in prefixes] + [name] for name in names}
        return {
            name: config[next((key for key in options if key in config), name)]
            for name, options in keys.items()
        }

    encoder = settings((*LAYER, *COMMON), "encoder")
    tokenizer = settings((*LAYER, *COMMON), "tokenizer", "encoder")
    pooler_layers = config.get("num_attention_pooler_hidden_layers", 2)
    tokenizer |= {
        "audio_acoustic_hidden_dim": config["audio_acoustic_hidden_dim"],
        "pool_window_size": config.get("pool_window_size", 5),
        "num_attention_pooler_hidden_layers": pooler_layers,
        "layer_types": config["layer_types"][:pooler_layers],
    }
    transformer = settings(
        (
            *(*LAYER, *COMMON, "num_hidden_layers", "in_channels", "audio_acoustic_hidden_dim"),
            *("patch_size", "layer_types"),
        )
    )
    return {
        "transformer": {
            **transformer,
            "encoder_hidden_size": encoder["hidden_size"],
            "is_turbo": bool(config.get("is_turbo")) or config.get("model_version") == "turbo",
            "model_version": config.get("model_version"),
        },
        "condition_encoder": encoder
        | settings(
            (
                *("text_hidden_dim", "timbre_hidden_dim"),
                *("num_lyric_encoder_hidden_layers", "num_timbre_encoder_hidden_layers"),
            )
        ),
        "audio_tokenizer": {
            **tokenizer,
            "fsq_dim": config.get("fsq_dim", tokenizer["hidden_size"]),
            "fsq_input_levels": config.get("fsq_input_levels", [8, 8, 8, 5, 5, 5]),
            "fsq_input_num_quantizers": config.get("fsq_input_num_quantizers", 1),
        },
        "audio_token_detokenizer": tokenizer,
    }


def diffusers_name(name: str) -> tuple[str, str] | None:
    """Component and tensor name in diffusers of a tensor by its name in the authors' files.

    None for a name that belongs to no component.
    """
    if name == "null_condition_emb":
        return "condition_encoder", name
    prefix, _, rest = name.partition(".")
    if prefix not in PREFIXES or not rest:
        return None
    for authors, diffusers in RENAMED:
        rest = rest.replace(authors, diffusers)
    return PREFIXES[prefix], rest


def load_components(
    model: Weights,
    folder: Path,
    silence: Path,
    dtypes: Mapping[str, torch.dtype],
    file: str = "",
    only: Collection[str] = (),
) -> dict[str, torch.nn.Module]:
    """Load the four components of the checkpoint in `folder`, on the CPU, in evaluation mode.

    The modules are built without memory of their own and take the tensors of the files as they
    are, so that no second copy exists where the number type stays.

    Args:
        silence: the silence_latent.pt to take.
        dtypes: number type by component; "default" for those not named.
        file: as in `weight_files`.
        only: the components to load; all of them if empty.

    Raises:
        StudioError: `model-broken`, naming a tensor that is missing, surplus or of another shape.
    """
    import torch
    from diffusers import AceStepTransformer1DModel
    from diffusers.pipelines.ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )

    classes = {
        "transformer": AceStepTransformer1DModel,
        "condition_encoder": AceStepConditionEncoder,
        "audio_tokenizer": AceStepAudioTokenizer,
        "audio_token_detokenizer": AceStepAudioTokenDetokenizer,
    }
    try:
        configs = component_configs(read_json(model, folder / "config.json"))
        with torch.device("meta"):
            modules = {
                part: made(**configs[part])
                for part, made in classes.items()
                if not only or part in only
            }
    except KeyError as error:
        raise broken(model, "config.json", f"lacks the setting {error.args[0]}") from error
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise broken(model, "config.json", "describes no ACE-Step model") from error
    tensors = _read_tensors(model, weight_files(model, folder, file))
    channels = configs["condition_encoder"]["timbre_hidden_dim"]
    tensors["condition_encoder"]["silence_latent"] = read_silence(model, silence, channels)
    for part, module in modules.items():
        _assign(model, part, module, tensors[part], dtypes.get(part, dtypes["default"]))
    # What no file stores is computed when the quantiser is made: it must not stay on "meta".
    if "audio_tokenizer" not in modules:
        return modules
    tokenizer, codes = modules["audio_tokenizer"], configs["audio_tokenizer"]
    fresh = type(tokenizer.quantizer)(
        dim=codes["fsq_dim"],
        levels=codes["fsq_input_levels"],
        num_quantizers=codes["fsq_input_num_quantizers"],
    )
    for name, value in fresh.named_buffers():
        tokenizer.quantizer.register_buffer(name, value, persistent=False)
    return modules


def _read_tensors(model: Weights, files: list[Path]) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of the files by component and diffusers' name, mapped from disk."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PREFIXES.values()}
    for path in files:
        try:
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    place = diffusers_name(key)
                    if place is None:
                        problem = f"holds the tensor {key}, which belongs to no part"
                        raise broken(model, path.name, problem)
                    part, name = place
                    if name in tensors[part]:
                        raise broken(model, path.name, f"holds the tensor {key} twice")
                    tensors[part][name] = opened.get_tensor(key)
        except SafetensorError as error:
            raise broken(model, path.name, "is no complete safetensors file") from error
    return tensors


def _assign(
    model: Weights,
    part: str,
    module: torch.nn.Module,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Give `module` its tensors. Raises `model-broken` unless they are exactly those it needs."""
    needed = module.state_dict()
    if missing := sorted(needed.keys() - tensors.keys()):
        raise broken(model, f"{part} (safetensors)", f"lacks the tensor {missing[0]}")
    if surplus := sorted(tensors.keys() - needed.keys()):
        raise broken(
            model, f"{part} (safetensors)", f"holds {surplus[0]}, which does not belong there"
        )
    for name, tensor in tensors.items():
        if tensor.shape != needed[name].shape and name != "silence_latent":
            found, expected = list(tensor.shape), list(needed[name].shape)
            problem = f"holds {name} in the shape {found} instead of {expected}"
            raise broken(model, f"{part} (safetensors)", problem)
    if "silence_latent" in tensors:  # its length is free
        module.register_buffer("silence_latent", tensors["silence_latent"])
    module.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, assign=True)
    module.eval().requires_grad_(False)


def read_silence(model: Weights, path: Path, channels: int) -> torch.Tensor:
    """The silence latent [1, frames, channels], float32, from a file that torch.save wrote.

    The file is a zip archive: its pickle is scanned for the number type and the shape without
    being executed, and the numbers are read as plain bytes. The authors store
    [1, channels, frames].

    Raises:
        StudioError: `model-broken`.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if any(infos[n].file_size > MAX_SILENCE_BYTES for n in ("data.pkl", "data/0")):
                raise ValueError("too large")
            kind, shape, strides = _scan(archive.read(infos["data.pkl"]))
            numbers = bytearray(archive.read(infos["data/0"]))
        if channels not in shape[1:] or 0 in shape:
            raise ValueError("another shape")
        stored = torch.frombuffer(numbers, dtype=getattr(torch, STORAGES[kind]))
        silence = stored.as_strided(shape, strides).float()  # checks that it stays inside
    except (OSError, ValueError, LookupError, zipfile.BadZipFile, RuntimeError) as error:
        raise broken(model, path.name, "holds no silence latent") from error
    return (silence if shape[2] == channels else silence.transpose(1, 2)).contiguous()


def _scan(pickle: bytes) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The storage class, shape and strides of the one tensor that a pickle describes.

    Reads the opcodes only. Raises ValueError or IndexError for anything but one tensor of three
    axes at the beginning of its storage.
    """
    kinds, numbers, after_storage = [], [], False
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL" and str(argument).endswith("Storage"):
            kinds.append(str(argument).rpartition(" ")[2])
        after_storage = after_storage or opcode.name == "BINPERSID"
        if after_storage and opcode.name in ("BININT", "BININT1", "BININT2", "LONG1"):
            numbers.append(int(argument))
    offset, *sizes = numbers[:7]
    if len(kinds) != 1 or offset != 0 or len(sizes) != 6 or sizes[0] != 1:
        raise ValueError("not one tensor of three axes")
    return kinds[0], tuple(sizes[:3]), tuple(sizes[3:])
