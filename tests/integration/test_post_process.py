"""What is done to a take: loudness under a ceiling, and stems that are its parts, on real sound."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, drain, read_sound
from fake_hub import FakeHub
from meters import RATE, band, ebur128, noise, tone
from safetensors.torch import save_file

import backend
import post_process
from audio import levels, loudness
from core.errors import StudioError
from core.requests import Generate, Stems
from core.results import Cancelled, Progress
from models import catalog, demucs
from models.catalog import HTDEMUCS
from models.demucs import LICENCE_NOTE, STEMS
from runtime import device, model_cache


def mastered(sound, **asked):
    return drain(post_process.master(sound, **asked))


def silence(seconds):
    return np.zeros((2, round(seconds * RATE)), np.float32)


PIECES = {
    "a band": lambda: band(5),
    "half as loud": lambda: band(5) * np.float32(0.5),
    "squashed": lambda: np.clip(band(5) * 20, -1, 1),
    "after a long intro": lambda: np.concatenate([silence(6), band(4)], 1),
    "noise": lambda: noise(4, 0.03),
    "noise at full scale": lambda: np.clip(noise(4, 0.5), -1, 1),
    "a fifth of a second": lambda: band(0.2),
    "out of a mono file": lambda: np.repeat(band(3)[:1], 2, axis=0),
}


@pytest.mark.parametrize("name", PIECES)
def test_the_requested_loudness_is_reached_under_the_ceiling(name, tmp_path):
    sound = PIECES[name]()
    before = sound.copy()
    done, told = mastered(sound)
    assert np.array_equal(sound, before), "the take itself is not touched"
    assert done.shape == sound.shape
    assert done.dtype == np.float32
    assert told.reached
    assert loudness.loudness(done) == pytest.approx(-14, abs=0.2)
    assert told.after_lufs == pytest.approx(loudness.loudness(done), abs=0.01)
    assert loudness.true_peak(done) <= -1.0
    if name != "a fifth of a second":
        lufs, peak = ebur128(done, tmp_path)
        assert lufs == pytest.approx(-14, abs=0.2)
        assert peak <= -1.0 + 0.1


def impulses(seed):
    dice = np.random.default_rng(seed)
    return (dice.random((2, 4 * RATE)) < 5e-4) * dice.choice([-0.9, 0.9], (2, 4 * RATE))


HARD = {
    "impulses": lambda: impulses(1).astype(np.float32),
    "one impulse at the very end": lambda: np.eye(2, 3 * RATE, 3 * RATE - 2, dtype=np.float32),
    "one channel": lambda: band(6) * np.float32([[1], [0]]),
    "bursts of noise": lambda: noise(5, 0.4) * (tone(5, 1.3, 1.0) > 0.9).astype(np.float32),
    "square wave": lambda: np.sign(tone(3, 110, 1.0) + noise(3, 1e-4)),
    "near the highest pitch": lambda: tone(3, 19_500, 0.99, 0.3),
    "a step": lambda: np.repeat(np.float32([[0.0, 0.9]]), 2 * RATE, 1).repeat(2, 0),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("target", [-14, -6])
def test_the_ceiling_holds_for_any_input(name, target):
    done, told = mastered(HARD[name](), target_lufs=target)
    assert loudness.true_peak(done) <= -1.0
    assert told.true_peak_dbtp <= -1.0
    assert told.reduction_db >= -post_process.DEEPEST_DB - 0.5
    assert told.reached == (abs(loudness.loudness(done) - target) <= 0.2)


def test_target_and_ceiling_are_the_callers(tmp_path):
    done, told = mastered(band(8), target_lufs=-18, ceiling_dbtp=-6)
    assert loudness.loudness(done) == pytest.approx(-18, abs=0.2)
    assert loudness.true_peak(done) <= -6
    assert told.target_lufs == -18


def test_silence_stays_silence_to_the_bit():
    faint = noise(3, 10 ** (-90 / 20))
    for sound in (silence(2), silence(0), faint):
        done, told = mastered(sound)
        assert np.array_equal(done, sound)
        assert done is not sound
        assert told.before_lufs is told.after_lufs is None
        assert (told.gain_db, told.reduction_db, told.reached) == (0.0, 0.0, False)


def test_gain_is_bounded_and_a_miss_is_reported():
    done, told = mastered(band(6) * np.float32(0.01))
    assert told.gain_db == post_process.LARGEST_GAIN_DB
    assert not told.reached
    assert loudness.loudness(done) < -20
    done, told = mastered(impulses(2).astype(np.float32))
    assert told.reduction_db == pytest.approx(-post_process.DEEPEST_DB, abs=0.5)
    assert not told.reached


def test_the_search_for_the_gain_stays_in_its_bounds():
    """A target just within reach, and peaks that carry the loudness: limiting loses what is sought."""
    sound = impulses(3).astype(np.float32) + noise(4, 0.003)
    most = -1 - loudness.true_peak(sound) + post_process.DEEPEST_DB
    _, told = mastered(sound, target_lufs=loudness.loudness(sound) + most - 0.1)
    assert told.gain_db == pytest.approx(most, abs=0.01)
    assert not told.reached


def test_without_loud_peaks_only_the_volume_changes():
    sound = np.concatenate([noise(3, 0.05), noise(0.02, 0.5), noise(3, 0.05)], 1)
    done, told = mastered(sound)
    assert told.reduction_db < -1
    gain = np.float32(10 ** (told.gain_db / 20))
    early, late = slice(0, int(2.98 * RATE)), slice(int(3.5 * RATE), None)
    for far in (early, late):
        assert np.allclose(done[:, far], sound[:, far] * gain, rtol=2e-3, atol=0)
    moved = 20 * np.log10(np.abs(done / sound)).mean(0)
    assert np.abs(np.diff(moved)).max() < 0.1, "the gain bends, it does not jump"
    in_10_ms = moved[480:] - moved[:-480]
    assert 0.1 < in_10_ms.max() < 1.1 * post_process.RELEASE_DB_S / 100, "and it lets go slowly"


def test_both_channels_get_the_same_gain():
    sound = band(6) * np.float32([[1.0], [0.3]])
    done, _ = mastered(sound, target_lufs=-12)
    heard = np.abs(sound[1]) > 1e-3
    ratio = done[0, heard] / done[1, heard] / (sound[0, heard] / sound[1, heard])
    assert np.allclose(ratio, 1, atol=1e-4)


def test_mastering_reports_progress_and_can_be_cancelled():
    steps = list(post_process.master(band(4)))
    assert steps[0].stage == "Setting the loudness"
    assert steps[-1].step == steps[-1].steps
    stopped = post_process.master(band(4))
    next(stopped)
    stopped.close()


SETTINGS = {
    "sources": ["drums", "bass", "other", "vocals"],
    "channels": 8,
    "depth": 4,
    "nfft": 4096,
    "t_layers": 1,
    "t_heads": 2,
    "bottom_channels": 32,
    "dconv_mode": 3,
}
WINDOW = {"_type": "fraction", "numerator": 39, "denominator": 40}
"""The authors' own class at a size for tests: windows of 0.975 s, 300 thousand numbers."""


