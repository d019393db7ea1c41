"""Tiny random checkpoints in the layout of the published ones: XL SFT, and XL turbo.

They differ from the embedded model in these: 48 kHz and the strides of the real VAE, a transformer
wider than its condition encoder, weights in several files, no audio tokenizer (turbo).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import drain, song

from models import acestep, catalog

STEPS = 3


def save(folder, turbo: bool) -> None:
    """A pipeline of the real classes in the real layout, small enough for a test."""
    from diffusers import (
        AceStepPipeline,
        AceStepTransformer1DModel,
        AutoencoderOobleck,
        FlowMatchEulerDiscreteScheduler,
    )
    from diffusers.pipelines.ace_step.modeling_ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    torch.manual_seed(4)
    tokenizer = AutoTokenizer.from_pretrained(catalog.MODELS["mini"].folder / "tokenizer")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    small = {"intermediate_size": 64, **heads}
    vae = AutoencoderOobleck(
        encoder_hidden_size=128,
        downsampling_ratios=[2, 4, 4, 6, 10],
        channel_multiples=[1, 1, 1, 1, 1],
        decoder_channels=8,
        decoder_input_channels=64,
        sampling_rate=48000,
    )
    condition_encoder = AceStepConditionEncoder(
        hidden_size=40,
        text_hidden_dim=24,
        timbre_hidden_dim=64,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=2,
        **small,
    )
    condition_encoder.silence_latent.normal_()
    pooled = {"hidden_size": 32, "num_attention_pooler_hidden_layers": 1, **small}
    pipe = AceStepPipeline(
        vae=vae,
        text_encoder=Qwen3Model(
            Qwen3Config(vocab_size=len(tokenizer) + 8, hidden_size=24, num_hidden_layers=1, **small)
        ),
        tokenizer=tokenizer,
        transformer=AceStepTransformer1DModel(
            hidden_size=48,
            encoder_hidden_size=40,
            num_hidden_layers=2,
            is_turbo=turbo,
            model_version="turbo" if turbo else "sft",
            **small,
        ),
        condition_encoder=condition_encoder,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=None if turbo else AceStepAudioTokenizer(fsq_dim=32, **pooled),
        audio_token_detokenizer=None if turbo else AceStepAudioTokenDetokenizer(**pooled),
    )
    pipe.save_pretrained(folder, max_shard_size="60KB")


@pytest.fixture(params=["sft", "turbo"])
def folder(request, tmp_path):
    save(tmp_path / request.param, request.param == "turbo")
    return tmp_path / request.param


def test_samples_equal_the_stock_pipeline(folder):
    """At 48 kHz nothing is resampled, so that the finished song can be compared bit for bit."""
    from diffusers import AceStepPipeline

    from models import sampler

    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    model = catalog.choose(str(folder))
    turbo = folder.name == "turbo"
    assert (model.steps, model.guidance) == ((8, 1.0) if turbo else (27, 7.0))
    engine = drain(acestep.Engine.load(model, folder, "cpu", "float32"))
    wanted = song(inference_steps=STEPS, guidance_scale=model.guidance, shift=model.shift)
    piece = drain(engine.text_to_music(wanted))

    stock = AceStepPipeline.from_pretrained(folder, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        theirs = stock(
            prompt=[wanted.prompt],
            lyrics=["[Instrumental]"],
            vocal_language="unknown",
            audio_duration=10.0,
            num_inference_steps=STEPS,
            guidance_scale=model.guidance,
            shift=model.shift,
            latents=sampler.draw_noise(7, 250, 64)[0],
        ).audios[0]
    assert piece.sound.shape == (2, 480_000)
    assert np.array_equal(piece.sound, theirs.numpy())


def test_bfloat16_renders_nearly_the_same_song(folder):
    model = catalog.choose(str(folder))
    wanted = song(inference_steps=STEPS, guidance_scale=1.0)
    float32, bfloat16 = (
        drain(drain(acestep.Engine.load(model, folder, "cpu", dtype)).text_to_music(wanted)).sound
        for dtype in ("float32", "bfloat16")
    )
    assert not np.array_equal(float32, bfloat16)
    assert np.corrcoef(float32.ravel(), bfloat16.ravel())[0, 1] > 0.98
