"""Splices, their seams and waveforms. Everything here is at 48 kHz."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import levels, splice
from core.requests import SAMPLE_RATE

S = SAMPLE_RATE


def noise(seconds: float = 4.0, seed: int = 0, level: float = 0.1) -> np.ndarray:
    dice = np.random.default_rng(seed)
    return (level * dice.standard_normal((2, round(seconds * S)))).astype(np.float32)


def chord(seed: int, seconds: float = 4.0) -> np.ndarray:
    """Sustained tones, in which any click is audible."""
    dice = np.random.default_rng(seed)
    t = np.arange(round(seconds * S)) / S
    hz, phase = dice.uniform(80, 1200, 5), dice.uniform(0, 2 * np.pi, (2, 5))
    return (0.1 * np.sin(2 * np.pi * hz[:, None] * t + phase[:, :, None]).sum(1)).astype(np.float32)


def rms_db(sound: np.ndarray) -> float:
    return float(10 * np.log10(np.square(sound, dtype=np.float64).mean()))


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(2, 3000),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    fade=st.integers(0, 800),
    inside=st.booleans(),
    seed=st.integers(0, 99),
)
def test_samples_outside_the_region_and_its_fades_equal_the_source(total, ends, fade, inside, seed):
    start, end = sorted(round(e * total) for e in ends)
    if start == end:
        start, end = (start - 1, end) if start else (0, 1)
    source = np.clip(noise(total / S, seed, 0.4), -1, 1)
    made = noise(total / S, seed + 100, 0.5)
    kept, given_ = source.copy(), made.copy()
    result = splice.splice(source, made, start, end, fade, inside=inside)
    first, last = (start, end) if inside else (max(0, start - fade), min(total, end + fade))
    first, last = (first if start else 0), (last if end < total else total)
    assert result.shape == source.shape
    assert result.dtype == np.float32
    assert np.array_equal(result[:, :first].view(np.int32), source[:, :first].view(np.int32))
    assert np.array_equal(result[:, last:].view(np.int32), source[:, last:].view(np.int32))
    assert np.abs(result).max() <= 1.0
    assert np.array_equal(source, kept)
    assert np.array_equal(made, given_)
    low, high = (start + fade, end - fade) if inside else (start, end)
    low, high = (low if start else 0), (high if end < total else total)
    if high > low:  # between the fades it is the new sound at one level
        ratio = result[:, low:high] / made[:, low:high]
        assert np.ptp(ratio) < 1e-4 * np.abs(ratio).max()


@pytest.mark.parametrize("inside", [False, True])
def test_a_fade_keeps_the_level_of_unrelated_sounds_and_of_copies(inside):
    fade, at = S // 10, 2 * S
    middle = at + fade // 2 if inside else at - fade // 2
    near = slice(middle - S // 100, middle + S // 100)

    def rise(source, made):
        return rms_db(splice.splice(source, made, at, 4 * S, fade, inside=inside)[:, near]) + 20

    unrelated = np.mean([rise(noise(seed=i), noise(seed=i + 50)) for i in range(20)])
    copies = np.mean(
        [rise(noise(seed=i), noise(seed=i) + noise(seed=i + 50) / 20) for i in range(9)]
    )
    assert abs(unrelated) < 0.3
    assert abs(copies) < 0.1


def test_a_copy_changes_nothing_that_can_be_heard():
    sound = chord(1)
    spliced = splice.splice(sound, sound, S, 3 * S, S // 20)
    assert np.abs(spliced - sound).max() < 1e-6


@pytest.mark.parametrize(("start", "end"), [(0, 2 * S), (2 * S, 4 * S), (S, 3 * S), (0, 4 * S)])
def test_there_is_no_fade_at_an_end_of_the_timeline(start, end):
    source, made = noise(seed=1), noise(seed=2)
    spliced = splice.splice(source, made, start, end, S // 10)
    gain = spliced[0, (start + end) // 2] / made[0, (start + end) // 2]
    if start == 0:
        assert np.allclose(spliced[:, :100], gain * made[:, :100], rtol=1e-5)
    if end == 4 * S:
        assert np.allclose(spliced[:, -100:], gain * made[:, -100:], rtol=1e-5)
    if start == 0 and end == 4 * S:
        assert gain == 1.0


def test_a_splice_of_reversed_sound_is_the_reversed_splice():
    source, made = noise(seed=1), noise(seed=2)
    there = splice.splice(source, made, S, 3 * S, 2000)
    back = splice.splice(source[:, ::-1], made[:, ::-1], S, 3 * S, 2000)[:, ::-1]
    assert np.abs(there - back).max() < 1e-6


@pytest.mark.parametrize(
    ("quieter", "left_db"), [(1.0, 0.0), (0.6, 0.0), (1.9, 0.0), (0.1, -14.0), (6.0, 9.6)]
)
def test_the_new_part_is_matched_in_level_within_bounds(quieter, left_db):
    source = noise(seed=1, level=0.02)
    spliced = splice.splice(source, source * np.float32(quieter), 2 * S, 4 * S, 2000)
    assert rms_db(spliced[:, 3 * S :]) - rms_db(source) == pytest.approx(left_db, abs=0.1)


def test_the_level_is_compared_beside_the_seam_only():
    """A loud chorus after a quiet verse stays loud."""
    source, made = noise(seed=1, level=0.02), noise(seed=1, level=0.02)
    made[:, 2 * S :] *= 8
    spliced = splice.splice(source, made, 2 * S, 4 * S, 2000)
    assert rms_db(spliced[:, 3 * S :]) - rms_db(source[:, 3 * S :]) == pytest.approx(18, abs=0.3)


@pytest.mark.parametrize("level", [0.0, 1e-4])
def test_silence_beside_the_seam_changes_no_level(level):
    made = noise(seed=2)
    spliced = splice.splice(noise(level=level), made, 2 * S, 4 * S, 2000)
    assert np.array_equal(spliced[:, 2 * S :], made[:, 2 * S :])
    assert np.isfinite(spliced).all()


def test_no_sample_passes_full_scale():
    for seed in range(10):
        loud = [np.clip(chord(seed + i) * 9, -1, 1) for i in (0, 50)]
        spliced = splice.splice(loud[0], loud[1] * 3, S, 3 * S, S // 10)
        assert np.abs(spliced).max() <= 1.0
        assert (np.abs(spliced[:, S + 1 : 3 * S - 1]) < 1.0).mean() > 0.5, "scaled, not clipped"


def test_a_source_above_full_scale_is_held_to_it_within_the_fade():
    source = noise(1, 3) * 40
    spliced = splice.splice(source, noise(1, 4), S // 2, S, 4000)
    assert np.abs(spliced[:, S // 2 - 4000 :]).max() <= 1.0
    assert np.abs(spliced).max() > 1.0


def test_a_fade_next_to_full_scale_is_scaled_not_clipped():
    source, made = (np.sign(noise(1, seed)).astype(np.float32) * 0.99 for seed in (1, 2))
    spliced = splice.splice(source, made, S // 2, S, 4000)
    assert np.abs(spliced).max() <= 1.0
    assert (np.abs(spliced) >= 0.9999).mean() < 4e-3


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 5), (6, 5), (0, 4 * S + 1)])
def test_impossible_regions_are_refused(start, end):
    with pytest.raises(ValueError, match="cannot put"):
        splice.splice(noise(), noise(), start, end, 10)
    with pytest.raises(ValueError, match="cannot put"):
        splice.splice(noise(), noise(3), 0, 10, 10)


AT = 2 * S


def seam_of(sound: np.ndarray, half_ms: float = 0) -> splice.Seam:
    return splice.measure_seam(sound, AT, round(half_ms * S / 1000), S)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fade_ms", [20, 50, 100])
def test_a_splice_in_sustained_tones_is_good(seed, fade_ms):
    fade = fade_ms * S // 1000
    spliced = splice.splice(chord(seed), chord(seed + 99), AT + fade // 2, 4 * S, fade)
    found = seam_of(spliced, fade_ms / 2)
    assert found.good, found


@pytest.mark.parametrize("make", [chord, lambda seed: noise(seed=seed)])
def test_untouched_sound_has_no_seam(make):
    for seed in range(20):
        found = seam_of(make(seed), 50)
        assert found.good, found
        assert found.click <= 1.6


@pytest.mark.parametrize("seed", range(12))
def test_a_hard_cut_in_sustained_tones_is_found(seed):
    cut = np.concatenate([chord(seed)[:, :AT], chord(seed + 99)[:, AT:]], 1)
    found = seam_of(cut)
    assert not found.good
    assert found.click > splice.CLICK_RATIO


def test_a_cut_anywhere_within_the_fade_is_found():
    for offset in (-2000, -777, 1234, 2300):
        place = AT + offset
        cut = np.concatenate([chord(1)[:, :place], chord(99)[:, place:]], 1)
        assert seam_of(cut, 50).click > splice.CLICK_RATIO
        assert seam_of(cut, 5).click < splice.CLICK_RATIO


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", [chord, lambda seed: noise(seed=seed)])
def test_a_gap_of_twenty_ms_is_found(seed, make):
    holed = make(seed)
    holed[:, AT - S // 100 : AT + S // 100] = 0
    found = seam_of(holed)
    assert not found.good
    assert found.gap_db < -40


@pytest.mark.parametrize("make", [chord, lambda seed: noise(seed=seed)])
def test_a_bump_is_found(make):
    bulging = make(1)
    hump = 1 + 2 * np.hanning(S // 5).astype(np.float32)
    bulging[:, AT - S // 10 : AT + S // 10] *= hump
    found = seam_of(bulging, 50)
    assert not found.good
    assert found.bump_db > splice.BUMP_DB


def test_a_seam_can_be_measured_anywhere():
    for sound in (chord(1), np.zeros((2, S), np.float32), chord(1, 0.05), chord(1, 0.001)):
        for at in (0, 1, sound.shape[1] // 2, sound.shape[1] - 1, sound.shape[1]):
            found = splice.measure_seam(sound, at, 500, S)
            assert all(np.isfinite(found[:3]))
            assert type(found.good) is bool


def test_a_waveform_has_the_lowest_and_highest_sample_of_each_part():
    sound = noise(1.0, 4)
    picture = np.array(levels.waveform_peaks(sound, 100)).reshape(100, 2)
    stretches = sound.reshape(2, 100, -1)
    assert np.allclose(picture[:, 0], stretches.min((0, 2)), atol=1e-4)
    assert np.allclose(picture[:, 1], stretches.max((0, 2)), atol=1e-4)


@pytest.mark.parametrize("samples", [0, 1, 3, 99, 100, 101, 4801])
def test_a_waveform_has_the_requested_width_and_the_peak(samples):
    sound = noise(1.0, 5)[:, :samples]
    picture = levels.waveform_peaks(sound, 100)
    assert len(picture) == 200
    assert all(type(value) is float for value in picture)
    assert max(picture) == pytest.approx(sound.max(initial=-9) if samples else 0, abs=1e-4)


@pytest.mark.parametrize("level", [0.003, 0.1])
def test_what_is_added_to_a_quiet_song_keeps_the_ceiling(level):
    """Without it the new part may reach full scale, 1 dB above every other take."""
    source = np.pad(noise(2, 1, level), ((0, 0), (0, 2 * S)))
    made = np.pad(noise(2, 2, level), ((0, 0), (0, 2 * S)))
    made[:, 2 * S :] = np.clip(noise(2, 3, 0.6), -1.5, 1.5)
    added = splice.splice(source, made, 2 * S, 4 * S, S // 10, ceiling=levels.CEILING)
    assert np.abs(added[:, 2 * S :]).max() == pytest.approx(levels.CEILING, rel=1e-6)
    assert np.abs(splice.splice(source, made, 2 * S, 4 * S, S // 10)).max() == pytest.approx(1.0)
    kept = 2 * S - S // 10
    assert np.array_equal(added[:, :kept], source[:, :kept])
    assert levels.note_above_ceiling(source) is None


def test_a_source_above_the_ceiling_keeps_its_samples_and_says_so():
    source = np.pad(np.clip(noise(2, 1, 0.6), -1, 1), ((0, 0), (0, 2 * S)))
    made = noise(4, 2, 0.6)
    added = splice.splice(source, made, 2 * S, 4 * S, S // 10, ceiling=levels.CEILING)
    kept = 2 * S - S // 10
    assert np.array_equal(added[:, :kept], source[:, :kept])
    assert np.abs(added[:, kept:]).max() <= 1.0
    assert np.abs(added[:, 2 * S :]).max() <= levels.CEILING * (1 + 1e-6)
    assert "peaks at 0.0 dBFS" in levels.note_above_ceiling(source)
    assert levels.note_above_ceiling(np.zeros((2, 9), np.float32)) is None


def test_equal_sounds_above_the_ceiling_crossfade_without_a_warning(recwarn):
    sound = np.full((2, S), 0.95, np.float32)
    added = splice.splice(sound, sound, S // 2, S, 2000, ceiling=levels.CEILING)
    assert np.isfinite(added).all()
    assert not recwarn.list
