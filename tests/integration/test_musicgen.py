"""MusicGen: same tokens as transformers, seamless long pieces, one model in memory."""

from __future__ import annotations

import gc
import json
import math
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_musicgen
from conftest import drain, song

import backend
from audio import levels, settings, splice
from core.errors import StudioError
from core.requests import SAMPLE_RATE, Musicgen
from core.results import Cancelled, Failed, Take
from models import acestep, catalog, checkpoints, musicgen
from runtime import device, replay
from runtime.job import Job, JobFolder
from runtime.tasks import TASKS
from runtime.uploads import Uploads

LONG_FRAME = (10, 8, 8, 5)
"""Ratios of a codec with ten frames a second: 120 s of it are 1200 tokens."""

LOADED = {musicgen.COMPOSING, musicgen.RENDERING, "Writing"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_musicgen.write(tmp_path_factory.mktemp("musicgen"))


@pytest.fixture(scope="module")
def long_frame_folder(tmp_path_factory) -> Path:
    """A MusicGen with frames of a tenth of a second."""
    return tiny_musicgen.write(tmp_path_factory.mktemp("long_frame"), ratios=LONG_FRAME)


@pytest.fixture(scope="module")
def composer(own_cache, folder):
    return drain(musicgen.MusicgenEngine.load(musicgen.choose(folder), folder, "cpu"))


@pytest.fixture(scope="module")
def long_frame(own_cache, long_frame_folder):
    chosen = musicgen.choose(long_frame_folder)
    return drain(musicgen.MusicgenEngine.load(chosen, long_frame_folder, "cpu"))


@pytest.fixture
def studio(own_cache, long_frame_folder):
    """A studio on the embedded model, with a tiny MusicGen beside it."""
    cpu = device.find_device("cpu")
    instance = backend.Studio(catalog.choose("mini"), cpu, "none", long_frame_folder)
    yield instance
    for visitor in {visitor for visitor, _ in instance._results}:
        instance.leave(visitor)


def make_request(**changes) -> Musicgen:
    given = {"prompt": "warm slow piano", "duration_s": 5, "seed": 3, "top_k": 20}
    return Musicgen.of({**given, **changes})


def end(studio, request):
    return list(studio.run(request, "v"))[-1]


def first_frames(composer, request) -> np.ndarray:
    """The first sixty frames of a piece, decoded."""
    return drain(composer.decode(drain(composer.tokens(request, 60))))


def generated(composer, request, frames: int, random, known=None):
    """Tokens and samples of transformers' `generate` with the same draws; greedy without `random`."""
    import torch
    from transformers import (
        LogitsProcessor,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    seen = []

    class Tap(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            seen.append(ids.clone())
            return torch.zeros(len(ids), dtype=torch.bool)

    class Draw(LogitsProcessor):
        def __call__(self, ids, scores):
            raised = scores / request.temperature
            least = raised.topk(request.top_k).values[:, -1:]
            drawn = torch.rand(raised.shape, generator=random, dtype=torch.float64)
            return raised.masked_fill(raised < least, -math.inf) - (-drawn.log()).log().float()

    class DrawLast(LogitsProcessorList):
        def append(self, one):  # guidance is appended, but must run before the draw
            self.insert(len(self) - 1, one)

    ids = torch.tensor([composer.tokenizer.encode(request.prompt).ids])
    sound = composer.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        guidance_scale=request.guidance_scale,
        max_new_tokens=frames + 3 - (0 if known is None else known.shape[1]),
        logits_processor=DrawLast([Draw()]) if random else LogitsProcessorList(),
        stopping_criteria=StoppingCriteriaList([Tap()]),
        **({} if known is None else {"decoder_input_ids": known}),
    )
    grid = seen[-1]
    return torch.stack([grid[k, k + 1 : k + 1 + frames] for k in range(4)]), sound[0].numpy()


@pytest.mark.parametrize("guidance", [1, 3])
def test_greedy_tokens_equal_those_of_transformers(composer, guidance):
    request = make_request(top_k=1, guidance_scale=guidance)
    mine = drain(composer.tokens(request, 60))
    theirs, sound = generated(composer, request, 60, None)
    assert (mine == theirs).all()
    assert np.abs(drain(composer.decode(mine)) - sound).max() <= 1e-6


@pytest.mark.parametrize("guidance", [1, 3])
def test_same_draws_give_the_same_tokens_as_transformers(composer, guidance):
    import torch

    request = make_request(temperature=0.8, guidance_scale=guidance)
    mine = drain(composer.tokens(request, 60))
    theirs, _ = generated(composer, request, 60, torch.Generator().manual_seed(3))
    assert (mine == theirs).all()
    assert len(mine.unique()) > 8


def test_later_window_equals_transformers_continuation(long_frame, monkeypatch):
    import torch

    monkeypatch.setattr(musicgen, "WINDOW_S", 3)
    monkeypatch.setattr(musicgen, "STRIDE_S", 2)
    request, random = make_request(duration_s=7), torch.Generator().manual_seed(3)
    mine = drain(long_frame.tokens(request, 70))
    first, _ = generated(long_frame, request, 30, random)
    second, _ = generated(long_frame, request, 30, random, known=first[:, 20:])
    third, _ = generated(long_frame, request, 30, random, known=second[:, 20:])
    assert (mine == torch.cat([first, second[:, 10:], third[:, 10:]], 1)).all()


def test_tiled_decoding_equals_whole_decoding(composer, monkeypatch):
    import torch

    random = torch.Generator().manual_seed(1)
    monkeypatch.setattr(musicgen, "TILE_S", 2.0)
    tokens = torch.randint(0, 64, (4, 230), generator=random)
    last, widths = composer.model.audio_encoder.decoder.layers[-1], []
    hook = last.register_forward_hook(lambda _, given, out: widths.append(out.shape[-1]))
    tiled = drain(composer.decode(tokens))
    hook.remove()
    with torch.inference_mode():
        whole = composer.model.audio_encoder.decode(tokens[None, None], [None])[0][0].numpy()
    assert tiled.shape == whole.shape == (1, 230 * 640)
    assert np.abs(tiled - whole).max() <= 1e-6 * np.abs(whole).max()
    assert max(widths) == (100 + 2 * 10) * 640, "memory does not grow with the piece"
    monkeypatch.setattr(musicgen, "OVERLAP_S", 0.0)
    apart = drain(composer.decode(tokens))
    assert np.abs(apart - whole).max() > 0.01 * np.abs(whole).max()


def test_piece_has_the_requested_length_in_two_equal_channels(long_frame):
    for seconds in (5, 5.0001, 7.31):
        piece = drain(long_frame.generate(make_request(duration_s=seconds)))
        assert piece.sound.shape == (2, round(seconds * SAMPLE_RATE))
        assert piece.sound.dtype == np.float32
        assert (piece.sound[0] == piece.sound[1]).all()
        assert piece.peak_dbfs == levels.PEAK_DBFS


def test_seed_fixes_the_piece_while_others_draw_random_numbers(folder, composer):
    import torch

    first = first_frames(composer, make_request())
    over = threading.Event()

    def draw():
        while not over.is_set():
            torch.rand(1000)

    busy = threading.Thread(target=draw)
    busy.start()
    try:
        fresh = drain(musicgen.MusicgenEngine.load(musicgen.choose(folder), folder, "cpu"))
        second = first_frames(fresh, make_request())
    finally:
        over.set()
        busy.join()
    assert (first == second).all()
    changes = {"seed": 4, "prompt": "house beat", "guidance_scale": 5, "temperature": 2, "top_k": 9}
    for name, value in changes.items():
        assert not np.array_equal(first, first_frames(composer, make_request(**{name: value}))), (
            name
        )


def test_special_tokens_in_the_prompt_are_plain_text(composer):
    end_mark = composer.tokenizer.token_to_id("</s>")
    ids = composer.tokenizer.encode("warm </s> piano").ids
    assert ids.count(end_mark) == 1
    assert ids[-1] == end_mark


def jumps(sound: np.ndarray, places, rate: int) -> list[float]:
    """How far the level jumps, in dB, from half a second before to half a second after."""
    half = rate // 2
    before = [np.square(sound[:, at - half : at]).mean() for at in places]
    after = [np.square(sound[:, at : at + half]).mean() for at in places]
    return [abs(10 * math.log10(b / a)) for a, b in zip(before, after, strict=True)]


def seamless(sound: np.ndarray, edges, rate: int) -> bool:
    """Whether `edges` [samples] show no gap, click or level step larger than elsewhere.

    Also asserts that each of the three would be detected once inserted into `sound`.
    """
    elsewhere = jumps(sound, range(3 * rate, sound.shape[1] - 3 * rate, 7 * rate // 10), rate)

    def even(samples: np.ndarray) -> bool:
        return max(jumps(samples, edges, rate)) <= max(elsewhere)

    def good(samples: np.ndarray) -> list[bool]:
        return [splice.measure_seam(samples, at, rate // 500, rate).good for at in edges]

    steps, holes, clicks = sound.copy(), sound.copy(), sound.copy()
    for at, end in zip(edges[::2], [*edges[1::2], None][: len(edges[::2])], strict=True):
        steps[:, at:end] *= 20
    for at in edges:
        holes[:, at : at + rate // 50] = 0
        clicks[:, at] += 2 * np.abs(sound).max()
    assert not even(steps), "a level step would be detected"
    assert not any(good(holes)), "a gap would be detected"
    assert not any(good(clicks)), "a click would be detected"
    return all(good(sound)) and even(sound)


def test_long_piece_has_no_seam_at_any_window(long_frame):
    request = make_request(duration_s=120, top_k=64)
    tokens = drain(long_frame.tokens(request, 1200))
    wave = drain(long_frame.decode(tokens))
    edges = [at * long_frame.hop for at in range(300, 1200, 180)]
    assert len(edges) == 5
    assert seamless(wave, edges, long_frame.rate)


def test_resampling_leaves_no_artefacts():
    """32 to 48 kHz with soxr HQ: tones keep their level and phase, high ones too."""
    at, to = np.arange(64_000) / 32_000, np.arange(96_000) / 48_000
    for hertz, least_db in ((1000, 100), (14_000, 80)):
        tone, expected = (np.sin(2 * np.pi * hertz * t, dtype=np.float64) / 2 for t in (at, to))
        resampled = levels.resample(tone[None].astype(np.float32), 32_000, 48_000, 96_000)
        assert resampled.shape == (1, 96_000)
        inner = slice(4800, -4800)
        off = np.square(resampled[0, inner] - expected[inner]).mean()
        assert 10 * math.log10(np.square(expected[inner]).mean() / off) > least_db


def test_mps_computes_in_float32():
    assert device._dtype("mps") == "float32"


def test_long_piece_cache_is_no_larger_than_the_window(long_frame, monkeypatch):
    monkeypatch.setattr(musicgen, "WINDOW_S", 4)
    monkeypatch.setattr(musicgen, "STRIDE_S", 2)
    widths, original = [], musicgen._cache

    def cache(model, columns):
        widths.append(columns)
        return original(model, columns)

    monkeypatch.setattr(musicgen, "_cache", cache)
    steps = list(long_frame.tokens(make_request(), 100))
    assert widths == [40 + 4] * 4
    counted = [event.step for event in steps]
    assert counted == sorted(counted)
    assert (counted[0], counted[-1]) == (0, 100)
    assert {event.steps for event in steps} == {100}


def test_take_records_its_model_and_replays(studio, folder):
    studio.setup = replace(studio.setup, musicgen=musicgen.choose(folder))
    request = make_request(duration_s=5.5)
    events = list(studio.run(request, "v"))
    take = events[-1]
    assert isinstance(take, Take)
    assert (take.mode, take.samples) == ("musicgen", 264_000)
    assert (take.model.name, take.model.licence) == ("musicgen-small", "CC-BY-NC-4.0")
    assert take.model.may_sell is False
    assert take.model.sha256 == checkpoints.fingerprint(folder)
    assert (take.planner, take.device.dtype) == (None, "float32")
    composing = [e for e in events[:-1] if e.stage == musicgen.COMPOSING]
    assert {e.steps for e in composing} == {275}, "fifty tokens a second"
    assert composing[-1].step == 275
    recorded = settings.read_settings(Path(take.path))
    assert recorded["request"] == request.model_dump(mode="json")
    assert recorded == settings.read_settings(Path(take.path).with_suffix(".json"))
    assert b"CC-BY-NC-4.0" in Path(take.path).read_bytes()
    again = end(studio, settings.request_of(recorded))
    assert replay.differences(recorded, again) == []
    assert replay.compare(Path(take.path), again) == "The samples are the same, every one."
    assert set(again.timings_s) - {"Loading"} == LOADED
    work = TASKS["musicgen"].cost(prepared(studio, request), lambda _: True)
    assert {stage for stage, units in work.items() if units} == LOADED


def test_an_automatic_seed_is_drawn_and_recorded(studio):
    take = end(studio, make_request(seed=None))
    assert take.request["seed"] is not None


def prepared(studio, request) -> Job:
    """The job that `studio` prepares for `request`."""
    task = TASKS[request.mode]
    return drain(task.prepare(request, studio.setup, JobFolder.create(), Uploads()))


def test_stop_takes_effect_before_the_next_token(studio, monkeypatch):
    monkeypatch.setattr(musicgen, "PULSE_S", 0.0)
    job = prepared(studio, make_request())
    original, calls = musicgen.MusicgenEngine._logits, []

    def logits(*given):
        calls.append(1)
        if len(calls) == 7:
            job.folder.stop_file.touch()
        return original(*given)

    monkeypatch.setattr(musicgen.MusicgenEngine, "_logits", logits)
    *_, ending = studio.runner.execute(job, 0)
    assert isinstance(ending, Cancelled)
    assert ending.stage == musicgen.COMPOSING
    assert len(calls) == 7
    job.folder.remove()
    monkeypatch.undo()
    assert isinstance(end(studio, make_request()), Take), "the model stays usable"


def test_changing_models_frees_the_first_before_loading_the_second(studio, monkeypatch):
    studio.runner.models.unload_all()
    alive, loads = [], []

    def watched(kind):
        original = kind.load.__func__

        def load(cls, *given, **named):
            gc.collect()
            loads.append((kind.__name__, [ref() is not None for ref in alive]))
            loaded = yield from original(cls, *given, **named)
            alive.append(weakref.ref(loaded))
            return loaded

        monkeypatch.setattr(kind, "load", classmethod(load))

    watched(acestep.Engine)
    watched(musicgen.MusicgenEngine)
    short = song(duration_s=5, inference_steps=1)
    for request in (short, make_request(), make_request(seed=4), short):
        ending = end(studio, request)
        assert isinstance(ending, Take), ending
        assert len(gc.get_objects()) < 100_000, "a slow garbage collection would delay responses"
    assert loads == [("Engine", []), ("MusicgenEngine", [False]), ("Engine", [False, False])]


def test_missing_weights_name_the_command_that_fetches_them(own_cache, monkeypatch):
    studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), "none")
    monkeypatch.setattr(checkpoints, "locate", lambda weights: weights.folder)
    ending = end(studio, make_request())
    assert isinstance(ending, Failed)
    assert ending.code == "model-missing"
    assert "2.4 GB" in ending.message
    assert "fetch musicgen-small" in ending.action


def test_out_of_memory_and_nan_are_typed_errors(studio, monkeypatch):
    import torch

    assert isinstance(end(studio, make_request()), Take)
    (loaded,) = [v for v in studio.runner.models._loaded.values() if hasattr(v, "books")]
    head = loaded.model.decoder.lm_heads[0].weight
    kept = head.clone()
    head.fill_(math.nan)
    ending = end(studio, make_request())
    head.copy_(kept)
    assert (ending.kind, ending.code) == ("failed", "sound-not-finite")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(musicgen.MusicgenEngine, "_logits", full)
    ending = end(studio, make_request())
    assert (ending.kind, ending.code) == ("failed", "out-of-memory")


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def reconfigure(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


DAMAGES = {
    "model.safetensors is missing": lambda f: (f / "model.safetensors").unlink(),
    "tokenizer.json is missing": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer.json cannot be read": lambda f: (f / "tokenizer.json").write_text("{"),
    "config.json cannot be read": lambda f: (f / "config.json").write_text("[]"),
    "is not that of a MusicGen in mono": lambda f: reconfigure(
        f, lambda c: c["decoder"].update(audio_channels=2)
    ),
    "cut off": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-9]
    ),
    "lacks the tensor decoder.lm_heads.0.weight": lambda f: rewrite(
        f, lambda t: {k: v for k, v in t.items() if k != "decoder.lm_heads.0.weight"}
    ),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_damaged_copy_is_rejected_with_the_problem(folder, tmp_path, problem):
    damaged = copy_of(folder, tmp_path)
    DAMAGES[problem](damaged)
    with pytest.raises(StudioError) as caught:
        drain(musicgen.MusicgenEngine.load(musicgen.choose(damaged), damaged, "cpu"))
    assert caught.value.code == "model-broken"
    assert problem in caught.value.message


def test_codebooks_unknown_to_the_codec_are_rejected(tmp_path):
    odd = tiny_musicgen.write(tmp_path, num_codebooks=5)
    with pytest.raises(StudioError) as caught:
        drain(musicgen.MusicgenEngine.load(musicgen.choose(odd), odd, "cpu"))
    assert caught.value.code == "model-mismatch"


def test_old_weight_names_load_the_same_weights(folder, composer, tmp_path):
    """Checkpoints of 2023 name the parts of a normalised weight `weight_g` and `weight_v`."""
    old = copy_of(folder, tmp_path)
    names = {"parametrizations.weight.original0": "weight_g"}
    names |= {"parametrizations.weight.original1": "weight_v"}

    def renamed(tensors):
        found = {}
        for name, tensor in tensors.items():
            for new, former in names.items():
                name = name.replace(new, former)
            found[name] = tensor
        assert found.keys() != tensors.keys()
        return found

    rewrite(old, renamed)
    loaded = drain(musicgen.MusicgenEngine.load(musicgen.choose(old), old, "cpu"))
    assert (first_frames(loaded, make_request()) == first_frames(composer, make_request())).all()


def test_no_pickle_is_fetched():
    assert all(name.endswith((".json", ".safetensors")) for name in catalog.MUSICGEN.files)
    assert catalog.MUSICGEN.may_sell is False
