"""The extra forward pass that times lyrics, on tiny random weights of the 2B model's shape."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted_singer
import pytest
import torch
from conftest import drain, read_sound
from planted_singer import LYRICS, without_sound

from audio import lyric_files, metadata, settings
from cli_output import deliver
from core.results import ModelUsed
from models import catalog, lyric_attention
from models.lyric_attention import HEADS, attention_maps, lyric_spans, time_lyrics
from runtime import device
from runtime.job import JobFolder, Setup
from runtime.song_task import GenerateTask
from runtime.stage_timer import StageTimer
from runtime.uploads import Uploads

TABLE = HEADS[24, 16]


def stages_and_result(steps):
    """The stages of all progress, and the return value."""
    stages = []
    while True:
        try:
            stages.append(next(steps).stage)
        except StopIteration as end:
            return stages, end.value


@pytest.fixture(scope="module")
def singers(engine):
    """The same planted singer by diffusers' attention and by ours, and each token's frames."""
    stock = planted_singer.singer(engine)
    places = planted_singer.plant(stock)
    fast = planted_singer.singer(engine)
    fast.pipe.transformer.load_state_dict(stock.pipe.transformer.state_dict())
    fast = type(fast)(fast.pipe, fast.model, "cpu", fast=True)
    return {"stock": stock, "fast": fast}, places


@pytest.fixture(scope="module")
def made(singers):
    return without_sound(singers[0]["stock"])


def test_the_maps_are_the_attention_that_the_layer_computes(singers, made):
    """Their shares of the values, through the output weights, are what diffusers' layer returns."""
    engine, seen = singers[0]["stock"], []
    attn = engine.pipe.transformer.layers[3].cross_attn
    weight = torch.randn_like(attn.to_out[0].weight)
    with torch.no_grad():
        attn.to_out[0].weight.copy_(weight)
    hook = attn.register_forward_hook(lambda *_args: seen.append(_args[-1]))
    tokens = slice(0, made[0].cond.shape[1])
    maps = attention_maps(engine, *made, {3: tuple(range(16))}, 0.5, tokens)
    hook.remove()
    with torch.no_grad():
        attn.to_out[0].weight.zero_()
    shares = torch.tensor(np.stack(maps)).float()  # [heads, tokens, frames]
    with torch.inference_mode():
        cond = engine.pipe.transformer.condition_embedder(made[0].cond)
        values = attn.to_v(cond)[0].unflatten(-1, (8, 16)).repeat_interleave(2, 1)
        mixed = (shares.transpose(1, 2) @ values.transpose(0, 1)).transpose(0, 1).flatten(1)
        assert torch.allclose(mixed @ weight.T, seen[0][0], atol=2e-2)
    assert torch.allclose(shares.sum(1), torch.ones(16, shares.shape[2]), atol=2e-3)


@pytest.mark.parametrize("way", ["stock", "fast"])
def test_lines_come_back_where_the_weights_put_them(singers, made, way):
    engine, places = singers[0][way], singers[1]
    stages, (lines, note) = stages_and_result(time_lyrics(engine, *made, LYRICS, "en", 2))
    assert set(stages) == {lyric_attention.STAGE}
    assert note == ""
    assert [line.text for line in lines] == [t for t in LYRICS.split("\n") if t[0] != "["]
    spans, _, _ = planted_singer.sung_tokens(engine)
    for line in lines:
        at = LYRICS.index(line.text)
        inside = [i for i, (a, b) in enumerate(spans) if b > at and a < at + len(line.text)]
        frames = [places[i] for i in inside if i in places]
        assert line.start_s == pytest.approx(frames[0][0] * 0.08, abs=0.081)
        assert line.end_s == pytest.approx(frames[-1][1] * 0.08, abs=0.081)
        assert line.sung


@pytest.mark.parametrize("way", ["stock", "fast"])
def test_the_pass_leaves_the_transformer_and_the_next_step_as_they_were(singers, made, way):
    engine = singers[0][way]
    transformer = engine.pipe.transformer
    layers = transformer.layers
    processors = [layer.cross_attn.processor for layer in layers]
    with torch.inference_mode():
        model = engine.conditioned_model(made[0])
        before = model(made[1], 0.5, False).cond
    drawn_before = torch.get_rng_state()
    drain(time_lyrics(engine, *made, LYRICS, "en", 2))
    assert torch.equal(drawn_before, torch.get_rng_state()), "the global generator was used"
    assert transformer.layers is layers
    assert [layer.cross_attn.processor for layer in layers] == processors
    with torch.inference_mode():
        assert torch.equal(before, model(made[1], 0.5, False).cond)


def test_only_the_layers_up_to_the_last_of_the_table_run(singers, made):
    engine, ran = singers[0]["stock"], []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(engine.pipe.transformer.layers)
    ]
    attention_maps(engine, *made, TABLE, 0.5, slice(9, 20))
    for hook in hooks:
        hook.remove()
    assert ran == [*range(7)]


