"""Mastering to a loudness under a true-peak ceiling, and stem separation."""

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
from runtime import device


def mastered(sound, **settings):
    return drain(post_process.master(sound, **settings))


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
def test_requested_loudness_is_reached_under_the_ceiling(name, tmp_path):
    sound = PIECES[name]()
    before = sound.copy()
    done, report = mastered(sound)
    assert np.array_equal(sound, before), "the input is not modified"
    assert done.shape == sound.shape
    assert done.dtype == np.float32
    assert report.reached
    assert loudness.loudness(done) == pytest.approx(-14, abs=0.2)
    assert report.after_lufs == pytest.approx(loudness.loudness(done), abs=0.01)
    assert loudness.true_peak(done) <= -1.0
    if name != "a fifth of a second":
        lufs, peak = ebur128(done, tmp_path)
        assert lufs == pytest.approx(-14, abs=0.2)
        assert peak <= -1.0 + 0.1


def impulses(seed):
    rng = np.random.default_rng(seed)
    return (rng.random((2, 4 * RATE)) < 5e-4) * rng.choice([-0.9, 0.9], (2, 4 * RATE))


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
def test_ceiling_is_never_exceeded(name, target):
    done, report = mastered(HARD[name](), target_lufs=target)
    assert loudness.true_peak(done) <= -1.0
    assert report.true_peak_dbtp <= -1.0
    assert report.reduction_db >= -post_process.DEEPEST_DB - 0.5
    assert report.reached == (abs(loudness.loudness(done) - target) <= 0.2)


def test_target_and_ceiling_follow_the_arguments(tmp_path):
    done, report = mastered(band(8), target_lufs=-18, ceiling_dbtp=-6)
    assert loudness.loudness(done) == pytest.approx(-18, abs=0.2)
    assert loudness.true_peak(done) <= -6
    assert report.target_lufs == -18


def test_silence_is_returned_unchanged():
    faint = noise(3, 10 ** (-90 / 20))
    for sound in (silence(2), silence(0), faint):
        done, report = mastered(sound)
        assert np.array_equal(done, sound)
        assert done is not sound
        assert report.before_lufs is report.after_lufs is None
        assert (report.gain_db, report.reduction_db, report.reached) == (0.0, 0.0, False)


def test_gain_is_bounded_and_a_miss_is_reported():
    done, report = mastered(band(6) * np.float32(0.01))
    assert report.gain_db == post_process.LARGEST_GAIN_DB
    assert not report.reached
    assert loudness.loudness(done) < -20
    done, report = mastered(impulses(2).astype(np.float32))
    assert report.reduction_db == pytest.approx(-post_process.DEEPEST_DB, abs=0.5)
    assert not report.reached


def test_gain_search_stays_within_its_bounds():
    """A target just within reach, with loud peaks: limiting them loses the loudness to be reached."""
    sound = impulses(3).astype(np.float32) + noise(4, 0.003)
    most = -1 - loudness.true_peak(sound) + post_process.DEEPEST_DB
    _, report = mastered(sound, target_lufs=loudness.loudness(sound) + most - 0.1)
    assert report.gain_db == pytest.approx(most, abs=0.01)
    assert not report.reached


def test_gain_is_constant_away_from_loud_peaks():
    sound = np.concatenate([noise(3, 0.05), noise(0.02, 0.5), noise(3, 0.05)], 1)
    done, report = mastered(sound)
    assert report.reduction_db < -1
    gain = np.float32(10 ** (report.gain_db / 20))
    early, late = slice(0, int(2.98 * RATE)), slice(int(3.5 * RATE), None)
    for far in (early, late):
        assert np.allclose(done[:, far], sound[:, far] * gain, rtol=2e-3, atol=0)
    moved = 20 * np.log10(np.abs(done / sound)).mean(0)
    assert np.abs(np.diff(moved)).max() < 0.1, "the gain changes without steps"
    in_10_ms = moved[480:] - moved[:-480]
    assert 0.1 < in_10_ms.max() < 1.1 * post_process.RELEASE_DB_S / 100, "and it is released slowly"


