"""The engine on the embedded model, compared with diffusers' own pipeline where both can."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import recorded_graph
import torch
from conftest import drain, song

import pipeline
from audio import levels
from core.errors import StudioError
from models import acestep, sampler, vae
from models.acestep import prompt_text
from models.fast_transformer import FastTransformer
from models.vae import TILE_OVERLAP, decode, encode, receptive_frames


@pytest.fixture(scope="module")
def stock(engine):
    """diffusers' own pipeline on the same files."""
    from diffusers import AceStepPipeline

    pipe = AceStepPipeline.from_pretrained(engine.model.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(engine, request):
    return drain(engine.text_to_music(request))


def test_prompt_and_lyrics_are_formatted_like_the_stock_pipeline(stock):
    for given in (
        {"bpm": 92, "timesignature": "3", "keyscale": "F# minor"},
        {"bpm": None, "timesignature": "", "keyscale": ""},
    ):
        ours = prompt_text("dusty drums", duration_s=12.9, **given)
        theirs, lyric = stock._format_prompt("dusty drums", "[Verse]\nla", "en", 12.9, **given)
        assert ours == theirs
        assert acestep.lyric_text("[Verse]\nla", "en") == lyric


STOCK = {
    "prompt": [song().prompt],
    "lyrics": ["[Instrumental]"],
    "vocal_language": "unknown",
    "audio_duration": 10.0,
    "num_inference_steps": 4,
    "bpm": 90,
    "keyscale": "C major",
}


@pytest.mark.parametrize(("guidance", "shift"), [(3.0, 1.0), (1.0, 3.0), (7.0, 2.0)])
def test_latents_equal_the_stock_pipeline(engine, stock, guidance, shift):
    settings = {"guidance_scale": guidance, "shift": shift}
    request = song(inference_steps=4, bpm=90, keyscale="C major", **settings)
    noise, _ = sampler.draw_noise(7, 250, 64)
    plain = acestep.Engine(stock, engine.model, "cpu")
    with torch.inference_mode():
        conditions, _ = plain.conditions(request)
        latents = drain(plain.denoise(conditions, request))
        theirs = stock(**STOCK, **settings, latents=noise, output_type="latent").audios
        assert torch.equal(latents, theirs)
        # The engine's VAE has its zeros rechanged; the latents are the same.
        assert torch.equal(drain(engine.denoise(conditions, request)), latents)


def test_samples_equal_the_stock_pipeline(engine, stock):
    noise, _ = sampler.draw_noise(7, 125, 64)
    arguments = {
        **STOCK,
        "audio_duration": 5.0,
        "guidance_scale": 1.0,
        "shift": 1.0,
        "latents": noise,
    }
    with torch.inference_mode():
        latents = stock(**arguments, output_type="latent").audios
        theirs = stock(**arguments).audios[0].numpy()
        wave = drain(decode(stock.vae, latents)).numpy()
        assert np.array_equal(levels.normalize_peak(wave)[0], theirs)
        # With the VAE's zeros rechanged, equal up to rounding.
        ours = levels.normalize_peak(drain(decode(engine.pipe.vae, latents)).numpy())[0]
        assert np.abs(ours - theirs).max() < 2e-6


def test_a_seed_gives_the_same_samples_whatever_was_rendered_before(engine):
    request = song(infer_method="sde", inference_steps=2)
    first = make(engine, request)
    other = make(engine, request.model_copy(update={"seed": 8}))
    assert np.array_equal(first.sound, make(engine, request).sound)
    assert not np.array_equal(first.sound, other.sound)
    assert (first.seed, other.seed) == (7, 8)


def test_tiled_decode_equals_untiled_decode(engine, monkeypatch):
    latents, _ = sampler.draw_noise(2, 300, 64)
    with torch.inference_mode():
        whole = engine.pipe.vae.decoder(latents.transpose(1, 2))[0]
        monkeypatch.setattr(vae, "TILE_FRAMES", 64)
        tiled = drain(decode(engine.pipe.vae, latents))
        assert float((tiled - whole).abs().max() / whole.abs().max()) < 1e-6
        # The overlap is needed: one frame too few must show.
        monkeypatch.setattr(vae, "receptive_frames", lambda _: 0)
        monkeypatch.setattr(vae, "TILE_OVERLAP", 8)
        short = drain(decode(engine.pipe.vae, latents))
    assert float((short - whole).abs().max() / whole.abs().max()) > 1e-6


def test_encoding_is_repeatable_equal_when_tiled_and_decodes_to_the_same_pitch(engine, monkeypatch):
    autoencoder, rate = engine.pipe.vae, engine.rate
    t = torch.arange(int(13.3 * rate)) / rate
    sound = 0.3 * torch.stack([torch.sin(2 * torch.pi * f * t) for f in (220.0, 330.0)])
    with torch.inference_mode():
        whole = drain(encode(autoencoder, sound))
        assert whole.shape == (1, 333, engine.channels)
        assert torch.equal(whole, drain(encode(autoencoder, sound)))
        monkeypatch.setattr(vae, "TILE_FRAMES", 64)
        tiled = drain(encode(autoencoder, sound))
        assert float((tiled - whole).abs().max() / whole.abs().max()) < 1e-5
        back = drain(decode(autoencoder, whole))[:, : sound.shape[1]]
    left, right = (np.abs(np.fft.rfft(channel)) for channel in back.numpy())
    assert np.argmax(left) * rate / back.shape[1] == pytest.approx(220, abs=3)
    assert np.argmax(right) * rate / back.shape[1] == pytest.approx(330, abs=3)


def test_overlap_covers_the_receptive_field_of_the_decoder():
    """Measured on a narrow decoder with the real strides: nothing beyond the reach changes."""
    from diffusers import AutoencoderOobleck

    torch.manual_seed(0)
    vae = AutoencoderOobleck(
        encoder_hidden_size=16,
        downsampling_ratios=[2, 4, 4, 6, 10],
        channel_multiples=[1, 1, 1, 1, 1],
        decoder_channels=8,
        decoder_input_channels=8,
    ).double()
    reach = receptive_frames(vae.config)
    assert 8 < reach <= TILE_OVERLAP
    z = torch.randn(1, 8, 40, dtype=torch.float64)
    with torch.inference_mode():
        before = vae.decoder(z)
        z[:, :, 20] += 1.0
        changed = ((vae.decoder(z) - before).abs() > 0).any(1)[0].nonzero().flatten() // 1920
    assert 20 - reach <= int(changed.min())
    assert int(changed.max()) <= 20 + reach


@pytest.mark.parametrize("seconds", [10, 12.34, 17.001])
def test_length_is_exact_to_the_sample(engine, seconds):
    piece = make(engine, song(duration_s=seconds, inference_steps=1))
    assert piece.sound.shape == (2, round(seconds * 48000))
    assert piece.sound.dtype == np.float32
    assert np.isfinite(piece.sound).all()


def test_four_minutes_decode_in_bounded_memory(engine):
    latents, _ = sampler.draw_noise(1, 6000, 64)
    me = psutil.Process()
    with torch.inference_mode():
        before, most = me.memory_info().rss, 0
        for _ in decode(engine.pipe.vae, latents):
            most = max(most, me.memory_info().rss)
    assert most - before < 1.5e9


def test_metadata_reaches_the_encoder_after_any_style(engine):
    seen = []
    hook = engine.pipe.text_encoder.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    words = ("kvzq wxjk zzqv " * 80)[:1000]  # a style the tokenizer has no words for
    with torch.inference_mode():
        _, notes = engine.conditions(
            song(prompt=words, bpm=77, keyscale="Eb minor", timesignature="3")
        )
        _, unspaced = engine.conditions(song(prompt="寧" * 400, bpm=77))
        _, short = engine.conditions(song(bpm=77))
    hook.remove()
    for ids in seen:
        assert ids.shape[1] <= acestep.TEXT_TOKENS
        assert "- bpm: 77" in engine.pipe.tokenizer.decode(ids[0])
    read = engine.pipe.tokenizer.decode(seen[0][0])
    kept = read.split("# caption\n")[1].split("\n")[0].strip()
    assert words.startswith(kept)
    assert words[len(kept)] == " "
    assert "eb minor" in read
    assert "- timesignature: 3" in read
    assert len(notes) == 1
    assert "cut to its first" in notes[0]
    assert len(unspaced) == 1
    assert short == []


def test_instrumental_replaces_the_lyrics_and_notes_it(engine):
    seen = []
    table = engine.pipe.text_encoder.get_input_embeddings()
    hook = table.register_forward_pre_hook(
        lambda _, args: seen.append(engine.pipe.tokenizer.decode(args[0][0]))
    )
    with torch.inference_mode():
        _, notes = engine.conditions(song(lyrics="la la la", instrumental=True))
        engine.conditions(song(lyrics="la la la", instrumental=False))
    hook.remove()
    assert any("# lyric\n[instrumental]" in text for text in seen)
    assert any("# lyric\nla la la" in text for text in seen)
    assert notes == ["Instrumental: the lyrics were left out."]


@pytest.mark.parametrize("edition", [1, 2])
def test_empty_lyrics_mean_instrumental_since_edition_2(engine, edition):
    with torch.inference_mode():
        empty, notes = engine.conditions(song(lyrics=" \n", instrumental=False), edition=edition)
        instrumental, none = engine.conditions(song(lyrics="", instrumental=True), edition=edition)
    same = empty.cond.shape == instrumental.cond.shape and torch.equal(
        empty.cond, instrumental.cond
    )
    assert (same, bool(notes), none) == (edition == 2, edition == 2, [])


@pytest.mark.parametrize(("edition", "follows"), [(1, [False, False]), (2, [True, False])])
def test_a_cover_from_noised_source_follows_it_for_its_share_of_the_remaining_steps(
    engine, edition, follows
):
    seen = []
    hook = engine.pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["context_latents"][0]), with_kwargs=True
    )
    source = 0.1 * np.random.default_rng(0).standard_normal((2, 240_000), np.float32)
    request = song(duration_s=5, inference_steps=4, guidance_scale=1.0)
    drain(pipeline.cover(engine, request, source, strength=0.5, noise=0.5, edition=edition))
    hook.remove()
    silence = engine.silence(125)[0]
    assert [not torch.equal(s[:, : engine.channels], silence) for s in seen] == follows


