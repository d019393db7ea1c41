"""Meters compared with an independent meter, and with sounds whose measures are known."""

from __future__ import annotations

import time

import numpy as np
import pytest
from conftest import drain, song
from meters import RATE, band, ebur128, noise, tone
from scipy.signal import firwin, upfirdn

from audio import analysis, loudness
from core.music import KEYS


def silence(seconds):
    return np.zeros((2, round(seconds * RATE)), np.float32)


def joined(*parts):
    return np.concatenate(parts, axis=1)


def faded(sound):
    """Meters differ by half a decibel about what rises beyond a hard cut."""
    return sound * np.hanning(sound.shape[1]).astype(np.float32) ** 0.1


PIECES = {
    "a band": lambda: band(12),
    "noise": lambda: noise(6),
    "clipped": lambda: np.clip(band(8) * 20, -1, 1),
    "one channel": lambda: band(6) * np.float32([[1], [0]]),
    "opposite channels": lambda: band(6) * np.float32([[1], [-1]]),
    "a long pause": lambda: joined(band(5), silence(6), band(5)),
    "loud and soft": lambda: joined(band(5), band(5) * np.float32(0.02)),
    "very soft": lambda: band(6) * np.float32(0.005),
    "bass": lambda: faded(tone(5, 40, 0.5)),
    "treble": lambda: faded(tone(5, 9_000, 0.1)),
    "twenty seconds on an offset": lambda: faded(tone(21, 440, 0.05) + np.float32(0.5)),
    "exactly one block": lambda: noise(0.4),
}


@pytest.mark.parametrize("name", PIECES)
def test_loudness_and_true_peak_equal_those_of_ffmpeg(name, tmp_path):
    sound = PIECES[name]()
    lufs, peak = ebur128(sound, tmp_path)
    assert loudness.loudness(sound) == pytest.approx(lufs, abs=0.1)
    assert loudness.true_peak(sound) == pytest.approx(peak, abs=0.2)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(5, -23)], -23.0),
        ([(5, -33)], -33.0),
        ([(2, -36), (12, -23), (2, -36)], -23.0),
        ([(2, -72), (2, -36), (12, -23), (2, -36), (2, -72)], -23.0),
    ],
)
def test_loudness_meets_the_cases_of_ebu_tech_3341(parts, expected):
    """EBU Tech 3341, cases 1 to 4, shortened: sines of 1 kHz of so many seconds and dBFS."""
    sound = joined(*(tone(seconds, 1000, 10 ** (level / 20)) for seconds, level in parts))
    assert loudness.loudness(sound) == pytest.approx(expected, abs=0.1)


def test_silence_has_no_loudness_and_a_short_sound_has_one():
    assert loudness.loudness(silence(2)) is None
    assert loudness.loudness(noise(2, 10 ** (-90 / 20))) is None
    assert loudness.loudness(silence(0)) is None
    assert loudness.true_peak(silence(1)) is None
    assert loudness.true_peak(silence(0)) is None
    assert loudness.loudness(noise(0.2)) == pytest.approx(loudness.loudness(noise(5)), abs=0.3)
    assert loudness.loudness(noise(1 / RATE)) is not None


def test_true_peak_sees_what_lies_between_the_samples():
    sound = tone(1, 12_000, 0.5, phase=np.pi / 4)
    assert np.abs(sound).max() == pytest.approx(0.5 * 2**-0.5, rel=1e-3)
    assert loudness.true_peak(sound) == pytest.approx(20 * np.log10(0.5), abs=0.2)