def test_both_channels_get_the_same_gain():
    sound = band(6) * np.float32([[1.0], [0.3]])
    done, _ = mastered(sound, target_lufs=-12)
    audible = np.abs(sound[1]) > 1e-3
    ratio = done[0, audible] / done[1, audible] / (sound[0, audible] / sound[1, audible])
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
"""The authors' class at test size: windows of 0.975 s, 300 thousand parameters."""


def published(folder, tensors, settings=SETTINGS, **changes):
    """Write a separator's file in the authors' layout; return the catalog entry that pins it."""
    folder.mkdir(exist_ok=True)
    path = folder / HTDEMUCS.marker
    metadata = {
        "klass": "demucs.htdemucs.HTDemucs",
        "args": "[]",
        "kwargs": json.dumps({**settings, "segment": WINDOW, "of_the_future": 1}),
    }
    save_file(tensors, path, metadata={**metadata, **changes})
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
    # Untrained, the last layers output almost nothing: scale them up.
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


def test_loader_builds_the_authors_model_in_float32(separator, tensors):
    from demucs.htdemucs import HTDemucs

    assert type(separator.model) is HTDemucs
    assert not separator.model.training
    assert separator.model.segment == Fraction(39, 40)
    for name, tensor in separator.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[name].float())


def test_catalog_entry_matches_the_published_file():
    """41,984,456 half-precision parameters, as in the authors' class, and a header."""
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
def test_stems_keep_the_length_of_the_input(separator, samples):
    sound = noise(samples / RATE)
    for stem in drain(demucs.separate(separator, sound)).values():
        assert stem.shape == (2, samples)


def test_overlap_add_equals_demucs_apply_model(separator, mix):
    from demucs.apply import apply_model

    samples = torch.from_numpy(mix)
    separated = drain(demucs._windows(separator, samples))
    expected = apply_model(separator.model, samples[None], shifts=0, overlap=0.25)[0]
    assert torch.equal(separated, expected)


def test_each_stem_is_the_models_output_for_its_source(separator, split, mix):
    """Reference: resample to 44.1 kHz, scale to unit deviation, run the model, and invert both."""
    from demucs.apply import apply_model

    resampled = levels.resample(mix, RATE, 44_100, math.ceil(mix.shape[1] * 0.91875))
    mono = resampled.mean(0)
    unit = torch.from_numpy((resampled - mono.mean()) / mono.std())
    output = apply_model(separator.model, unit[None], shifts=0, overlap=0.25)[0].numpy()
    for name in ("vocals", "drums", "bass"):
        part = output[SETTINGS["sources"].index(name)] * mono.std() + mono.mean()
        expected = levels.resample(part, 44_100, RATE, mix.shape[1])
        assert np.allclose(split[name], expected, atol=1e-4)


def test_stems_scale_with_the_level_of_the_mix(separator, split, mix):
    for name, stem in drain(demucs.separate(separator, mix * np.float32(0.01))).items():
        assert np.allclose(stem * 100, split[name], atol=2e-4)


def test_same_input_gives_the_same_stems(separator, split, mix):
    random.seed(99)
    torch.manual_seed(99)
    again = drain(demucs.separate(separator, mix))
    assert all(np.array_equal(again[name], split[name]) for name in STEMS)