def published(folder, tensors, settings=SETTINGS, **said):
    """A separator's file in the authors' layout, and the row that pins it."""
    folder.mkdir(exist_ok=True)
    path = folder / HTDEMUCS.marker
    told = {
        "klass": "demucs.htdemucs.HTDemucs",
        "args": "[]",
        "kwargs": json.dumps({**settings, "segment": WINDOW, "of_the_future": 1}),
    }
    save_file(tensors, path, metadata={**told, **said})
    return pinned(folder)


def pinned(folder):
    data = (folder / HTDEMUCS.marker).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    return replace(HTDEMUCS, folder=folder, size_bytes=len(data), sha256=sha256)


@pytest.fixture(scope="module")
def tensors():
    from demucs.htdemucs import HTDemucs

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = HTDemucs(**SETTINGS, segment=Fraction(39, 40))
    # Untrained, its last layers say next to nothing: let them be heard.
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in state:
        if name.startswith(("decoder.3.conv_tr", "tdecoder.3.conv_tr")):
            state[name] *= 5
    return {name: tensor.half() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def row(tensors, tmp_path_factory):
    return published(tmp_path_factory.mktemp("stems") / "weights", tensors)


@pytest.fixture(scope="module")
def separator(row):
    return drain(demucs.load(row))


@pytest.fixture(scope="module")
def mix():
    return band(2.9, seed=5)


@pytest.fixture(scope="module")
def split(separator, mix):
    return drain(demucs.separate(separator, mix))


def test_the_loader_builds_the_authors_model(separator, tensors):
    from demucs.htdemucs import HTDemucs

    assert type(separator.model) is HTDemucs
    assert not separator.model.training
    assert separator.model.segment == Fraction(39, 40)
    for name, tensor in separator.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[name].float())