def test_lyrics_beyond_the_token_limit_are_refused(engine):
    with torch.inference_mode(), pytest.raises(StudioError) as caught:
        engine.conditions(song(lyrics="ą ć ę ł ń " * 400, instrumental=False))
    assert caught.value.code == "lyrics-too-long"
    assert "2048" in caught.value.message


def test_nan_latents_are_refused(engine):
    bias = engine.pipe.transformer.proj_out_conv.bias
    kept = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[0] = float("nan")
        with pytest.raises(StudioError) as caught:
            make(engine, song(inference_steps=1))
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    assert caught.value.code == "sound-not-finite"


def test_out_of_memory_offers_a_shorter_length(engine, monkeypatch):
    def greedy(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.pipe.transformer, "forward", greedy)
    with pytest.raises(StudioError) as caught:
        make(engine, song(duration_s=100))
    assert caught.value.code == "out-of-memory"
    assert "50 s" in caught.value.action


def test_level_sets_the_peak_to_minus_one_dbfs_but_not_of_silence():
    tone = np.sin(np.arange(4800, dtype=np.float32) * 0.1)[None].repeat(2, 0)
    for gain in (0.01, 1.0, 5.0):
        sound, peak = levels.normalize_peak(tone * np.float32(gain))
        assert peak == -1.0
        assert abs(20 * np.log10(np.abs(sound).max()) + 1.0) < 1e-4
    hiss, peak = levels.normalize_peak(tone * np.float32(1e-5))
    assert np.abs(hiss).max() <= 1.01e-5
    assert peak == pytest.approx(-100, abs=0.1)
    nothing, peak = levels.normalize_peak(np.zeros((2, 100), np.float32))
    assert peak is None
    assert not nothing.any()


