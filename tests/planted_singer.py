"""A tiny transformer of the 2B model's shape that attends to its lyrics in a known order.

Its weights are random, but for queries of the heads that lyric timing looks at: they are solved for,
so that frame after frame they match the keys of one token after another.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import torch
from conftest import drain, song

from models import catalog, lyric_attention
from models.acestep import Engine, lyric_text

LYRICS = """[verse]
Streetlights hum a tune I know
Every window keeps it low
[chorus]
Carry me home, carry me slow"""
DURATION_S, FIRST_S, LAST_S = 8, 1.2, 6.8
"""Nothing is sung before `FIRST_S` and after `LAST_S`."""


def song_with_lyrics(**changes):
    """The request of the song for which a singer is planted."""
    fields = {"instrumental": False, "lyrics": LYRICS, "duration_s": DURATION_S}
    return song(
        **{**fields, "vocal_language": "en", "inference_steps": 2, "guidance_scale": 1, **changes}
    )


def singer(mini: Engine, fast: bool = False) -> Engine:
    """An engine with a random transformer of 24 layers and 16 heads, whose layers change nothing."""
    from diffusers import AceStepTransformer1DModel

    torch.manual_seed(3)
    transformer = AceStepTransformer1DModel(
        hidden_size=128,
        encoder_hidden_size=mini.pipe.transformer.config.encoder_hidden_size,
        intermediate_size=16,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=16,
        in_channels=192,
        audio_acoustic_hidden_dim=64,
        sliding_window=64,
    ).eval()
    with torch.no_grad():
        for layer in transformer.layers:
            layer.cross_attn.to_out[0].weight.zero_()
    names = ("tokenizer", "text_encoder", "condition_encoder", "vae")
    parts = {name: getattr(mini.pipe, name) for name in names}
    pipe = SimpleNamespace(transformer=transformer, audio_tokenizer=None, **parts)
    return Engine(pipe, replace(catalog.choose("mini"), sings=True), "cpu", fast)


def without_sound(engine: Engine, **changes):
    """The conditions and the latents of the song, which is not decoded."""
    request = song_with_lyrics(**changes)
    with torch.inference_mode():
        conditions, _ = engine.conditions(request)
        return conditions, drain(engine.denoise(conditions, request))


def sung_tokens(engine: Engine) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Where the lyric tokens stand, their places in the condition, and which of them are sung."""
    text = lyric_text(LYRICS, "en")
    offsets = engine.pipe.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    first, spans = lyric_attention.lyric_spans(offsets, text, LYRICS)
    sung = [
        i
        for i, (a, b) in enumerate(spans)
        if LYRICS[a:b].strip() and LYRICS.rfind("[", 0, b) <= LYRICS.rfind("]", 0, a + 1)
    ]
    return spans, [first + i for i in range(len(spans))], sung


def plant(engine: Engine) -> dict[int, tuple[int, int]]:
    """Let the engine attend to the lyrics of its song in order; returns each token's frames.

    The latents of the song stay the same, since no layer's cross-attention reaches its output.
    """
    conditions, latents = without_sound(engine)
    _, places, sung = sung_tokens(engine)
    transformer = engine.pipe.transformer
    frames = math.ceil(latents.shape[1] / 2)
    edges = torch.linspace(FIRST_S / 0.08, LAST_S / 0.08, len(sung) + 1).round().int().tolist()
    heads, hidden = lyric_attention.HEADS[24, 16], {}
    hooks = [
        transformer.layers[layer].cross_attn.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: hidden.__setitem__(
                layer, (args or (kwargs["hidden_states"],))[0][0]
            ),
            with_kwargs=True,
        )
        for layer in heads
    ]
    lyric_attention.attention_maps(engine, conditions, latents, heads, 0.5, slice(0, 1))
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        cond = transformer.condition_embedder(conditions.cond)[0]
        for layer, chosen in heads.items():
            attn = transformer.layers[layer].cross_attn
            attn.norm_q.weight.fill_(2.0)
            # Unlike those of random weights, these keys are as far apart as random vectors.
            wanted = torch.randn(len(cond), attn.to_k.out_features, dtype=torch.float64)
            attn.to_k.weight.copy_(torch.linalg.lstsq(cond.double(), wanted).solution.T)
            keys = attn.norm_k(attn.to_k(cond).unflatten(-1, (8, 16)))
            for head in chosen:
                # Frames without words look at the last token, which belongs to the style.
                wanted = keys[-1, head // 2].repeat(frames, 1)
                for n, token in enumerate(sung):
                    wanted[edges[n] : edges[n + 1]] = keys[places[token], head // 2]
                solved = torch.linalg.lstsq(hidden[layer].double(), wanted.double()).solution
                attn.to_q.weight[16 * head : 16 * head + 16] = solved.T.float()
    return {token: (edges[n], edges[n + 1]) for n, token in enumerate(sung)}
