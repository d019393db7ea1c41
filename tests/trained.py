"""Adapters for tests: trained ones as PEFT saves them, and files written byte by byte."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

FIRST_NAMES = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out.0": ".o_proj"}
"""What diffusers renamed."""


def hear(transformer: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the transformer answers to always the same noise, 16 frames long."""
    draw = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    config = transformer.config
    stamp = torch.tensor([0.7, 0.7], dtype=dtype)
    with torch.inference_mode():
        (out,) = transformer(
            hidden_states=noise(2, 16, config.audio_acoustic_hidden_dim),
            timestep=stamp,
            timestep_r=stamp / 2,
            encoder_hidden_states=noise(2, 9, config.encoder_hidden_size),
            context_latents=noise(2, 16, config.in_channels - config.audio_acoustic_hidden_dim),
            return_dict=False,
        )
    return out.clone()


def train(transformer: torch.nn.Module, config: Any, folder: Path, seed: int = 0) -> torch.Tensor:
    """Save an adapter of that PEFT config, as if it had been trained; what PEFT makes of it."""
    from peft import get_peft_model

    wrapped = get_peft_model(copy.deepcopy(transformer), config).eval()
    draw = torch.Generator().manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name or "lokr_" in name:
            size = 0.1 if "lora_" in name else 0.3
            weight.data = size * torch.randn(weight.shape, generator=draw)
    wrapped.save_pretrained(folder)
    return hear(wrapped)


def saved(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors by module and part, such as layers.0.self_attn.to_q.lora_A, and the settings."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return (
        {
            name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
        },
        config,
    )


def first_names(name: str) -> str:
    """The name that a module had before diffusers."""
    for new, old in FIRST_NAMES.items():
        name = name.replace(new + ".", old + ".")
    return name


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> Path:
    """A safetensors file, in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def forge(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file that begins like a safetensors file, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def pair(
    module: str = "layers.0.self_attn.q_proj", rank: int = 4, into: int = 256, out: int = 256
) -> dict[str, torch.Tensor]:
    """A small LoRA for one layer."""
    draw = torch.Generator().manual_seed(len(module) + rank)
    return {
        f"{module}.lora_A.weight": 0.1 * torch.randn(rank, into, generator=draw),
        f"{module}.lora_B.weight": 0.1 * torch.randn(out, rank, generator=draw),
    }
