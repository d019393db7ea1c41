"""Fields requested from the planner, and tempo correction; the rest is in `test_modes`."""

from __future__ import annotations

import pytest

from core.requests import MODES
from models import plan_format
from runtime import planning


@pytest.mark.parametrize(
    ("detected", "measured", "sure", "expected"),
    [
        (None, 120.0, True, None),
        (97, None, False, 97),
        (97, 120.0, False, 97),
        (97, 120.0, True, 120),
        (119, 120.4, True, 120),
        (62, 120.0, True, 60),
        (238, 120.0, True, 240),
        (97, 310.0, True, 97),
    ],
)
def test_certain_measurement_corrects_detected_tempo_but_not_its_octave(
    detected, measured, sure, expected
):
    assert planning.corrected_tempo(detected, measured, sure) == expected


@pytest.mark.parametrize(
    ("mode", "given", "requested"),
    [
        ("generate", {"use_cot_caption": True}, True),
        ("generate", {}, False),
        ("cover", {"source": "a.wav"}, False),
        ("cover", {"source": "a.wav", "prompt": " "}, True),
        ("cover", {"source": "a.wav", "prompt": " ", "use_cot_caption": False}, False),
        ("edit", {"source": "a.wav", "kind": "morph"}, True),
        ("edit", {"source": "a.wav", "kind": "morph", "source_prompt": "house"}, False),
    ],
)
def test_caption_is_requested_only_where_the_style_is_missing_or_rewriting_is_on(
    mode, given, requested
):
    request = MODES[mode].of({"prompt": "warm lofi piano", "thinking": True, **given})
    assert ("caption" in plan_format.requested_fields(request)) == requested