def test_the_row_is_the_published_file():
    """41,984,456 half-precision numbers, as the authors' class has them, and a header."""
    from demucs.htdemucs import HTDemucs

    with torch.device("meta"):
        model = HTDemucs(
            **{**SETTINGS, "channels": 48, "t_layers": 5, "t_heads": 8, "bottom_channels": 512},
            segment=Fraction(39, 5),
        )
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert numbers == 41_984_456
    assert 0 < HTDEMUCS.size_bytes - 2 * numbers < 100_000
    assert HTDEMUCS.size == "84 MB"
    assert len(HTDEMUCS.revision) == 40
    assert len(HTDEMUCS.sha256) == 64
    assert HTDEMUCS.licence == "research use"
    assert "research" in demucs.LICENCE_NOTE


def test_stems_are_as_long_as_the_mix_and_sum_to_it(split, mix):
    assert tuple(split) == STEMS
    for stem in split.values():
        assert stem.shape == mix.shape
        assert stem.dtype == np.float32
        assert np.isfinite(stem).all()
        assert np.abs(stem).max() > 1e-3
    error = sum(stem.astype(np.float64) for stem in split.values()) - mix
    assert 20 * math.log10(np.abs(error).max()) <= demucs.SUM_ERROR_DBFS


@pytest.mark.parametrize("samples", [1, 100, 45_860, 46_803, 99_991])
def test_any_length_is_kept(separator, samples):
    sound = noise(samples / RATE)
    for stem in drain(demucs.separate(separator, sound)).values():
        assert stem.shape == (2, samples)


def test_windows_are_joined_as_in_demucs(separator, mix):
    from demucs.apply import apply_model

    heard = torch.from_numpy(mix)
    ours = drain(demucs._windows(separator, heard))
    theirs = apply_model(separator.model, heard[None], shifts=0, overlap=0.25)[0]
    assert torch.equal(ours, theirs)


def test_each_stem_is_the_models_output_in_its_place(separator, split, mix):
    """By hand: down to 44.1 kHz, to unit deviation, through the model, back again."""
    from demucs.apply import apply_model

    heard = levels.resample(mix, RATE, 44_100, math.ceil(mix.shape[1] * 0.91875))
    mono = heard.mean(0)
    unit = torch.from_numpy((heard - mono.mean()) / mono.std())
    said = apply_model(separator.model, unit[None], shifts=0, overlap=0.25)[0].numpy()
    for name in ("vocals", "drums", "bass"):
        part = said[SETTINGS["sources"].index(name)] * mono.std() + mono.mean()
        expected = levels.resample(part, 44_100, RATE, mix.shape[1])
        assert np.allclose(split[name], expected, atol=1e-4)


def test_the_level_of_the_mix_is_the_level_of_its_stems(separator, split, mix):
    for name, stem in drain(demucs.separate(separator, mix * np.float32(0.01))).items():
        assert np.allclose(stem * 100, split[name], atol=2e-4)


