"""Encoding, tags and embedded settings: written, read back, and read from hostile files."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soundfile
from conftest import drain
from hypothesis import HealthCheck, given
from hypothesis import settings as trying
from hypothesis import strategies as st

from audio import decode, encode
from audio.settings import (
    read_settings,
    request_of,
    settings_of,
    usable_settings,
    with_mastering,
)
from audio.tags import (
    CHUNK,
    KEY,
    READ_LIMIT,
    SCHEMA,
    SETTINGS_LIMIT,
    Kind,
    Tags,
    UnusableSettings,
    read_embedded,
)
from core.errors import StudioError
from core.params import AdapterRef
from core.requests import MODES, SAMPLE_RATE, TRACKS, Master
from core.results import DeviceUsed, ModelUsed, Take

KINDS = get_args(Kind)
TAGS = Tags("Tïtle 日本語 🎵", "ACE-Step mini (embedded)", "MIT")


def music(samples: int = 3 * SAMPLE_RATE, seed: int = 0, level: float = 0.7) -> np.ndarray:
    """Plucked chords and hiss, float32 [2, samples], peak at `level`."""
    t = np.arange(samples) / SAMPLE_RATE
    pluck = np.exp(-((t % 0.5) * 8))
    tones = sum(np.sin(2 * np.pi * hz * t) for hz in (220.0, 277.2, 329.6))
    hiss = np.random.default_rng(seed).standard_normal(samples)
    wave = pluck * (tones + 0.02 * hiss)
    sound = np.stack([wave, 0.8 * np.roll(wave, 37)])
    return (level * sound / max(1e-9, np.abs(sound).max(initial=0.0))).astype(np.float32)


SHORT = music(2400)


def a_take(mode: str = "generate", codes: tuple[int, ...] = (), **request) -> Take:
    needed = {"generate": {"prompt": "warm lofi piano"}}.get(mode, {"source": "song.wav"})
    return Take(
        id="0123abcd",
        path="/home/alice/secret/warm-lofi.wav",
        mode=mode,
        request=MODES[mode].of({**needed, "seed": 7, **request}).model_dump(),
        model=ModelUsed(
            name="mini",
            source="vendor/ace-step-mini",
            revision="1",
            sha256="ab" * 32,
            licence="MIT",
            may_sell=True,
        ),
        device=DeviceUsed(kind="cpu", name="a CPU", dtype="float32", threads=2, torch="2.13.0"),
        sample_rate=SAMPLE_RATE,
        samples=SHORT.shape[1],
        peak_dbfs=-1.0,
        timings_s={"Denoising": 1.25},
        plan={"bpm": 90, "caption": "„warm“"},
        codes=codes,
        made_at=datetime(2026, 11, 21, 9, 30, tzinfo=UTC),
        studio="0.1.0",
    )


EMBEDDED = settings_of(a_take(lyrics="[Verse]\nżółw 🎹", codes=tuple(range(50))))


def saved(
    path: Path, kind: str, sound: np.ndarray = SHORT, embedded=EMBEDDED, tags: Tags = TAGS
) -> Path:
    drain(encode.save(sound, path, kind, embedded, tags))
    return path


def file_bytes(kind: str, embedded=EMBEDDED) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return saved(Path(folder) / "a", kind, embedded=embedded).read_bytes()


BYTES = {kind: file_bytes(kind) for kind in KINDS}
PLAIN = {kind: file_bytes(kind, embedded=None) for kind in KINDS}


@pytest.fixture
def read(tmp_path):
    """Settings of some bytes."""

    def read(data: bytes):
        path = tmp_path / "upload.bin"
        path.write_bytes(data)
        return read_settings(path)

    return read


@pytest.fixture
def refusal(read):
    """The error message for bytes that are refused."""

    def refusal(data: bytes) -> str:
        with pytest.raises(StudioError) as caught:
            read(data)
        assert caught.value.code == "settings-unreadable"
        return caught.value.message

    return refusal


# Samples


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_wav_and_flac_hold_the_samples_rounded_to_24_bits(kind, tmp_path):
    sound = music(SAMPLE_RATE * 11)
    sound[:, 1000:1010] = [[1.0], [-1.0]]
    sound[:, 2000:2010] = [[1.7], [-2.5]]
    soundfile.write(tmp_path / "plain.wav", sound.T, SAMPLE_RATE, subtype="PCM_24")
    saved(tmp_path / f"a.{kind}", kind, sound)
    assert soundfile.info(tmp_path / f"a.{kind}").subtype == "PCM_24"
    plain, _ = soundfile.read(tmp_path / "plain.wav", dtype="int32")
    now, rate = soundfile.read(tmp_path / f"a.{kind}", dtype="int32")
    assert rate == SAMPLE_RATE
    assert np.array_equal(now, plain)
    steps = now.T / 256 - np.clip(sound.astype(np.float64), -1, 1) * 2**23
    assert np.abs(steps).max() <= 1, "one step of 24 bits"


@pytest.mark.parametrize("kind", KINDS)
def test_converting_a_take_keeps_its_samples_and_bytes(kind, tmp_path):
    take = saved(tmp_path / "take.wav", "wav", music())
    drain(encode.convert(take, tmp_path / "b", kind, read_settings(take), TAGS))
    direct = saved(tmp_path / f"a.{kind}", kind, music())
    if kind == "mp3":
        decoded = [soundfile.read(path)[0] for path in (direct, tmp_path / "b")]
        assert decoded[0].shape == decoded[1].shape
        # LAME got 24 bits instead of floats, and decides by a hair.
        assert np.square(decoded[0] - decoded[1]).sum() < 1e-3 * np.square(decoded[0]).sum()
    else:
        assert (tmp_path / "b").read_bytes() == direct.read_bytes()
    for gone in (tmp_path / "gone.wav", tmp_path):
        with pytest.raises(StudioError) as caught:
            drain(encode.convert(gone, tmp_path / "c", kind, None, TAGS))
        assert caught.value.code == "take-gone"
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("samples", [1, 1151, 1152, 1153, 48_000 * 3 + 13])
def test_a_decoded_mp3_has_the_same_length_and_no_delay(samples, tmp_path):
    sound = music(samples)
    path = saved(tmp_path / "a.mp3", "mp3", sound)
    decoded, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert (rate, decoded.shape) == (SAMPLE_RATE, (samples, 2))
    by_ffmpeg = decode.decode(path, 60, tmp_path, shortest_s=0)
    assert by_ffmpeg.sound.shape == (2, samples)
    assert not [note for note in by_ffmpeg.notes if "cut off" in note or "Damaged" in note]
    if samples > 10_000:
        for other in (decoded.T, by_ffmpeg.sound):
            spectra = np.fft.rfft(sound[0], 2 * samples).conj() * np.fft.rfft(other[0], 2 * samples)
            assert np.argmax(np.fft.irfft(spectra)) == 0, "lag"
            error = np.square(other - sound).sum() / np.square(sound).sum()
            assert 10 * np.log10(error) < -25


def test_every_mp3_frame_is_320_kbit(tmp_path):
    data = saved(tmp_path / "a.mp3", "mp3", music()).read_bytes()
    at = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    frames = data[at:]
    assert len(frames) % 960 == 0
    for first in range(0, len(frames), 960):
        assert frames[first : first + 3] in (b"\xff\xfb\xe4", b"\xff\xfb\xe0")
    assert b"Info" in frames[:64]
    assert b"LAME" in frames[:256]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_song_gives_the_same_file(kind, tmp_path):
    first, second = (saved(tmp_path / name, kind, music()).read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_other_programs_play_it_without_warnings(kind, tmp_path):
    sound = music(SAMPLE_RATE * 2 + 77)
    big = settings_of(a_take(lyrics="🎵" * 4096, codes=tuple(range(60_000, 61_200))))
    path = saved(tmp_path / f"a.{kind}", kind, sound, big)
    assert read_settings(path) == big
    decoded = decode.decode(path, 60, tmp_path)
    assert decoded.sound.shape == sound.shape
    assert not decoded.notes
    for command in (
        ["ffmpeg", "-v", "error", "-xerror", "-i", path, "-f", "f32le", "-"],
        ["sox", path, "-t", "f32", "-"],
    ):
        if not shutil.which(command[0]) or (command[0], kind) == ("sox", "mp3"):
            continue  # few builds of SoX read MP3
        played = subprocess.run(command, capture_output=True, timeout=60, check=True)
        assert len(played.stdout) == sound.nbytes
        assert not played.stderr, played.stderr.decode()


def test_wav_chunks_fill_the_file_exactly():
    longer = file_bytes("wav", settings_of(a_take(prompt="warm lofi piano!")))
    for data in (BYTES["wav"], PLAIN["wav"], file_bytes("wav", settings_of(a_take())), longer):
        assert int.from_bytes(data[4:8], "little") == len(data) - 8
        names, at = [], 12
        while at < len(data):
            size = int.from_bytes(data[at + 4 : at + 8], "little")
            names.append(data[at : at + 4])
            at += 8 + size + size % 2
        assert at == len(data)
        assert names[:3] == [b"fmt ", b"data", b"LIST"]
        assert names[3:] in ([], [CHUNK])


def test_flac_has_one_comment_block_after_streaminfo():
    for data in (BYTES["flac"], PLAIN["flac"]):
        kinds, at, last = [], 4, False
        while not last:
            last = data[at] > 127
            kinds.append(data[at] & 127)
            at += 4 + int.from_bytes(data[at + 1 : at + 4], "big")
        assert kinds[0] == 0
        assert kinds.count(4) == 1
        assert data[at : at + 2] == b"\xff\xf8", "the first frame"


# Complete or not at all


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_never_reach_an_encoder(kind, value, tmp_path):
    sound = SHORT.copy()
    sound[1, -1] = value
    with pytest.raises(StudioError) as caught:
        saved(tmp_path / "a", kind, sound)
    assert caught.value.code == "sound-not-finite"
    assert TAGS.model in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_closing_the_generator_leaves_the_older_file(kind, tmp_path):
    (tmp_path / "a").write_bytes(b"an older song")
    seconds = 2 * encode.BLOCK_S[kind] + 1
    steps = encode.save(np.zeros((2, seconds * SAMPLE_RATE)), tmp_path / "a", kind, EMBEDDED, TAGS)
    events = [next(steps), next(steps)]
    steps.close()
    assert [(e.stage, e.step, e.steps) for e in events] == [("Writing", 0, 3), ("Writing", 1, 3)]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"an older song"


@pytest.mark.parametrize(
    ("number", "code"), [(28, "disk-full"), (122, "disk-full"), (13, "not-writable")]
)
def test_a_full_disk_leaves_no_file(number, code, tmp_path, monkeypatch):
    def full(*_):
        assert list(tmp_path.iterdir()), "part of it is written"
        raise OSError(number, "no")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StudioError) as caught:
        saved(tmp_path / "a.wav", "wav")
    assert caught.value.code == code
    assert str(tmp_path) not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_not_writable(tmp_path):
    with pytest.raises(StudioError) as caught:
        saved(tmp_path / "gone" / "a.wav", "wav")
    assert caught.value.code == "not-writable"


def test_settings_that_cannot_be_read_back_are_not_written(tmp_path):
    for embedded in ({"a": float("nan")}, {"a": "x" * SETTINGS_LIMIT}):
        with pytest.raises(ValueError, match=r"JSON|settings"):
            saved(tmp_path / "a.wav", "wav", embedded=embedded)
    assert not list(tmp_path.iterdir())


# Tags


def tags_by_ffmpeg(path: Path) -> dict[str, str]:
    import av

    with av.open(str(path)) as container:
        found = dict(container.metadata)
    return {name.lower(): text for name, text in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_players_show_title_model_and_that_it_is_generated(kind, tmp_path):
    found = tags_by_ffmpeg(saved(tmp_path / f"a.{kind}", kind))
    assert found["title"] == TAGS.title
    assert found["encoder"] == "ACE Music Studio"
    assert found["comment"] == (
        "AI-generated. Made with ACE Music Studio and ACE-Step mini (embedded) (licence: MIT)."
    )
    if kind != "wav":
        assert found["model"] == TAGS.model
        assert found["model_licence"] == "MIT"
        assert found["ai_generated"] == "yes"
        assert json.loads(found[KEY.lower()]) == EMBEDDED


@pytest.mark.parametrize("kind", KINDS)
def test_the_ai_label_is_optional_and_titles_are_one_line(kind, tmp_path):
    tags = Tags(" a\nb\0c\u202e" + "x" * 300, "m", "l", ai_generated=False)
    path = saved(tmp_path / f"a.{kind}", kind, embedded=None, tags=tags)
    found = tags_by_ffmpeg(path)
    assert found["title"] == "a b c " + "x" * 194
    assert "AI" not in found["comment"]
    assert "ai_generated" not in found
    nameless = saved(tmp_path / f"b.{kind}", kind, tags=Tags("\n", "m", "l"))
    assert tags_by_ffmpeg(nameless)["title"] == "Untitled"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_settings_holds_no_trace_of_them(kind, tmp_path):
    path = saved(tmp_path / f"a.{kind}", kind, embedded=None)
    assert read_settings(path) is None
    data = path.read_bytes()
    for trace in (b"aces", KEY.encode(), b"seed", b"alice", SCHEMA.encode()):
        assert trace not in data


# Embedded settings


def values(param) -> st.SearchStrategy:
    """Any valid value of a parameter."""
    if param.choices:
        found = st.sampled_from(param.choices)
    elif param.type is bool:
        found = st.booleans()
    elif param.type is Path:
        found = st.sampled_from(["/tmp/a/song.mp3", "C:\\Users\\bob\\łąka.wav", "x.flac"])
    elif param.type is AdapterRef:
        files = st.sampled_from(["/tmp/a/warm.safetensors", "C:\\a\\cold.safetensors"])
        one = st.builds(
            lambda file, strength: f"{file}:{strength}", files, st.sampled_from([0, 1.5])
        )
        found = st.lists(one, max_size=3)
    elif param.type is int:
        found = st.integers(int(param.low), int(param.high))
    elif param.type is float:
        found = st.floats(param.low, param.high)
    elif param.name == "tracks":
        found = st.lists(st.sampled_from(TRACKS), max_size=4).map(", ".join)
    else:
        found = st.text(max_size=min(param.max_length, 60)) | st.sampled_from(
            ["🎵" * param.max_length, "\x00\x01\u2028\u202e\ufeff", '"\\/\\u0000]}{["', "ACES=x"]
        )
    return st.none() | found if param.optional else found


@st.composite
def requests(draw, mode: str) -> dict:
    """Values for every parameter of a mode, as its `of` accepts them."""
    made = draw(st.fixed_dictionaries({k.name: values(k) for k in MODES[mode].params()}))
    for low, high in (
        ("cfg_interval_start", "cfg_interval_end"),
        ("start_s", "end_s"),
        ("n_min", "n_max"),
    ):
        if made.get(low) is not None and made.get(high) is not None:
            made[low], made[high] = sorted((made[low], made[high]))
    with suppress(StudioError):
        return MODES[mode].of(made).model_dump()
    # What a mode refuses for other reasons is mended where a song is wanted, or drawn smaller.
    mended = {**made, "prompt": f"x{made['prompt']}"[:512], "after_s": 20.0, "noise": 0.0}
    if made.get("end_s") is not None:
        mended["end_s"] = min(240.0, made["start_s"] + 1)
        mended["start_s"] = mended["end_s"] - 1
    if "source" in made:
        mended["source"] = made["source"] or "song.wav"
    names = {k.name for k in MODES[mode].params()}
    return MODES[mode].of({k: v for k, v in mended.items() if k in names}).model_dump()


@pytest.mark.parametrize("mode", MODES)
@trying(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_every_field_of_every_mode_survives_every_format(mode, data, tmp_path):
    request = data.draw(requests(mode))
    codes = data.draw(st.lists(st.integers(0, 63_999), max_size=1200))
    take = a_take(mode, codes=tuple(codes)).model_copy(update={"request": request})
    embedded = settings_of(take)
    uploads = {k: v for k, v in request.items() if isinstance(v, Path) or k == "adapters"}
    for kind in KINDS:
        path = saved(tmp_path / f"a.{kind}", kind, SHORT[:, :480], embedded)
        found = read_settings(path)
        assert found == embedded
        assert request_of(found, **uploads).model_dump() == request
        assert tuple(found["codes"]) == take.codes
    again = Take.model_validate({**found, "path": take.path, "request": request})
    assert again == take


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_records_its_loudness(kind, read):
    embedded = with_mastering(EMBEDDED, Master.of({"source": "/x/a.wav", "target_lufs": -16.5}))
    assert embedded["mastered"] == [{"target_lufs": -16.5, "ceiling_dbtp": -1.0}]
    assert read(file_bytes(kind, embedded)) == embedded
    assert read(file_bytes(kind)) == EMBEDDED


def test_no_path_of_this_computer_is_written():
    take = a_take("cover", source="/home/alice/secret/song.wav", reference="C:\\secret\\łąka.mp3")
    model = take.model.model_copy(update={"source": "/home/alice/models/mine"})
    embedded = settings_of(take.model_copy(update={"model": model}))
    text = json.dumps(embedded, ensure_ascii=False)
    assert "secret" not in text
    assert "alice" not in text
    assert embedded["names"] == {"source": "song.wav", "reference": "łąka.mp3"}
    assert embedded["model"]["source"] == "mine"


def test_a_song_made_from_a_file_needs_that_file_again():
    embedded = settings_of(a_take("cover", source="/x/Old Song.wav"))
    with pytest.raises(StudioError) as caught:
        request_of(embedded)
    assert caught.value.code == "settings-need-file"
    assert "Old Song.wav" in caught.value.message
    assert request_of(embedded, source="new.wav", seed=9).seed == 9


def test_json_beside_a_song_is_read_too(read, refusal):
    assert read(json.dumps(EMBEDDED, indent=2).encode()) == EMBEDDED
    assert read(b"\xef\xbb\xbf" + json.dumps(EMBEDDED, ensure_ascii=False).encode()) == EMBEDDED
    assert read(b'{"something": "else"}') is None
    assert "damaged" in refusal(json.dumps(EMBEDDED).encode()[:-9])
    assert "too long" in refusal(json.dumps({**EMBEDDED, "x": "x" * SETTINGS_LIMIT}).encode())


def test_version_1_stays_readable(read):
    """Settings of format version 1 without later fields."""
    first = """{
        "ace-music-studio": 1, "kind": "take", "id": "a", "mode": "generate", "notes": [],
        "request": {"prompt": "piano", "seed": 3, "inference_steps": 16, "thinking": null},
        "model": {"name": "mini", "source": "vendor/ace-step-mini", "revision": "1",
                  "sha256": "00", "licence": "MIT", "may_sell": null},
        "device": {"kind": "cpu", "name": "x", "dtype": "float32", "threads": 2, "torch": "2.13.0"},
        "sample_rate": 48000, "samples": 480000, "peak_dbfs": null, "timings_s": {},
        "made_at": "2026-11-21T09:30:00Z", "studio": "0.1.0", "names": {}
    }"""
    found = read(first.encode())
    assert request_of(found).inference_steps == 16
    assert found["request"]["infer_method"] == "ode"


# Files rewritten by other programs


@pytest.mark.parametrize(
    ("kind", "options"),
    [("mp3", {"id3v2_version": "3"}), ("mp3", {"id3v2_version": "4"}), ("flac", {})],
)
def test_settings_survive_a_rewrite_by_another_program(kind, options, tmp_path):
    import av

    with (
        av.open(str(saved(tmp_path / f"a.{kind}", kind))) as old,
        av.open(str(tmp_path / f"b.{kind}"), "w", options=options) as new,
    ):
        new.metadata.update(old.metadata)
        stream = new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux(old.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    assert (tmp_path / f"b.{kind}").read_bytes() != BYTES[kind]
    assert read_settings(tmp_path / f"b.{kind}") == EMBEDDED


def safe(number: int) -> bytes:
    return bytes(number >> shift & 127 for shift in (21, 14, 7, 0))


def id3(*frames: bytes, version: int = 3, flags: int = 0) -> bytes:
    body = b"".join(frames)
    return b"ID3" + bytes([version, 0, flags]) + safe(len(body)) + body


def frame(body: bytes, name: bytes = b"TXXX", version: int = 3, flags: int = 0) -> bytes:
    size = safe(len(body)) if version == 4 else len(body).to_bytes(4, "big")
    return name + size + bytes([0, flags]) + body


TEXT = json.dumps(EMBEDDED)
LATIN = b"\0" + KEY.encode() + b"\0" + TEXT.encode()
WIDE = b"\1" + KEY.encode("utf-16") + b"\0\0" + TEXT.encode("utf-16")
PICTURE = frame(b"\0image/jpeg\0\3\0" + b"\xff\xd8" * 30_000, b"APIC")


@pytest.mark.parametrize(
    "tag",
    [
        id3(PICTURE, frame(LATIN), bytes(100)),
        id3(frame(WIDE), PICTURE),
        id3(frame(b"\2" + (KEY + "\0" + TEXT).encode("utf-16-be"))),
        id3(frame(b"\3" + (KEY.lower() + "\0" + TEXT + "\0").encode(), version=4), version=4),
        id3(frame(WIDE).replace(b"\xff", b"\xff\0"), flags=0x80),
        id3(frame(WIDE.replace(b"\xff", b"\xff\0"), version=4, flags=2), version=4),
        id3(frame(safe(len(LATIN)) + LATIN, version=4, flags=1), version=4),
        id3(b"\0\0\0\6" + bytes(6), frame(LATIN), flags=0x40),
        id3(safe(6) + bytes(2), frame(LATIN, version=4), version=4, flags=0x40),
    ],
    ids="cover-first wide big-endian utf-8 unsynced unsynced-4 length ext ext-4".split(),
)
def test_tags_written_by_other_programs_are_understood(tag, read):
    assert read(tag + PLAIN["mp3"]) == EMBEDDED
    assert read(tag + PLAIN["flac"]) == EMBEDDED


def test_odd_chunks_padding_and_names_in_any_case_are_understood(read):
    assert read(PLAIN["wav"] + chunk(b"odd", b"junk") + chunk(TEXT.encode())) == EMBEDDED
    assert read(id3(PICTURE, bytes(99)) + BYTES["flac"]) == EMBEDDED
    assert read(BYTES["flac"].replace(b"ACE_SETTINGS=", b"Ace_Settings=")) == EMBEDDED


def test_files_of_other_programs_hold_no_settings(read, tmp_path):
    held = io.BytesIO()
    soundfile.write(held, SHORT.T, SAMPLE_RATE, format="OGG")
    for data in (
        *(held.getvalue(), b"x", b"RIFF", b"ID3", b"fLaC", b"\xff\xfb\xe4\0" * 99, b"{}", b"[1]"),
        *(b"RIFF\4\0\0\0AVI LIST", b"\x89PNG\r\n\x1a\n" + bytes(99), b"PK\3\4", bytes(9999)),
        *(id3(PICTURE) + PLAIN["mp3"], id3(frame(b"\3MOOD\0calm")), id3(b"TXX", version=2)),
        *(id3(frame(b"\3MOOD\0calm")) + frame(LATIN), b"fLaC\x84\0\0\x08" + bytes(8)),
        *(id3(frame(LATIN, flags=0x80)), id3(frame(b"")), id3(frame(b"\7x"))),
    ):
        assert read(data) is None


# Work that needs only the audio


def test_unusable_settings_do_not_stop_work_that_needs_only_the_sound(tmp_path):
    path = tmp_path / "a.wav"
    for settings, problem in (
        ({**EMBEDDED, SCHEMA: 2}, "newer"),
        (b"not JSON", "damaged"),
        (b"[" * 400_000, "nested"),
    ):
        path.write_bytes(hiding(settings))
        found, notes = usable_settings(path)
        assert found is None
        assert len(notes) == 1
        assert problem in notes[0]
        with pytest.raises(StudioError, match=problem):
            read_settings(path)
    path.write_bytes(BYTES["wav"])
    assert usable_settings(path) == (EMBEDDED, ())
    path.write_bytes(PLAIN["wav"])
    assert usable_settings(path) == (None, ())
    with pytest.raises(StudioError) as caught:
        usable_settings(tmp_path / "gone.wav")
    assert caught.value.code == "source-missing"


def wrong_count(claimed: int) -> bytes:
    """A FLAC whose comments claim to be more than they are."""
    comment = b"TITLE=Mine"
    body = bytes(4) + claimed.to_bytes(4, "little") + len(comment).to_bytes(4, "little") + comment
    flac = PLAIN["flac"]
    at, blocks = 4, b""
    while True:
        size = int.from_bytes(flac[at + 1 : at + 4], "big")
        last, kind = flac[at] > 127, flac[at] & 127
        if kind != 4:
            blocks += bytes([kind]) + flac[at + 1 : at + 4 + size]
        at += 4 + size
        if last:
            break
    return b"fLaC" + blocks + b"\x84" + len(body).to_bytes(3, "big") + body + flac[at:]


ODD = {
    "wrong comment count.flac": lambda: wrong_count(99),
    "huge comment count.flac": lambda: wrong_count(0xFFFFFFFF),
    "overlong frame.mp3": lambda: (
        id3(b"TXXX\x7f\xff\xff\xff\0\0\3" + KEY.encode() + b"\0{") + PLAIN["mp3"]
    ),
    "9 MB cover, unsynchronised.mp3": lambda: (
        id3(frame(b"\0image/jpeg\0\3\0" + b"\xff\xd8" + b"x" * (9 << 20), b"APIC"), flags=0x80)
        + PLAIN["mp3"]
    ),
    "9 MB cover.flac": lambda: (
        id3(frame(b"\0image/jpeg\0\3\0" + b"\xff\xd8" + b"x" * (9 << 20), b"APIC")) + PLAIN["flac"]
    ),
    "chunks without end.wav": lambda: PLAIN["wav"] + b"junk\0\0\0\0" * 30_000,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tags_never_stop_work_on_good_sound(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(ODD[name]())
    settings, notes = usable_settings(path)
    assert settings is None
    assert len(notes) <= 1
    sound = decode.decode(path, 60, tmp_path, shortest_s=0).sound
    assert sound.shape == SHORT.shape
    saved(tmp_path / "again.flac", "flac", sound, settings)


# Hostile files


def chunk(body: bytes, name: bytes = CHUNK) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def hiding(embedded) -> bytes:
    """A WAV whose settings are `embedded`, bytes or JSON."""
    raw = embedded if isinstance(embedded, bytes) else json.dumps(embedded).encode()
    return PLAIN["wav"] + chunk(raw)


def test_a_truncated_file_is_called_cut_off(refusal):
    assert "cut off" in refusal(BYTES["wav"][:-9])
    for kind in ("mp3", "flac"):
        assert "cut off" in refusal(BYTES[kind][: BYTES[kind].index(b'"mode"')])


def answer(read, data: bytes):
    """Settings, None, or the code of the refusal."""
    try:
        return read(data)
    except StudioError as error:
        return error.code


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_gives_all_settings_or_none(kind, read):
    data = BYTES[kind]
    generator = random.Random(0)
    for end in [*range(1, 200, 3), *(generator.randrange(1, len(data)) for _ in range(100))]:
        assert answer(read, data[:end]) in (None, EMBEDDED, "settings-unreadable")


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_bytes_are_refused_or_harmless(kind, read):
    """Every answer is settings of the right shape, none, or a refusal; most scratches are seen."""
    data, generator, refused = BYTES[kind], random.Random(1), 0
    at = data.index(b'{"ace-music')
    for _ in range(250):
        hurt = bytearray(data)
        for _ in range(generator.choice((1, 3, 20))):
            place = generator.choice(
                (at + generator.randrange(1200), generator.randrange(at + 1), 4)
            )
            hurt[place % len(hurt)] = generator.choice(
                (0, 255, 127, 34, 123, generator.randrange(256))
            )
        found = answer(read, bytes(hurt))
        if isinstance(found, dict):
            assert request_of(found)
            assert found.keys() == EMBEDDED.keys()
        else:
            assert found in (None, "settings-unreadable")
            refused += found is not None
    assert refused > 60


OTHER = {**EMBEDDED, "request": {**EMBEDDED["request"], "seed": 8}}


@pytest.mark.parametrize(
    ("embedded", "word"),
    [
        (b"", "damaged"),
        (b"\xff\xfe{}", "damaged"),
        (b"not JSON", "damaged"),
        ([], "no settings"),
        ("x", "no settings"),
        ({}, "no settings"),
        ({**EMBEDDED, SCHEMA: "1"}, "no settings"),
        ({**EMBEDDED, SCHEMA: True}, "no settings"),
        ({**EMBEDDED, SCHEMA: 0}, "no settings"),
        ({**EMBEDDED, SCHEMA: 2}, "newer"),
        ({**EMBEDDED, "mode": "remix"}, "no mode called 'remix'"),
        ({**EMBEDDED, "mode": ["generate"]}, "no mode"),
        ({**EMBEDDED, "request": []}, "not complete"),
        ({**EMBEDDED, "codes": "1, 2"}, "not complete"),
        ({**EMBEDDED, "model": None}, "not complete"),
        ({**EMBEDDED, "device": {"kind": "cpu"}}, "not complete"),
        ({k: v for k, v in EMBEDDED.items() if k != "made_at"}, "not complete"),
        ({**EMBEDDED, "names": ["song.wav"]}, "no settings"),
        ({**EMBEDDED, "names": {"reference": 3}}, "no settings"),
        ({**EMBEDDED, "mastered": "loud"}, "no settings"),
        ({**EMBEDDED, "mastered": [{}] * 9}, "no settings"),
        ({**EMBEDDED, "mastered": [{"target_lufs": 3}]}, "loudness"),
        ({**EMBEDDED, "mastered": [{"path": "/etc/passwd"}]}, "loudness"),
        ({**EMBEDDED, "mastered": [["target_lufs", -14]]}, "loudness"),
        ({**EMBEDDED, "request": {**EMBEDDED["request"], "seed": -2}}, "Seed"),
        ({**EMBEDDED, "request": {**EMBEDDED["request"], "seed": 1e300}}, "Seed"),
        ({**EMBEDDED, "request": {**EMBEDDED["request"], "lyrics": "x" * 5000}}, "Lyrics"),
        ({**EMBEDDED, "request": {**EMBEDDED["request"], "lyrics": {"$": 1}}}, "Lyrics"),
        ({**EMBEDDED, "request": {**EMBEDDED["request"], "__class__": "x"}}, "__class__"),
        (TEXT.replace('"seed": 7', '"seed": NaN').encode(), "damaged"),
        (TEXT.replace('"seed": 7', '"seed": 7, "shift": 1e999').encode(), "twice|damaged"),
        (TEXT.replace('"seed": 7', f'"seed": {"9" * 5000}').encode(), "damaged"),
        (TEXT.replace('"seed": 7', '"seed": 7, "seed": 7').encode(), "twice"),
        (TEXT.replace("[Verse]", "\\ud800").encode(), "damaged"),
        (b"[" * 400_000, "nested"),
        (b'{"a":' * 200_000, "nested"),
        (b'"' + b"\\" * 900_000, "damaged"),
        (b" " * (SETTINGS_LIMIT + 1), "too long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_foreign_settings_are_refused(embedded, word, refusal):
    import re

    assert re.search(word, refusal(hiding(embedded)))


@pytest.mark.parametrize("embedded", [OTHER, EMBEDDED])
def test_two_settings_in_one_file_are_refused(embedded, refusal):
    raw = json.dumps(embedded).encode()
    second = frame(b"\0" + KEY.encode() + b"\0" + raw)
    odd = raw + b" " * (1 - len(raw) % 2)
    for data in (
        BYTES["wav"] + chunk(raw),
        PLAIN["wav"] + chunk(odd) + chunk(raw),
        id3(second, second) + PLAIN["mp3"],
        id3(second) + BYTES["flac"],
    ):
        assert "more than once" in refusal(data)


def test_a_comment_longer_than_its_block_is_damaged(refusal):
    claims = b"\x0c\0\0\0" + b"ACE_SETTINGS" + b"\1\0\0\0" + b"\xff\0\0\0" + b"A=" + bytes(99)
    assert "damaged" in refusal(b"fLaC\x84\0\0\x20" + claims)
    assert "too big" in refusal(
        b"fLaC\x84\xff\xff\xff" + b"\0\0\0\0\1\0\0\0\0\0\xf0\0ACE_SETTINGS="
    )


def test_no_path_in_a_file_is_used(tmp_path, read):
    """Neither where a file lay, nor where a model is, and no file is opened for it."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(PLAIN["wav"])
    take = settings_of(a_take("cover"))
    evil = {
        **take,
        "path": str(secret),
        "request": {**take["request"], "source": str(secret), "reference": "../../secret.wav"},
        "names": {"source": f"/etc/{secret}", "prompt": "/etc/passwd", "x": "/etc/passwd"},
        "model": {**take["model"], "source": str(secret)},
    }
    found = read(hiding(evil))
    assert "path" not in found
    assert not found["request"].keys() & {"source", "reference"}
    assert found["names"] == {"source": "secret.wav"}
    assert found["model"]["source"] == "secret.wav"
    assert "/" not in json.dumps({**found, "request": 0, "studio": 0, "names": 0, "model": 0})
    with pytest.raises(StudioError, match=r"This song used secret\.wav"):
        request_of(found)