def test_stems_of_a_take_unload_the_song_model_when_memory_is_short(row, own_cache, monkeypatch):
    monkeypatch.setattr(catalog, "HTDEMUCS", row)
    studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), "none")
    request = Generate.of({"prompt": "x", "duration_s": 5, "inference_steps": 1, "seed": 1})

    def loaded():
        return [weights.name for weights, _ in studio.runner.models._loaded]

    def stems(stop_at=None):
        for event in studio.run(Stems.of({"source": take.path}), "v"):
            if isinstance(event, Progress) and (event.stage, event.step) == stop_at:
                studio.stop("v")
        return event

    try:
        take = list(studio.run(request, "v"))[-1]
        exported = stems()
        assert loaded() == ["mini", "htdemucs"]
        assert LICENCE_NOTE in exported.notes
        assert [Path(path).suffix for path in exported.paths] == [".zip", *4 * [".wav"]]
        sound = sum(soundfile.read(path, always_2d=True)[0] for path in exported.paths[1:])
        assert np.abs(sound.T - read_sound(take.path)).max() < 1e-6
        assert isinstance(stems(stop_at=("Splitting into stems", 1)), Cancelled)

        studio.runner.models.unload_all()
        list(studio.run(request, "v"))
        monkeypatch.setattr(device, "memory_gb", lambda _: 4.0)
        again = stems()
        assert loaded() == ["htdemucs"], "the song's model was unloaded first"
        assert Path(again.paths[0]).read_bytes() == Path(exported.paths[0]).read_bytes()
        song = list(studio.run(request, "v"))[-1]
        assert loaded() == ["mini"]
        assert np.array_equal(read_sound(song.path), read_sound(take.path))
    finally:
        studio.leave("v")
        studio.runner.models.unload_all()


def test_silence_has_silent_stems(separator):
    for sound in (silence(1.5), silence(0)):
        for stem in drain(demucs.separate(separator, sound)).values():
            assert stem.shape == sound.shape
            assert not stem.any()


def test_progress_counts_windows_and_closing_stops_at_the_next(separator, mix):
    calls = []
    hook = separator.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        events = list(demucs.separate(separator, mix))
        windows = math.ceil(2.9 * 44_100 / int(0.75 * int(0.975 * 44_100)))
        assert [event.step for event in events] == list(range(windows + 1))
        assert {event.steps for event in events} == {windows} == {len(calls)}
        calls.clear()
        running = demucs.separate(separator, mix)
        next(running), next(running)
        running.close()
        assert len(calls) == 1
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


def test_damaged_weights_are_rejected_with_the_file_name(row, tmp_path):
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


def test_class_named_in_a_file_is_not_executed(tensors, tmp_path):
    marker = tmp_path / "run"
    metadata = {"klass": "subprocess.Popen", "kwargs": json.dumps({"args": ["touch", str(marker)]})}
    error = refused(published(tmp_path / "metadata", tensors, **metadata))
    assert error.code == "model-broken"
    assert "another kind of model" in error.message
    assert not marker.exists()


def test_weights_of_another_shape_are_rejected(tensors, tmp_path):
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


def test_fetch_downloads_only_the_weights(row, tmp_path):
    repo = tmp_path / "hub" / "adefossez" / "HTDemucs"
    repo.mkdir(parents=True)
    (repo / row.marker).write_bytes((row.folder / row.marker).read_bytes())
    (repo / "htdemucs.yaml").write_text("models: ['955717e8']")
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
        entry = replace(row, folder=None, revision=hub.commit("adefossez/HTDemucs"))
        script = FETCH.format(root=str(ROOT), revision=entry.revision)
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        assert Path(run.stdout.strip()).read_bytes() == (row.folder / row.marker).read_bytes()
        assert not [request for request in hub.log if request.path.endswith(".yaml")]


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


def test_stop_or_full_disk_leaves_no_stem_files(split, tmp_path, monkeypatch):
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


def test_importing_loads_no_heavy_packages():
    """Importing loads no torch; the model's package loads neither codecs nor torchaudio."""
    heavy = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import post_process;"
        "assert not {'torch', 'scipy', 'numpy', 'demucs'} & set(sys.modules);"
        "import demucs.htdemucs;"
        "assert not {'torchaudio', 'lameenc', 'sphn'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", heavy], timeout=120).returncode == 0