@pytest.mark.parametrize("hertz", [100, 997, 6000, 11_900, 16_100, 19_990])
def test_true_peak_never_reads_high_and_at_most_half_a_decibel_low(hertz):
    """Faded in and out: a tone cut off hard really rises between its last samples."""
    for phase in (0, 0.4, 0.8):
        sound = tone(0.5, hertz, 1.0, phase) * np.hanning(RATE // 2).astype(np.float32) ** 0.1
        assert -0.5 <= loudness.true_peak(sound) <= 0.02


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 4096 * 64 - 1, 4096 * 64 + 70])
def test_peak_envelope_equals_a_plain_oversampling_filter(samples):
    """Against a plain filter over the whole sound: blocks have no seams."""
    sound = noise(samples / RATE)
    taps = 4 * firwin(4 * 32 + 1, 1 / 4, window=("kaiser", 9.0))
    dense = np.abs(upfirdn(taps, sound.astype(np.float64), up=4))[:, 64 : 64 + 4 * samples]
    expected = dense.max(0).reshape(-1, 4).max(1)
    expected = np.maximum(expected, np.abs(sound).max(0))
    assert np.allclose(loudness.peak_envelope(sound), expected, atol=2e-6)


@pytest.mark.parametrize("bpm", [60, 75, 90, 100, 110, 128, 140, 160, 174])
def test_tempo_is_found_or_its_double_or_half(bpm):
    found, sure = analysis.tempo(band(16, bpm))
    assert sure
    assert min(abs(found / (bpm * ratio) - 1) for ratio in (0.5, 1, 2)) < 0.01


def test_tempo_is_compared_with_the_requested_one():
    sound = band(12, 100)
    found = {
        asked: analysis.check(sound, song(bpm=asked)).tempo for asked in (100, 103, 50, 200, 80)
    }
    assert [found[asked].verdict for asked in (100, 103, 50, 200, 80)] == [
        *("as asked", "as asked", "double", "half", "other")
    ]
    assert found[80].asked == 80
    assert found[80].measured == pytest.approx(100, abs=0.5)
    nothing = analysis.check(sound, song()).tempo
    assert (nothing.asked, nothing.verdict) == (None, "not asked")
    assert nothing.measured == pytest.approx(100, abs=0.5)


def hits(jitter_s, seed=3):
    """Thirty seconds of clicks every half second, each late or early by chance."""
    dice = np.random.default_rng(seed)
    sound = silence(30)
    for beat in range(1, 59):
        at = round((beat / 2 + jitter_s * dice.standard_normal()) * RATE)
        sound[:, at : at + 2000] += (
            0.5 * np.exp(-np.arange(2000) / 300) * dice.standard_normal(2000)
        )
    return sound


def test_unsteady_playing_still_has_a_tempo():
    found, sure = analysis.tempo(hits(0.01))
    assert sure
    assert found == pytest.approx(120, rel=0.01)


BEATLESS = {
    "noise": lambda: noise(12),
    "held chord": lambda: tone(12, 220, 0.2) + tone(12, 277.2, 0.2),
    "swelling chord": lambda: tone(12, 220, 0.3) * (1 + tone(12, 0.13, 0.9)),
    "hits at random": lambda: hits(2.0),
    "too short": lambda: band(3),
    "a click": lambda: joined(silence(6), noise(0.01), silence(6)),
}


@pytest.mark.parametrize("name", BEATLESS)
def test_tempo_without_a_beat_is_not_reported(name):
    found = analysis.check(BEATLESS[name](), song(bpm=120)).tempo
    assert found == analysis.Tempo(asked=120, measured=None, verdict="not sure")


@pytest.mark.parametrize("mode", ["major", "minor"])
def test_every_key_is_found_with_drums(mode):
    for tonic, name in enumerate(analysis.KEY_NAMES[mode]):
        assert analysis.key(band(8, 120, tonic, mode)) == (f"{name} {mode}", True)
        assert f"{name} {mode}" in KEYS


def test_key_is_compared_with_the_requested_one():
    sound = band(12, 120, 9, "minor")
    cases = {
        "A minor": ("A minor", "as asked"),
        "C major": ("A minor", "relative"),
        "B# major": ("A minor", "relative"),
        "E minor": ("A minor", "other"),
        "A major": ("A minor", "other"),
        "": ("A minor", "not asked"),
    }
    for asked, expected in cases.items():
        found = analysis.check(sound, song(keyscale=asked)).key
        assert (found.measured, found.verdict) == expected
        assert found.asked == (asked or None)
    flat = analysis.check(band(12, 120, 1, "major"), song(keyscale="C# major")).key
    assert (flat.measured, flat.verdict) == ("C# major", "as asked"), (
        "the requested spelling is kept"
    )


