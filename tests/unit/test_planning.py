"""What is asked of the planner, and which tempo is believed; the rest is in `test_modes`."""

from __future__ import annotations

import pytest

from core.requests import MODES
from models import plan_format
from runtime import planning


@pytest.mark.parametrize(
    ("heard", "measured", "sure", "told"),
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
def test_a_sure_measuring_corrects_what_was_heard_but_not_its_octave(heard, measured, sure, told):
    assert planning.corrected_tempo(heard, measured, sure) == told


@pytest.mark.parametrize(
    ("mode", "given", "found"),
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
def test_a_style_that_was_given_is_kept_and_a_missing_one_is_found(mode, given, found):
    request = MODES[mode].of({"prompt": "warm lofi piano", "thinking": True, **given})
    assert ("caption" in plan_format.requested_fields(request)) == found