def test_progress_counts_every_step_and_tile(engine):
    steps = engine.text_to_music(song(duration_s=24, inference_steps=2))
    seen = [(e.stage, e.step, e.steps) for e in steps]
    assert seen == [
        ("Reading the words", 0, 1),
        *(("Denoising", i, 2) for i in range(3)),
        *(("Decoding", i, 3) for i in range(4)),
    ]


@pytest.fixture(scope="module")
def fast(engine):
    """The engine on the embedded model with the fast transformer, as on CUDA."""
    return drain(
        acestep.Engine.load(engine.model, engine.model.folder, "cpu", "float32", fast=True)
    )


@pytest.mark.parametrize(
    "changes",
    [{"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {"infer_method": "heun", "use_adg": True}],
)
def test_fast_transformer_renders_the_same_latents_up_to_rounding(engine, fast, changes):
    assert (engine.implementation, fast.implementation) == ("reference", "fast")
    request = song(duration_s=24, inference_steps=4, **changes)
    with torch.inference_mode():
        want, got = (
            drain(each.denoise(each.conditions(request)[0], request)) for each in (engine, fast)
        )
    assert float((got - want).norm() / want.norm()) < 1e-4
    assert not torch.equal(got, want)


def test_captured_steps_make_the_latents_of_those_that_are_not(fast, monkeypatch):
    request = song(duration_s=5, inference_steps=5, cfg_interval_start=0.6)
    with torch.inference_mode():
        conditions, _ = fast.conditions(request)
        want = drain(fast.denoise(conditions, request))
        graphs = recorded_graph.install(monkeypatch)
        monkeypatch.setattr(FastTransformer, "_on_cuda", lambda _: True)
        monkeypatch.setattr(fast.fast, "captured", None)
        got = drain(fast.denoise(conditions, request))
    assert torch.equal(got, want)
    assert len(graphs) == 2, "one with guidance and one without"


@pytest.mark.parametrize(
    ("kind", "gigabytes", "frames"),
    [("cpu", 4, 256), ("cuda", 8, 64), ("cuda", 12, 128), ("cuda", 24, 256)],
)
def test_tiles_are_smaller_on_cards_with_less_memory(monkeypatch, kind, gigabytes, frames):
    properties = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert vae.tile_frames(torch.device(kind)) == frames


def test_fast_transformer_follows_a_cover_that_changes_conditions(engine, fast):
    source = 0.1 * np.random.default_rng(0).standard_normal((2, 240_000), np.float32)
    request = song(duration_s=5, inference_steps=4)
    want, got = (
        drain(pipeline.cover(each, request, source, strength=0.5)) for each in (engine, fast)
    )
    assert (want.implementation, got.implementation) == ("reference", "fast")
    assert np.corrcoef(want.sound.ravel(), got.sound.ravel())[0, 1] > 0.9999


def test_progress_waits_for_the_step_before_the_one_just_queued(monkeypatch):
    log = []

    class Event:
        def __init__(self, device, blocking):
            self.step = len([entry for entry in log if entry[0] == "record"])

        def record(self):
            log.append(("record", self.step))

        def synchronize(self):
            log.append(("wait", self.step))

    def steps():
        yield from range(3)
        return "latents"

    monkeypatch.setattr(torch, "Event", Event)
    progress = acestep.as_progress(steps(), "Denoising", 2, "cuda")

    def show():
        log.append(("shown", next(progress).step))

    for _ in range(3):
        show()
    assert log == [
        *(("record", 0), ("shown", 0)),
        *(("record", 1), ("wait", 0), ("shown", 1)),
        *(("record", 2), ("wait", 1), ("shown", 2)),
    ]
    assert drain(progress) == "latents"


@pytest.mark.gpu
def test_accelerator_renders_the_same_song_up_to_rounding(engine):
    from models import catalog

    device = "cuda" if torch.cuda.is_available() else "mps"
    model = catalog.choose("mini")
    other = drain(acestep.Engine.load(model, model.folder, device, "float32"))
    request = song(inference_steps=8)
    here, there = make(engine, request).sound, make(other, request).sound
    assert np.corrcoef(here.ravel(), there.ravel())[0, 1] > 0.99
