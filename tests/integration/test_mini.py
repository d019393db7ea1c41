"""Training of the embedded model: properties of its parts, and the small mode end to end."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the embedded model is trained with Lightning")

from diffusers import AceStepPipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from mini import eval as evaluation
from mini import measure, planner, resume
from mini.__main__ import SMALL, make
from mini.captions import bpm_near, caption
from mini.compose import BEAT_FRAMES, STYLES, bpm_of, compose
from mini.measure import Key
from mini.model import clock
from mini.prompts import lyric_prompt, text_prompt, text_tokenizer
from mini.synth import HOP, SAMPLE_RATE, piano_roll, render
from mini.vae import LATENTS, Codec, LatentScale, export, initialise


@pytest.mark.parametrize("style", STYLES)
def test_a_seed_determines_the_piece_and_its_audio(style):
    first, second = (compose(7, 12.0, style=style) for _ in range(2))
    assert first == second
    assert first.notes
    assert np.array_equal(render(first), render(second))


def test_a_rendered_crop_equals_that_part_of_the_full_render():
    piece = compose(3)
    assert np.array_equal(render(piece, 100, 50), render(piece)[:, 100 * HOP : 150 * HOP])
    assert piano_roll(piece, 0, piece.frames).sum() > 0


def test_rendered_audio_stays_below_full_scale():
    assert max(np.abs(render(compose(seed, 12.0))).max() for seed in range(20)) < 1


def test_rendered_music_has_the_tempo_and_key_it_was_composed_in():
    pieces = [compose(seed, 12.0, tagged=False) for seed in range(500, 524)]
    tempi, keys = [], []
    for piece in pieces:
        sound = render(piece, 0, 300)
        tempi.append(measure.tempo_right(measure.tempo(sound, SAMPLE_RATE), piece.bpm))
        keys.append(
            measure.key_right(measure.key(sound, SAMPLE_RATE), Key(piece.tonic, piece.mode))
        )
    assert np.mean(tempi) > 0.9
    assert np.mean(keys) > 0.7  # a loop may dwell on the dominant


def test_every_prompted_tempo_rounds_to_the_tempo_of_the_piece():
    rng = random.Random(0)
    for beat in BEAT_FRAMES:
        piece = compose(1, 8.0, style="lofi", beat_frames=beat)
        prompted = {bpm_near(piece, rng) for _ in range(50)}
        assert all(min(BEAT_FRAMES, key=lambda b: abs(1500 / bpm - b)) == beat for bpm in prompted)
        assert bpm_of(beat) in prompted


def test_the_exported_codec_equals_the_trained_codec():
    torch.manual_seed(0)
    codec = Codec().eval()
    sound = torch.from_numpy(render(compose(1), 0, 80))[None]
    initialise(codec, sound)
    scale = LatentScale(torch.randn(LATENTS) * 0.1, torch.rand(LATENTS) + 0.5)
    vae = export(codec, scale)
    with torch.no_grad():
        latents = codec.encode(sound)
        exported = vae.encode(sound).latent_dist.mean
        assert torch.allclose(exported, scale.normalise(latents), atol=1e-4)
        # The decoder pads with zeros, which stand for another latent once the scale is folded in.
        inner = slice(25 * HOP, -25 * HOP)
        decoded, expected = vae.decode(exported).sample, codec.decode(latents)
        assert torch.allclose(decoded[..., inner], expected[..., inner], atol=1e-4)


def test_a_codec_is_restored_from_its_export():
    torch.manual_seed(0)
    codec = Codec().eval()
    initialise(codec, torch.from_numpy(render(compose(1), 0, 80))[None])
    unscaled = LatentScale(torch.zeros(LATENTS), torch.ones(LATENTS))
    restored = resume.restore_codec(export(codec, unscaled)).state_dict()
    for name, weight in codec.state_dict().items():
        assert torch.allclose(restored[name], weight, atol=1e-6), name


@pytest.mark.parametrize("beat", BEAT_FRAMES)
def test_the_clock_has_a_channel_for_every_beat_and_bar_period(beat):
    channels, frames = clock(800), torch.arange(800)
    assert channels.shape == (800, LATENTS)
    for period in (beat, 4 * beat):
        sine = torch.sin(2 * torch.pi * frames / period)
        correlations = [
            torch.corrcoef(torch.stack([sine, channel]))[0, 1] for channel in channels.T[:60]
        ]
        assert max(correlations) > 0.999


def test_prompts_equal_the_pipelines_byte_for_byte():
    metas = {"bpm": 92, "keyscale": "F# minor", "timesignature": "4"}
    for given in (metas, dict.fromkeys(metas)):
        text, lyric = AceStepPipeline._format_prompt(
            _Formatter(), "a lofi beat", "[verse]\nla la", "en", 30.0, None, **given
        )
        assert text_prompt("a lofi beat", "text2music", **given, seconds=30.0) == text
        assert lyric_prompt("[verse]\nla la", "en") == lyric


class _Formatter:
    """The part of the pipeline that formats a prompt."""

    _build_metadata_string = staticmethod(AceStepPipeline._build_metadata_string)


def test_keys_and_numbers_are_single_tokens(tmp_path):
    tokenizer = text_tokenizer(tmp_path, pieces=20)
    for text in ("F# minor", "Bb major", "C\u266f minor", "92", "[verse]"):
        assert len(tokenizer(text).input_ids) == 1
    assert tokenizer.decode(tokenizer("the major chord").input_ids) == "the major chord"


def test_captions_name_the_style_and_only_instruments_that_play():
    rng = random.Random(1)
    for seed in range(30):
        piece = compose(seed, 8.0)
        text = caption(piece, rng)
        assert any(name in text for name in STYLES[piece.style].names)
        assert "drums" not in text or "no drums" in text or "drums" in piece.parts


def test_the_small_mode_makes_a_complete_checkpoint(tmp_path):
    vendor = tmp_path / "model"
    make(tmp_path / "work", vendor, SMALL)
    pipe = AceStepPipeline.from_pretrained(vendor, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.audio_tokenizer.quantizer.codebook_size == 4096
    sampling = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "shift": 1.0,
        "audio_duration": 2.0,
    }
    song = pipe(
        prompt="lofi", lyrics="[Instrumental]", bpm=83, keyscale="C major", **sampling
    ).audios[0]
    assert song.shape == (2, 2 * SAMPLE_RATE)
    assert torch.isfinite(song).all()
    source = torch.from_numpy(render(compose(5), 0, 50))
    for task in ("cover", "repaint"):
        made = pipe(prompt="house", lyrics="", task_type=task, src_audio=source, **sampling).audios[
            0
        ]
        assert made.shape == source.shape

    tokenizer = AutoTokenizer.from_pretrained(vendor / "planner")
    model, loaded = AutoModelForCausalLM.from_pretrained(
        vendor / "planner", dtype=torch.float32, output_loading_info=True
    )
    assert not set(loaded["missing_keys"]) - {"lm_head.weight"}
    turns = [
        {"role": "system", "content": f"# Instruction\n{planner.GENERATE}\n\n"},
        {"role": "user", "content": "# Caption\nlofi\n\n# Lyric\n[Instrumental]\n"},
    ]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == planner.generate_prompt("lofi", "[Instrumental]")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert model(ids).logits.shape[-1] == len(tokenizer)
    first, last = (tokenizer.convert_tokens_to_ids(planner.code_token(n)) for n in (0, 4095))
    assert last - first == 4095

    make(tmp_path / "work", vendor, SMALL)  # resumes: nothing is left to do
    make(
        tmp_path / "next", tmp_path / "second", SMALL, start=vendor
    )  # starts from the finished model
    assert (tmp_path / "second" / "model_index.json").exists()


@pytest.mark.long
def test_the_style_of_a_rendered_piece_is_recognised_at_48_khz():
    """Held-out rendered pieces must pass the style test that generated songs are held to."""
    classifier = evaluation.StyleClassifier(60)
    pieces = evaluation.held_out_pieces(20)
    correct = [classifier.style(*evaluation.as_heard(piece)) == piece.style for piece in pieces]
    assert np.mean(correct) >= 0.9