def test_the_same_sound_gives_the_same_bits(separator, split, mix):
    random.seed(99)
    torch.manual_seed(99)
    again = drain(demucs.separate(separator, mix))
    assert all(np.array_equal(again[name], split[name]) for name in STEMS)


def test_the_studio_splits_a_take_and_frees_memory_first(row, own_cache, monkeypatch):
    monkeypatch.setattr(model_cache, "HTDEMUCS", row)
    made = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), "none")
    asked = Generate.of({"prompt": "x", "duration_s": 5, "inference_steps": 1, "seed": 1})

    def loaded():
        return [weights.name for weights, _ in made.runner.models._loaded]

    def stems(stop_at=None):
        for event in made.run(Stems.of({"source": take.path}), "v"):
            if isinstance(event, Progress) and (event.stage, event.step) == stop_at:
                made.stop("v")
        return event

    try:
        take = list(made.run(asked, "v"))[-1]
        both = stems()
        assert loaded() == ["mini", "htdemucs"]
        assert LICENCE_NOTE in both.notes
        assert [Path(path).suffix for path in both.paths] == [".zip", *4 * [".wav"]]
        sound = sum(soundfile.read(path, always_2d=True)[0] for path in both.paths[1:])
        assert np.abs(sound.T - read_sound(take.path)).max() < 1e-6
        assert isinstance(stems(stop_at=("Splitting into stems", 1)), Cancelled)

        made.runner.models.unload_all()
        list(made.run(asked, "v"))
        monkeypatch.setattr(device, "memory_gb", lambda _: 4.0)
        again = stems()
        assert loaded() == ["htdemucs"], "the song's model went before"
        assert Path(again.paths[0]).read_bytes() == Path(both.paths[0]).read_bytes()
        song = list(made.run(asked, "v"))[-1]
        assert loaded() == ["mini"]
        assert np.array_equal(read_sound(song.path), read_sound(take.path))
    finally:
        made.leave("v")
        made.runner.models.unload_all()


def test_silence_has_silent_stems(separator):
    for sound in (silence(1.5), silence(0)):
        for stem in drain(demucs.separate(separator, sound)).values():
            assert stem.shape == sound.shape
            assert not stem.any()


def test_progress_counts_windows_and_closing_stops_at_the_next(separator, mix):
    heard = []
    hook = separator.model.register_forward_pre_hook(lambda *_: heard.append(1))
    try:
        events = list(demucs.separate(separator, mix))
        windows = math.ceil(2.9 * 44_100 / int(0.75 * int(0.975 * 44_100)))
        assert [event.step for event in events] == list(range(windows + 1))
        assert {event.steps for event in events} == {windows} == {len(heard)}
        heard.clear()
        running = demucs.separate(separator, mix)
        next(running), next(running)
        running.close()
        assert len(heard) == 1
    finally:
        hook.remove()


def test_out_of_memory_raises_stems_memory(separator, mix, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(separator.model, "forward", full)
    with pytest.raises(StudioError) as caught:
        drain(demucs.separate(separator, mix))
    assert caught.value.code == "stems-memory"


def refused(row):
    with pytest.raises(StudioError) as caught:
        drain(demucs.load(row))
    assert str(row.folder) not in str(caught.value)
    return caught.value


def test_damaged_weights_are_refused_by_name(row, tmp_path):
    whole = (row.folder / row.marker).read_bytes()
    path = tmp_path / row.marker
    for damaged, problem in (
        (whole[:-1], "bytes long"),
        (b"", "bytes long"),
        (whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], "other contents"),
        (whole[:-1] + bytes([whole[-1] ^ 128]), "other contents"),
    ):
        path.write_bytes(damaged)
        error = refused(replace(row, folder=tmp_path))
        assert error.code == "model-broken"
        assert row.marker in error.message
        assert problem in error.message


def test_nothing_that_a_file_names_is_executed(tensors, tmp_path):
    marker = tmp_path / "run"
    evil = {"klass": "subprocess.Popen", "kwargs": json.dumps({"args": ["touch", str(marker)]})}
    error = refused(published(tmp_path / "evil", tensors, **evil))
    assert error.code == "model-broken"
    assert "another kind of model" in error.message
    assert not marker.exists()


