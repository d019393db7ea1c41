"""ACE-Step and its planner at their published sizes, with random weights: for measuring alone.

Nothing is downloaded, and the weights are drawn on the device itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import AceStepPipeline
    from transformers import Qwen3ForCausalLM


TRANSFORMER: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "in_channels": 192,
    "audio_acoustic_hidden_dim": 64,
    "patch_size": 2,
    "rope_theta": 1e6,
    "sliding_window": 128,
    "encoder_hidden_size": 2048,
    "model_version": "sft",
}
"""The transformer of ACE-Step 1.5 XL SFT. Source: its config.json."""

CONDITION_ENCODER: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "text_hidden_dim": 1024,
    "timbre_hidden_dim": 64,
    "num_lyric_encoder_hidden_layers": 8,
    "num_timbre_encoder_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}

VAE: dict[str, Any] = {
    "encoder_hidden_size": 128,
    "downsampling_ratios": [2, 4, 4, 6, 10],
    "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 128,
    "decoder_input_channels": 64,
    "audio_channels": 2,
    "sampling_rate": 48000,
}

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 151669,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}

PLANNER: dict[str, Any] = {
    **TEXT_ENCODER,
    "vocab_size": 217204,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
}
"""The planner of 1.7 B parameters."""

CODES, TINY_CODES = (151669, 64000), (1000, 2000)
"""Token id of the first audio code of a planner, and the number of codes."""

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""What replaces the widths where only the code is to be run."""

BRANCH_SCALE = 0.1
"""What the weights at the end of each residual branch are multiplied by: else the numbers of many
random layers in a row overflow."""


def build_transformer(device: str, dtype: torch.dtype, tiny: bool = False) -> torch.nn.Module:
    """XL's transformer on `device`, which may be "meta"."""
    from diffusers import AceStepTransformer1DModel

    changes = {**TINY, "num_hidden_layers": 2, "encoder_hidden_size": 48} if tiny else {}
    transformer = _build(AceStepTransformer1DModel, {**TRANSFORMER, **changes}, device, dtype)
    for layer in transformer.layers:
        for last in (layer.self_attn.to_out[0], layer.cross_attn.to_out[0], layer.mlp.down_proj):
            last.weight.data.mul_(BRANCH_SCALE)
    return transformer


def twin_of(transformer: Any) -> torch.nn.Module:
    """Another transformer over the same weights: one may be changed, the other stay as it is."""
    twin = _build(type(transformer), dict(transformer.config), "meta", transformer.dtype)
    twin.load_state_dict(transformer.state_dict(), assign=True)
    return twin.requires_grad_(False)


def build_pipeline(
    device: str, dtype: torch.dtype, tokenizer: Path, tiny: bool = False
) -> AceStepPipeline:
    """All parts of XL but the audio tokenizer.

    Args:
        tokenizer: a tokenizer.json whose ids are in the range of the text encoder's.
        tiny: build them as small as the code allows.
    """
    from diffusers import AceStepPipeline, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ace_step import AceStepConditionEncoder
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    condition, vae, text = CONDITION_ENCODER, VAE, TEXT_ENCODER
    if tiny:
        text = {**text, **TINY, "num_hidden_layers": 1}
        condition = {**condition, **TINY, "hidden_size": 48, "text_hidden_dim": 64}
        condition |= {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1}
        vae = {**vae, "encoder_hidden_size": 4, "decoder_channels": 4, "sampling_rate": 800}
        vae |= {"channel_multiples": [1] * 5, "downsampling_ratios": [2] * 5}
    encoder = _build(AceStepConditionEncoder, condition, device, dtype)
    encoder.silence_latent.normal_()
    pipe = AceStepPipeline(
        transformer=build_transformer(device, dtype, tiny),
        condition_encoder=encoder,
        vae=_build(AutoencoderOobleck, vae, device, dtype),
        text_encoder=_build(lambda **shape: Qwen3Model(Qwen3Config(**shape)), text, device, dtype),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), pad_token="<|endoftext|>"),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=None,
        audio_token_detokenizer=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_planner(device: str, dtype: torch.dtype, tiny: bool = False) -> Qwen3ForCausalLM:
    """The planner's language model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {**PLANNER, **TINY, "num_hidden_layers": 2, "vocab_size": 4096} if tiny else PLANNER
    return _build(lambda **sizes: Qwen3ForCausalLM(Qwen3Config(**sizes)), shape, device, dtype)


def _build(kind: Any, shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(**shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