@pytest.mark.parametrize(
    "sound",
    [noise(8), band(8, chords=0), noise(0.1)],
    ids=["noise", "drums", "short"],
)
def test_key_without_tones_is_not_reported(sound):
    found = analysis.check(sound, song(keyscale="A minor")).key
    assert found == analysis.Key(asked="A minor", measured=None, verdict="not sure")


@pytest.mark.parametrize("seconds", [12, 0])
@pytest.mark.parametrize("level", [0.0, 10 ** (-80 / 20)])
def test_silence_has_neither_tempo_nor_key(seconds, level):
    """Also where the little that is there would have a beat."""
    check = analysis.check(band(seconds) * np.float32(level), song(bpm=120, keyscale="A minor"))
    assert check.tempo == analysis.Tempo(asked=120, measured=None, verdict="silence")
    assert check.key == analysis.Key(asked="A minor", measured=None, verdict="silence")
    nothing_requested = analysis.check(silence(seconds), song())
    assert nothing_requested.tempo.verdict == nothing_requested.key.verdict == "silence"


def test_holes_are_inside_longer_than_a_second_and_silent():
    music, hum = noise(2), noise(1.5, 10 ** (-70 / 20))
    sound = joined(silence(3), music, silence(1.5), music, silence(0.9), music, hum, music)
    sound = joined(sound, silence(3))
    assert [(h.start_s, h.length_s) for h in analysis.holes(sound)] == [
        (5.0, 1.5),
        (11.4 - 0.0, 1.5),
    ]
    soft = noise(1.5, 10 ** (-50 / 20))
    assert analysis.holes(joined(music, soft, music)) == ()
    assert analysis.holes(silence(5)) == analysis.holes(silence(0)) == ()


def test_flat_tops_are_counted_whatever_their_level():
    clean = tone(1, 997, 0.9)
    assert analysis.clipped(clean) == 0
    cut = np.clip(clean, -0.5, 0.5)
    edges = np.abs(cut) == np.float32(0.5)
    assert analysis.clipped(cut) == edges.sum() > 1000
    assert analysis.clipped(cut * np.float32(0.37)) == edges.sum()
    one_side = clean.copy()
    one_side[0] = np.minimum(one_side[0], 0.8)
    assert analysis.clipped(one_side) == 0, "the left is cut below the sound's peak, on the right"
    assert analysis.clipped(silence(1)) == analysis.clipped(silence(0)) == 0


@pytest.mark.parametrize("hertz", [25, 30, 55, 440])
def test_a_low_note_in_16_bit_is_not_clipped(hertz):
    coarse = np.round(tone(1, hertz, 0.9) * 32767) / 32767
    assert analysis.clipped(coarse.astype(np.float32)) <= 0.002 * RATE * hertz


def test_check_reports_every_measurement():
    sound = joined(band(6, 120), silence(1.5), np.clip(band(6, 120) * 9, -0.8, 0.8))
    found = analysis.check(sound, song(bpm=120, keyscale="A minor"))
    assert found.loudness_lufs == pytest.approx(loudness.loudness(sound), abs=0.01)
    assert found.true_peak_dbtp > 20 * np.log10(0.8)
    assert len(found.holes) == 1
    assert found.clipped > 100
    assert analysis.Check.model_validate_json(found.model_dump_json()) == found


def test_a_check_costs_little():
    """240 s in under 3 s of one core: a quarter of that is measured here."""
    sound = band(60)
    analysis.check(sound[:, :RATE], song())
    before = time.process_time()
    analysis.check(sound, song(bpm=120, keyscale="A minor"))
    assert time.process_time() - before < 1.5


@pytest.mark.slow
def test_output_of_the_embedded_model_can_be_checked(engine):
    piece = drain(engine.text_to_music(song(bpm=90, keyscale="C major")))
    found = analysis.check(piece.sound, song(bpm=90, keyscale="C major"))
    assert -60 < found.loudness_lufs < 0
    assert found.tempo.verdict in ("as asked", "double", "half", "other", "not sure")
    assert found.key.verdict in ("as asked", "relative", "other", "not sure")
