"""The tempo a planner hears, corrected by the one measured; the rest is in `test_modes`."""

from __future__ import annotations

import pytest

import thinking


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
    assert thinking._steadied(heard, measured, sure) == told
