"""Results in words: measurements, masters, loudness-matched playback."""

from __future__ import annotations

import numpy as np
import pytest
from fake_studio import CHECK, LOUDER

import tooltips
from audio import analysis, loudness
from core.requests import Generate
from core.results import ExportedFiles
from web import summaries


def test_a_check_tells_asked_and_measured_and_where_nobody_is_sure():
    told = {what: (asked, found) for what, asked, found in summaries.measurements(CHECK)}
    assert told["Tempo"] == ("92 bpm", "46 bpm (half)")
    assert told["Key"] == ("not set", "uncertain")
    assert told["Loudness"] == ("", "−18.4 LUFS")
    assert told["True peak"] == ("", "−3.1 dBTP")
    assert told["Silences"] == ("", "1.2 s at 0:07")
    assert told["Clipping"] == ("", "12 samples")
    sine = np.zeros((2, 48_000), np.float32)
    silent = analysis.check(sine, Generate.of({"prompt": "x"})).model_dump(mode="json")
    told = dict(row[::2] for row in summaries.measurements(silent))
    assert (told["Loudness"], told["Clipping"], told["Key"]) == ("silence", "none", "silence")
    assert summaries.measurements({}) == ()


def test_a_master_says_before_after_gain_peak_and_a_target_it_missed():
    said = summaries.export_summary(ExportedFiles(mode="master", paths=("a.wav",), facts=LOUDER))
    for part in ("−18.4 LUFS before", "−14.9 LUFS after", "gain +4.1 dB", "true peak −1.0 dBTP"):
        assert part in said
    assert "target of −14.0 LUFS was not reached" in said
    silent = {**LOUDER, "before_lufs": None, "after_lufs": None, "true_peak_dbtp": None}
    silent = ExportedFiles(mode="master", paths=("a.wav",), facts=silent)
    assert summaries.export_summary(silent) == tooltips.NOT_MASTERED


def test_the_louder_take_is_turned_down_and_none_is_turned_up():
    assert loudness.matching_gains([-14.2, -17.0]) == pytest.approx([-2.8, 0.0])
    assert loudness.matching_gains([None, -17.0]) == [0.0, 0.0]
