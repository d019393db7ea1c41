"""Writes a checkpoint of diffusers in the layout of ACE-Step's authors, for tests."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

PARTS = {
    "transformer": "decoder",
    "condition_encoder": "encoder",
    "audio_tokenizer": "tokenizer",
    "audio_token_detokenizer": "detokenizer",
}
NAMES = (
    (r"\.to_([qkv])\.", r".\1_proj."),
    (r"\.to_out\.0\.", ".o_proj."),
    (r"\.norm_([qk])\.", r".\1_norm."),
    (r"^proj_(in|out)_conv\.", r"proj_\1.1."),
)
LAYER = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rope_theta", "attention_bias", "attention_dropout", "rms_norm_eps"),
    "sliding_window",
)


def tensors(pipe: Any) -> dict[str, Any]:
    """The authors' tensors by their names, without the silence latent."""
    found = {}
    for part, prefix in PARTS.items():
        for name, tensor in getattr(pipe, part).state_dict().items():
            if name == "silence_latent":
                continue
            for pattern, replacement in NAMES:
                name = re.sub(pattern, replacement, name)
            alone = name == "null_condition_emb"
            found[name if alone else f"{prefix}.{name}"] = tensor.contiguous()
    return found


def config(pipe: Any) -> dict[str, Any]:
    """The authors' config.json. Where mini's parts differ, their settings are prefixed."""
    transformer, encoder = pipe.transformer.config, pipe.condition_encoder.config
    tokenizer = pipe.audio_tokenizer.config
    return {
        **{name: transformer[name] for name in LAYER},
        **{f"encoder_{name}": encoder[name] for name in LAYER},
        **{f"tokenizer_{name}": tokenizer[name] for name in LAYER},
        "architectures": ["AceStepConditionGenerationModel"],
        "layer_types": list(pipe.transformer.layer_types),
        **{
            name: transformer[name]
            for name in (
                *("num_hidden_layers", "in_channels", "audio_acoustic_hidden_dim", "patch_size"),
                *("is_turbo", "model_version"),
            )
        },
        **{
            name: encoder[name]
            for name in (
                *("text_hidden_dim", "timbre_hidden_dim", "num_lyric_encoder_hidden_layers"),
                "num_timbre_encoder_hidden_layers",
            )
        },
        **{
            name: tokenizer[name]
            for name in (
                *("fsq_dim", "fsq_input_levels", "fsq_input_num_quantizers"),
                *("pool_window_size", "num_attention_pooler_hidden_layers"),
            )
        },
    }


def write(pipe: Any, folder: Path, file: str = "model.safetensors") -> Path:
    """The checkpoint in `folder`: config.json, one safetensors file, silence_latent.pt."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(pipe), folder / file, metadata={"format": "pt"})
    silence = pipe.condition_encoder.silence_latent
    torch.save(silence.transpose(1, 2).contiguous(), folder / "silence_latent.pt")
    (folder / "config.json").write_text(json.dumps(config(pipe)))
    return folder


def copy_shared_parts(source: Path, folder: Path) -> None:
    """VAE, text encoder and tokenizer of a checkpoint in the diffusers layout, published apart."""
    shutil.copytree(source / "vae", folder / "vae")
    shutil.copytree(source / "text_encoder", folder / "Qwen3-Embedding-0.6B")
    shutil.copytree(source / "tokenizer", folder / "Qwen3-Embedding-0.6B", dirs_exist_ok=True)
