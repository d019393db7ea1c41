"""Operations on somebody's sound: what stays stays bit for bit, what is asked reaches the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import drain, song
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from core.requests import SAMPLE_RATE
from models import vae
from pipeline import RepaintSettings

STEPS = 4


def ask(**changes):
    return song(inference_steps=STEPS, **changes)


@pytest.fixture(scope="module")
def source(engine):
    """Ten seconds that the embedded model made, float32 [2, samples] at 48 kHz."""
    return drain(engine.text_to_music(song(seed=3, inference_steps=8))).sound


@pytest.fixture
def far_wall(engine):
    """What the transformer and the text encoder receive, call by call."""
    heard, read = [], []
    hooks = [
        engine.pipe.transformer.register_forward_pre_hook(
            lambda _, __, kwargs: heard.append(dict(kwargs)), with_kwargs=True
        ),
        engine.pipe.text_encoder.register_forward_pre_hook(
            lambda _, __, kwargs: read.append(engine.pipe.tokenizer.decode(kwargs["input_ids"][0])),
            with_kwargs=True,
        ),
    ]
    yield heard, read
    for hook in hooks:
        hook.remove()


def seconds(s):
    return round(s * SAMPLE_RATE)


@pytest.mark.parametrize("mode", ["conservative", "balanced", "aggressive"])
def test_outside_a_repaint_not_one_sample_changes(engine, source, mode):
    settings = RepaintSettings.of(mode, 0.5)
    start, end, fade = seconds(3.3), seconds(6.1), round(settings.fade_s * SAMPLE_RATE)
    piece = drain(pipeline.repaint(engine, ask(), source, [(start, end)], settings))
    assert piece.sound.shape == source.shape
    assert np.array_equal(piece.sound[:, : start - fade], source[:, : start - fade])
    assert np.array_equal(piece.sound[:, end + fade :], source[:, end + fade :])
    changed = piece.sound[:, start:end] - source[:, start:end]
    assert np.sqrt(np.mean(changed**2)) > 0.1 * np.sqrt(np.mean(source**2))


@settings(max_examples=5, deadline=None)
@given(st.floats(0, 9.5), st.floats(0.02, 9.0))
def test_random_regions_hold_to_it(engine, source, start_s, length_s):
    start = seconds(start_s)
    end = min(source.shape[1], start + max(1, seconds(length_s)))
    settings = RepaintSettings.of("balanced", 0.3)
    fade = round(settings.fade_s * SAMPLE_RATE)
    piece = drain(
        pipeline.repaint(engine, song(inference_steps=1), source, [(start, end)], settings)
    )
    kept = np.ones(source.shape[1], bool)
    kept[max(0, start - fade) : end + fade] = False
    assert np.array_equal(piece.sound[:, kept], source[:, kept])


def test_what_changed_outside_is_counted():
    source = np.zeros((2, 100), np.float32)
    sound = source.copy()
    sound[0, [9, 10, 29, 30, 95]] = 1.0
    sound[1, 95] = 1.0
    assert pipeline._changed_outside(source, sound, [(15, 25)], 5) == 3


def test_the_authors_numbers_for_each_mode():
    assert RepaintSettings.of("conservative", 0.7) == RepaintSettings(1.0, 25, 0.05)
    assert RepaintSettings.of("balanced", 0.5) == RepaintSettings(0.5, 12, 0.025)
    assert RepaintSettings.of("aggressive", 0.2) == RepaintSettings(0.0, 0, 0.01)


def test_a_repaint_shows_the_model_silence_inside_the_mask_and_the_source_outside(
    engine, source, far_wall
):
    heard, read = far_wall
    region = (seconds(4), seconds(6))
    drain(pipeline.repaint(engine, ask(), source, [region], RepaintSettings.of("conservative", 0)))
    assert "repaint the mask area" in read[0]
    shown = heard[0]["context_latents"][0]
    latents, mask = shown.split(engine.channels, dim=1)
    inside = torch.zeros(250, dtype=torch.bool)
    inside[100:150] = True
    assert torch.equal(mask[:, 0] > 0, inside)
    with torch.inference_mode():
        clean = drain(pipeline.encode(engine, source))[0]
        silence = engine.silence(250)[0]
    assert torch.equal(latents[inside], silence[inside])
    assert torch.equal(latents[~inside], clean[~inside])
    # Held: after every step the outside is the source, noised as far as that time is due.
    for call, t in zip(heard[1:], (0.75, 0.5, 0.25), strict=True):
        outside = call["hidden_states"][0][~inside]
        noise = heard[0]["hidden_states"][0][~inside]
        assert torch.allclose(outside, t * noise + (1 - t) * clean[~inside], atol=1e-5)


@pytest.mark.parametrize(("before_s", "after_s"), [(0, 10), (3.5, 0), (2.25, 4.75)])
def test_extend_is_longer_by_what_was_asked_and_keeps_the_song(engine, source, before_s, after_s):
    request = ask(duration_s=10 + before_s + after_s)
    piece = drain(pipeline.extend(engine, request, source, before_s=before_s, after_s=after_s))
    before, after, fade = seconds(before_s), seconds(after_s), seconds(0.05)
    assert piece.sound.shape == (2, source.shape[1] + before + after)
    first, last = (fade if before else 0), source.shape[1] - (fade if after else 0)
    kept = piece.sound[:, before : before + source.shape[1]]
    assert np.array_equal(kept[:, first:last], source[:, first:last])
    for made in (piece.sound[:, :before], piece.sound[:, before + source.shape[1] :]):
        if made.size:
            assert np.sqrt(np.mean(made**2)) > 0.02 * np.sqrt(np.mean(source**2))


def test_the_same_edit_twice_is_the_same_sound(engine, source):
    one, two = (
        drain(pipeline.extend(engine, ask(duration_s=15), source, after_s=5)).sound
        for _ in range(2)
    )
    other = drain(pipeline.extend(engine, ask(duration_s=15, seed=8), source, after_s=5)).sound
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_a_cover_follows_the_sketch_and_lets_go_once(engine, source, far_wall):
    heard, read = far_wall
    drain(pipeline.cover(engine, ask(guidance_scale=1.0), source, strength=0.5))
    assert "generate audio semantic tokens" in read[0]
    assert "fill the audio semantic mask" in read[1]
    with torch.inference_mode():
        latents = drain(pipeline.encode(engine, source))
        sketch = pipeline.decode_codes(engine, pipeline.extract_codes(engine, latents))[0]
        silence = engine.silence(250)[0]
    shown = [call["context_latents"][0][:, : engine.channels] for call in heard]
    assert [torch.equal(s, sketch) for s in shown] == [True, True, False, False]
    assert all(torch.equal(s, silence) for s in shown[2:])
    assert all(bool((c["context_latents"][0][:, engine.channels :] == 1).all()) for c in heard)


def test_a_cover_at_full_strength_never_lets_go_and_may_start_from_the_source(
    engine, source, far_wall
):
    heard, read = far_wall
    piece = drain(pipeline.cover(engine, ask(guidance_scale=1.0), source, noise=0.5))
    assert len(read) == 1
    assert [float(c["timestep"][0]) for c in heard] == [0.5, 0.25]
    assert piece.sound.shape == source.shape


def test_a_silent_reference_is_none_and_a_real_one_is_thirty_seconds(engine, source):
    with torch.inference_mode():
        assert drain(pipeline.encode_timbre(engine, np.zeros((2, 48000), np.float32))) is None
        timbre = drain(pipeline.encode_timbre(engine, source))
    assert timbre.shape == (1, 30 * vae.FRAME_RATE, engine.channels)


def test_a_morph_of_no_strength_is_the_source_within_codec_error(engine, source):
    limits = {"n_min": 0.0, "n_avg": 1}
    told, wanted = ask(), ask(prompt="bright chiptune")
    none = drain(pipeline.morph(engine, wanted, source, told, n_max=0.0, **limits)).sound
    with torch.inference_mode():
        latents = drain(pipeline.encode(engine, source))
        wave = drain(vae.decode(engine.pipe.vae, latents))
    coded = engine.finish(wave, source.shape[1], 0).sound
    assert np.array_equal(none, coded)
    full = drain(pipeline.morph(engine, wanted, source, told, n_max=1.0, **limits)).sound
    assert not np.allclose(full, coded, atol=1e-3)