def test_a_file_that_does_not_fit_is_refused(tensors, tmp_path):
    less = {name: tensor for name, tensor in tensors.items() if name != "freq_emb.embedding.weight"}
    assert "lacks" in refused(published(tmp_path / "less", less)).message
    others = {**SETTINGS, "sources": ["drums", "bass", "other", "kazoo"]}
    assert "other stems" in refused(published(tmp_path / "kazoo", tensors, others)).message


def test_missing_weights_are_reported_with_size_and_command(tmp_path):
    error = refused(replace(HTDEMUCS, folder=tmp_path))
    assert error.code == "stems-missing"
    assert "HTDemucs (84 MB)" in error.message
    assert "python app.py fetch htdemucs" in error.action


FETCH = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from models import catalog, checkpoints
row = replace(catalog.HTDEMUCS, revision={revision!r})
list(checkpoints.fetch(row))
print(checkpoints.locate(row) / row.marker)
"""


def test_weights_are_fetched_by_the_hub_module(row, tmp_path):
    place = tmp_path / "hub" / "adefossez" / "HTDemucs"
    place.mkdir(parents=True)
    (place / row.marker).write_bytes((row.folder / row.marker).read_bytes())
    (place / "htdemucs.yaml").write_text("models: ['955717e8']")
    with FakeHub(tmp_path / "hub", lfs_threshold=100_000) as hub:
        env = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HTTP_PROXY": "",
            "HTTPS_PROXY": "",
        }
        here = replace(row, folder=None, revision=hub.commit("adefossez/HTDemucs"))
        script = FETCH.format(root=str(ROOT), revision=here.revision)
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        assert Path(run.stdout.strip()).read_bytes() == (row.folder / row.marker).read_bytes()
        assert not [asked for asked in hub.log if asked.path.endswith(".yaml")]


def test_stems_are_written_unchanged_beside_one_zip(split, tmp_path):
    split = {**split, "bass": split["bass"] * np.float32(100)}
    files = drain(post_process.save_stems(split, tmp_path, "my song"))
    names = [f"my song-{stem}.wav" for stem in STEMS]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "my song-stems.zip"])
    for stem, path in files.wavs.items():
        sound, rate = soundfile.read(path, dtype="float32")
        assert rate == RATE
        assert np.array_equal(sound.T, split[stem]), "above full scale too"
    with zipfile.ZipFile(files.zip) as together:
        assert together.testzip() is None
        assert together.namelist() == names
        for stem, path in files.wavs.items():
            assert together.read(f"my song-{stem}.wav") == path.read_bytes()
    first = files.zip.read_bytes()
    assert drain(post_process.save_stems(split, tmp_path, "my song")).zip.read_bytes() == first


def test_a_stop_or_a_full_disk_leaves_no_file(split, tmp_path, monkeypatch):
    events = sum(1 for _ in post_process.save_stems(split, tmp_path / "..", "counted"))
    for path in (tmp_path / "..").glob("counted*"):
        path.unlink()
    for after in range(1, events + 1):
        running = post_process.save_stems(split, tmp_path, "song")
        for _ in range(after):
            next(running)
        running.close()
        assert list(tmp_path.iterdir()) == []

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(post_process.shutil, "copyfileobj", full)
    with pytest.raises(StudioError) as caught:
        drain(post_process.save_stems(split, tmp_path, "song"))
    assert caught.value.code == "disk-full"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StudioError) as caught:
        drain(post_process.save_stems(split, tmp_path / "gone", "song"))
    assert caught.value.code == "not-writable"


def test_importing_stays_light():
    """Importing brings no torch; the model's package brings neither codecs nor torchaudio."""
    heavy = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import post_process;"
        "assert not {'torch', 'scipy', 'numpy', 'demucs'} & set(sys.modules);"
        "import demucs.htdemucs;"
        "assert not {'torchaudio', 'lameenc', 'sphn'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", heavy], timeout=120).returncode == 0
