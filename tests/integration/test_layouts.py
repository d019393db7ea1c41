"""Tiny random checkpoints in the layout of the published ones: XL SFT, XL turbo and 2B SFT.

They differ from the embedded model in these: 48 kHz and the strides of the real VAE, weights in
several files; XL has a transformer wider than its condition encoder, turbo no audio tokenizer.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import drain, song

from models import acestep, catalog, sampler, timbre_token

STEPS = 3

LAYOUTS = ("xl-sft", "xl-turbo", "2b-sft")


def save(folder, layout: str) -> None:
    """Write a pipeline of the real classes in the real layout, small enough for a test."""
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
    turbo = layout.endswith("turbo")
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
            hidden_size=48 if layout.startswith("xl") else 40,
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


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("layouts") / request.param
    save(path, request.param)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    return drain(acestep.Engine.load(catalog.choose(str(folder)), folder, "cpu", "float32"))


def test_samples_equal_the_stock_pipeline(folder, engine):
    """At 48 kHz nothing is resampled, so that the finished song can be compared bit for bit.

    The stock pipeline of XL is given the timbre token that it leaves out.
    """
    from diffusers import AceStepPipeline

    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    model, turbo = engine.model, folder.name == "xl-turbo"
    assert (model.steps, model.guidance) == ((8, 1.0) if turbo else (27, 7.0))
    wanted = song(inference_steps=STEPS, guidance_scale=model.guidance, shift=model.shift)
    piece = drain(engine.text_to_music(wanted))

    stock = AceStepPipeline.from_pretrained(folder, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    if folder.name != "2b-sft":
        timbre = stock.condition_encoder.timbre_encoder
        timbre.embed_tokens.register_forward_hook(
            lambda _, __, frames: torch.cat([timbre.special_token, frames], dim=1)
        )
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


def rms_norm(x, module):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * module.weight.double()


def rotate(x, theta):
    """Rotary position embedding of [length, heads, width], halves rotated against each other."""
    length, _, width = x.shape
    rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def timbre_by_the_authors_rule(encoder, frames, with_token=True):
    """Their XL timbre encoder written out in float64: [frames, channels] to [width]."""

    def linear(module, x):
        y = x @ module.weight.double().T
        return y if module.bias is None else y + module.bias.double()

    x = linear(encoder.embed_tokens, frames.double())
    if with_token:
        x = torch.cat([encoder.special_token[0].double(), x])
    places = torch.arange(len(x))
    near = (places[:, None] - places[None]).abs() <= encoder.config.sliding_window
    for i, layer in enumerate(encoder.layers):
        normed, attention = rms_norm(x, layer.input_layernorm), layer.self_attn
        heads, shared, width = attention.heads, attention.kv_heads, attention.head_dim
        q = rms_norm(linear(attention.to_q, normed).view(len(x), heads, width), attention.norm_q)
        k = rms_norm(linear(attention.to_k, normed).view(len(x), shared, width), attention.norm_k)
        v = linear(attention.to_v, normed).view(len(x), shared, width)
        q, k = rotate(q, encoder.config.rope_theta), rotate(k, encoder.config.rope_theta)
        k, v = (z.repeat_interleave(heads // shared, dim=1) for z in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / width**0.5
        if i % 2 == 0:
            scores = scores.masked_fill(~near, -torch.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + linear(attention.to_out[0], mixed)
        normed, mlp = rms_norm(x, layer.post_attention_layernorm), layer.mlp
        gate = torch.nn.functional.silu(linear(mlp.gate_proj, normed))
        x = x + linear(mlp.down_proj, gate * linear(mlp.up_proj, normed))
    return rms_norm(x, encoder.norm)[0]


def test_xl_reads_its_timbre_at_the_learned_token_and_2b_at_the_first_frame(folder, engine):
    reference, _ = sampler.draw_noise(5, acestep.TIMBRE_FRAMES, engine.channels)
    encoder, is_xl = engine.pipe.condition_encoder.timbre_encoder, folder.name != "2b-sft"
    assert timbre_token.has_token(engine.pipe.transformer.config) == is_xl
    with torch.inference_mode():
        new, old = (
            engine.conditions(song(), timbre=reference, edition=edition)[0].cond[0]
            for edition in (2, 1)
        )
        with_token, without = (
            timbre_by_the_authors_rule(encoder, reference[0], token) for token in (True, False)
        )
    lyrics = len(engine.pipe.tokenizer(acestep.lyric_text("[Instrumental]", "unknown")).input_ids)
    wanted = with_token if is_xl else without
    assert float((new[lyrics] - wanted).abs().max()) < 1e-6
    assert float((old[lyrics] - without).abs().max()) < 1e-6
    assert float((with_token - without).abs().max()) > 0.1
    others = [i for i in range(len(new)) if i != lyrics]
    assert torch.equal(new[others], old[others])
    assert torch.equal(new, old) != is_xl


def test_the_embedded_model_has_no_timbre_token():
    from diffusers import AceStepTransformer1DModel

    config = AceStepTransformer1DModel.load_config(catalog.MODELS["mini"].folder / "transformer")
    mini = AceStepTransformer1DModel.from_config(config).config
    assert not timbre_token.has_token(mini)


def test_a_library_that_prepends_the_timbre_token_itself_is_noticed():
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepTimbreEncoder

    class Later(AceStepTimbreEncoder):
        def __init__(self, **config):
            super().__init__(**config)
            linear = self.embed_tokens.forward
            self.embed_tokens.forward = lambda x: torch.cat([self.special_token, linear(x)], dim=1)

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    small = {"hidden_size": 16, "intermediate_size": 16, "timbre_hidden_dim": 8, **heads}
    references = torch.randn(1, 20, 8), torch.zeros(1, dtype=torch.long)
    now, later = (kind(**small).eval() for kind in (AceStepTimbreEncoder, Later))
    with timbre_token.prepended(now):
        now(*references)
    with pytest.raises(RuntimeError, match="its own way"), timbre_token.prepended(later):
        later(*references)
    for encoder in (now, later):
        assert not encoder.embed_tokens._forward_hooks
        assert not encoder.layers[0]._forward_pre_hooks


def test_bfloat16_renders_nearly_the_same_song(folder, engine):
    wanted = song(inference_steps=STEPS, guidance_scale=1.0)
    narrow = drain(acestep.Engine.load(engine.model, folder, "cpu", "bfloat16"))
    float32, bfloat16 = (
        drain(each.text_to_music(wanted)).sound.ravel() for each in (engine, narrow)
    )
    assert not np.array_equal(float32, bfloat16)
    assert np.corrcoef(float32, bfloat16)[0, 1] > 0.98
