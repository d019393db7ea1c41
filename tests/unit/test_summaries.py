"""Result summaries: measurements, mastering, loudness-matched playback."""

from __future__ import annotations

import numpy as np
import pytest
from fake_studio import CHECK, LOUDER

import tooltips
from audio import analysis, loudness
from core.requests import Generate
from core.results import ExportedFiles
from web import summaries


def test_measurements_show_requested_and_measured_values_and_uncertainty():
    rows = {
        name: (requested, measured) for name, requested, measured in summaries.measurements(CHECK)
    }
    assert rows["Tempo"] == ("92 bpm", "46 bpm (half)")
    assert rows["Key"] == ("not set", "uncertain")
    assert rows["Loudness"] == ("", "−18.4 LUFS")
    assert rows["True peak"] == ("", "−3.1 dBTP")
    assert rows["Silences"] == ("", "1.2 s at 0:07")
    assert rows["Clipping"] == ("", "12 samples")
    sine = np.zeros((2, 48_000), np.float32)
    silent = analysis.check(sine, Generate.of({"prompt": "x"})).model_dump(mode="json")
    rows = dict(row[::2] for row in summaries.measurements(silent))
    assert (rows["Loudness"], rows["Clipping"], rows["Key"]) == ("silence", "none", "silence")
    assert summaries.measurements({}) == ()


def test_master_summary_shows_loudness_gain_peak_and_a_missed_target():
    summary = summaries.export_summary(ExportedFiles(mode="master", paths=("a.wav",), facts=LOUDER))
    for part in ("−18.4 LUFS before", "−14.9 LUFS after", "gain +4.1 dB", "true peak −1.0 dBTP"):
        assert part in summary
    assert "target of −14.0 LUFS was not reached" in summary
    silent = {**LOUDER, "before_lufs": None, "after_lufs": None, "true_peak_dbtp": None}
    silent = ExportedFiles(mode="master", paths=("a.wav",), facts=silent)
    assert summaries.export_summary(silent) == tooltips.NOT_MASTERED


def test_matching_gains_lower_the_louder_take_and_raise_none():
    assert loudness.matching_gains([-14.2, -17.0]) == pytest.approx([-2.8, 0.0])
    assert loudness.matching_gains([None, -17.0]) == [0.0, 0.0]