class Counting(io.FileIO):
    """A file that counts what is read of it."""

    total = 0

    def readinto(self, into):
        got = super().readinto(into)
        Counting.total += got
        return got

    def read(self, size=-1):
        got = super().read(size)
        Counting.total += len(got)
        return got

    def readall(self):
        got = super().readall()
        Counting.total += len(got)
        return got


def sparse(path: Path, head: bytes, size: int = 200 << 20) -> Path:
    """A sparse file of `size` bytes."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


HUGE = (0x7FFFFFF0).to_bytes(4, "little")
VORBIS = b"fLaC\x84\xff\xff\xff"


@pytest.mark.parametrize(
    "head",
    [
        b"RIFF\xff\xff\xff\xffWAVEaces" + HUGE,
        b"RIFF\xff\xff\xff\xffWAVEdata" + HUGE,
        b"RIFF\xff\xff\xff\xffWAVE" + b"junk\0\0\0\0" * 200_000,
        b"RIFF\xff\xff\xff\xffWAVE" + b"aces\0\0\0\0" * 200_000,
        VORBIS + HUGE,
        VORBIS + b"\0\0\0\0\xff\xff\xff\xff" + b"\0\0\0\0" * 200_000,
        VORBIS + b"\0\0\0\0\1\0\0\0\xf0\xff\xff\0ACE_SETTINGS=",
        b"fLaC" + b"\1\0\0\0" * 200_000,
        b"ID3\3\0\0\x7f\x7f\x7f\x7fTXXX\x7f\xff\xff\xff\0\0\0" + KEY.encode() + b"\0{",
        b"ID3\4\0\0\x7f\x7f\x7f\x7fTXXX\x7f\x7f\x7f\x7f\0\0\0" + KEY.encode() + b"\0{",
        b"ID3\3\0\x80\x7f\x7f\x7f\x7f" + b"\xff\0" * 200_000,
        b"ID3\3\0\0\x7f\x7f\x7f\x7f" + b"AAAA\0\0\0\0\0\0" * 100_000,
        b"ID3\3\0\x40\x7f\x7f\x7f\x7f\xff\xff\xff\xff",
        b"ID3\4\0\x40\x7f\x7f\x7f\x7f\0\0\0\0" * 9,
        b'{"ace-music-studio": 1, "x": "',
        b"{" * 3_000_000,
    ],
)
def test_large_files_are_read_no_further_than_the_limits(head, tmp_path, monkeypatch):
    Counting.total = 0
    path = sparse(tmp_path / "a", head)
    monkeypatch.setattr(
        decode, "open_regular_file", lambda path, name: io.BufferedReader(Counting(path, "rb"))
    )
    with suppress(StudioError):
        assert read_settings(path) is None
    # A buffer of 8 kB may be filled for each part.
    assert Counting.total <= READ_LIMIT + 3_000_000


def test_folders_and_pipes_are_refused_before_they_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    cases = {"pipe": "source-unreadable", ".": "source-unreadable", "empty": "source-unreadable"}
    for name, code in {**cases, "gone": "source-missing", "a\0b": "source-unreadable"}.items():
        with pytest.raises(StudioError) as caught:
            read_settings(tmp_path / name)
        assert caught.value.code == code
        assert str(tmp_path) not in str(caught.value)


@trying(max_examples=150, deadline=None, derandomize=True)
@given(
    front=st.sampled_from([b"", b"RIFF\0\0\0\0WAVE", b"fLaC", VORBIS, id3()[:6], b'{"']),
    parts=st.lists(
        st.binary(max_size=12)
        | st.sampled_from(
            [b"aces", b"TXXX", b"ACE_SETTINGS=", b"\0\0\0\x20", b"\x20\0\0\0", TEXT.encode()]
        ),
        max_size=8,
    ),
)
def test_no_bytes_crash_the_reader(front, parts):
    with suppress(UnusableSettings):
        found = read_embedded(io.BytesIO(front + b"".join(parts)))
        assert found is None or len(found) <= SETTINGS_LIMIT
