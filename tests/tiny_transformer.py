"""A tiny transformer of ACE-Step's architecture with random weights, and inputs for it."""

from __future__ import annotations

import torch

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def make():
    """An `AceStepTransformer1DModel` whose windows are eight patches wide."""
    from diffusers import AceStepTransformer1DModel

    torch.manual_seed(1)
    return AceStepTransformer1DModel(
        hidden_size=24,
        encoder_hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=4,
        sliding_window=8,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        **HEADS,
    ).eval()


def inputs(frames: int, rows: int, seed: int = 0, tokens: int = 13):
    """Arguments of a forward pass, the condition and the unconditional vector."""
    g = torch.Generator().manual_seed(seed)
    cond, null = torch.randn(1, tokens, 20, generator=g), torch.randn(1, 1, 20, generator=g)
    null = null.expand_as(cond)
    timestep = torch.full((rows,), 0.7)
    shared = {
        "hidden_states": torch.randn(1, frames, 8, generator=g).expand(rows, -1, -1),
        "timestep": timestep,
        "timestep_r": timestep,
        "context_latents": torch.randn(1, frames, 16, generator=g).expand(rows, -1, -1),
        "return_dict": False,
    }
    return shared, cond, null


def by_stock(transformer, shared, cond, null):
    """Output of diffusers' transformer, [rows, frames, channels]."""
    both = torch.cat([cond, null]) if len(shared["timestep"]) == 2 else cond
    return transformer(encoder_hidden_states=both, **shared)[0]


def by_fast(fast, shared, constants):
    """Output of our fast transformer, [rows, frames, channels]."""
    fast.bind(constants)
    placeholder = constants.placeholder.expand(len(shared["timestep"]), -1, -1)
    return fast(encoder_hidden_states=placeholder, **shared)[0]