def test_random_weights_are_said_not_to_be_sure(engine, made):
    unplanted = planted_singer.singer(engine)
    lines, note = drain(time_lyrics(unplanted, *made, LYRICS, "en", 2))
    assert lines == ()
    assert note == lyric_attention.NOT_SURE


def test_a_model_of_another_shape_is_not_guessed_at(engine, made):
    lines, note = drain(time_lyrics(engine, *made, LYRICS, "en", 1))
    assert lines == ()
    assert note == lyric_attention.UNKNOWN_SHAPE


def test_a_failing_layer_leaves_the_transformer_as_it_was(singers, made, monkeypatch):
    engine = singers[0]["stock"]
    layers = engine.pipe.transformer.layers
    processors = [layer.cross_attn.processor for layer in layers]
    monkeypatch.setattr(layers[5].mlp, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_maps(engine, *made, TABLE, 0.5, slice(9, 20))
    assert engine.pipe.transformer.layers is layers
    assert [layer.cross_attn.processor for layer in layers] == processors


def test_lyric_tokens_are_those_between_header_and_end():
    text = "# Languages\nen\n\n# Lyric\n\nla la<|endoftext|>"
    tokens = [(0, 12), (12, 14), (14, 25), (25, 27), (27, 30), (30, 43)]
    assert lyric_spans(tokens, text, "\nla la") == (2, [(0, 1), (1, 3), (3, 6)])


class Cache:
    """A model cache that holds one engine."""

    def __init__(self, engine):
        self._engine = engine

    def engine(self, job):
        yield from ()
        return self._engine

    def apply_adapters(self, job, engine):
        yield from ()
        return ()

    def encoded(self, job, engine, name, encode):
        yield from ()

    def used(self, weights):
        return ModelUsed(
            name="tiny", source="tiny", revision="1", sha256="ab" * 32, licence="MIT", may_sell=None
        )


def run_task(engine, **changes):
    """The take that `GenerateTask` makes, and the stages it says it will cost."""
    model = replace(engine.model, sings=changes.pop("sings", True))
    setup = Setup(model, device.find_device("cpu"), catalog.SONGWRITERS["qwen"], catalog.MUSICGEN)
    folder, task = JobFolder.create(), GenerateTask()
    job = drain(task.prepare(planted_singer.song_with_lyrics(**changes), setup, folder, Uploads()))
    cost = task.cost(job, lambda weights: True)
    timer = StageTimer()
    return drain(timer.watch(task.run(job, Cache(engine), timer))), cost


def test_a_take_records_the_times_in_its_settings_and_beside_its_song(singers):
    engine = singers[0]["stock"]
    take, cost = run_task(engine)
    song = Path(take.path)
    assert cost[lyric_attention.STAGE] == planted_singer.DURATION_S
    assert lyric_attention.STAGE in take.timings_s
    assert [line.text for line in take.lyric_times] == [
        t for t in LYRICS.split("\n") if t[0] != "["
    ]
    stored = settings.read_settings(song)
    assert metadata.lyrics_in(stored) == take.lyric_times
    assert song.with_suffix(".lrc").read_text("utf-8") == lyric_files.lrc(take.lyric_times)
    assert song.with_suffix(".srt").read_text("utf-8") == lyric_files.srt(take.lyric_times)
    silent, cost = run_task(engine, sings=False)
    assert not silent.lyric_times
    assert not cost[lyric_attention.STAGE]
    assert lyric_attention.STAGE not in silent.timings_s
    assert not Path(silent.path).with_suffix(".lrc").exists()
    assert np.array_equal(read_sound(song), read_sound(silent.path))


def test_the_command_line_writes_times_beside_songs_and_exports(singers, command):
    take, _ = run_task(singers[0]["stock"])
    flags = {"lrc": False, "srt": True, "without_settings": False, "json": False}
    assert deliver(take, argparse.Namespace(out=Path("song.flac"), **flags)) == 0
    assert Path("song.srt").read_text("utf-8") == lyric_files.srt(take.lyric_times)
    assert b"LYRICS=[00:0" in Path("song.flac").read_bytes()
    assert not Path("song.lrc").exists()
    done = command("export", "--source", "song.flac", "--out", "again.mp3", "--lrc")
    assert done.returncode == 0
    assert "again.lrc" in done.stderr
    assert Path("again.lrc").read_text("utf-8") == lyric_files.lrc(take.lyric_times)
    assert b"SYLT" in Path("again.mp3").read_bytes()
    untimed = take.model_copy(update={"lyric_times": ()})
    assert deliver(untimed, argparse.Namespace(out=Path("other.wav"), **flags)) == 0
    assert not Path("other.srt").exists()


def test_a_song_without_words_is_not_timed(singers):
    take, cost = run_task(singers[0]["stock"], duration_s=5, lyrics="[verse]\n[chorus]")
    assert not take.lyric_times
    assert not cost[lyric_attention.STAGE]
    assert not any("timed" in note for note in take.notes)


def test_a_song_is_kept_where_its_timing_fails(singers, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(lyric_attention, "attention_maps", fail)
    take, _ = run_task(singers[0]["stock"], duration_s=5)
    assert Path(take.path).is_file()
    assert lyric_attention.FAILED in take.notes
