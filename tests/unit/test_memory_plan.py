"""Which cards play what: every row of the table, and the estimates behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime import memory_plan
from runtime.memory_plan import OFFLOADS, PLANNERS, PRECISIONS, TWO_B, XL, plan

SMALL, MIDDLE, LARGE = (PLANNERS[name] for name in ("0.6B", "1.7B", "4B"))

ROWS = [
    # device, GB, model, planner: precision, offload, planner in turn, fits
    (("cuda", 80, XL, LARGE), ("bf16", "none", False, True)),
    (("cuda", 24, XL, LARGE), ("bf16", "none", False, True)),
    (("cuda", 16, XL, MIDDLE), ("bf16", "none", True, True)),
    (("cuda", 12, XL, MIDDLE), ("bf16", "encoders", True, True)),
    (("cuda", 8, XL, SMALL), ("int8", "encoders", True, True)),
    (("cuda", 6, XL, SMALL), ("int8", "blocks", True, True)),
    (("cuda", 8, TWO_B, SMALL), ("bf16", "none", True, True)),
    (("cuda", 6, TWO_B, SMALL), ("bf16", "encoders", True, True)),
    (("xpu", 16, XL, MIDDLE), ("bf16", "none", True, True)),
    (("mps", 16, TWO_B, SMALL), ("float32", "encoders", True, True)),
    (("mps", 16, TWO_B, 0), ("float32", "encoders", False, True)),
    (("mps", 24, TWO_B, SMALL), ("float32", "none", False, True)),
    (("mps", 16, XL, SMALL), ("float32", "encoders", True, False)),
    (("mps", 32, XL, MIDDLE), ("float32", "none", True, True)),
    (("mps", 64, XL, MIDDLE), ("float32", "none", False, True)),
    (("cpu", 64, XL, SMALL), ("float32", "none", False, True)),
    (("cpu", 32, XL, MIDDLE), ("float32", "none", True, True)),
    (("cpu", 16, XL, SMALL), ("int8", "none", True, True)),
    (("cpu", 8, XL, SMALL), ("int8", "encoders", True, False)),
]


@pytest.mark.parametrize(("given", "expected"), ROWS)
def test_the_plan_of_every_card(given, expected):
    device, memory_gb, sizes, planner = given
    found = plan(device, memory_gb, replace(sizes, planner=planner))
    chosen = (found.precision, found.offload, found.planner_in_turn, found.fits)
    assert chosen == expected, found
    assert f"{found.needed_gb:.1f}" in found.reason
    assert ("smaller model" in found.reason) != found.fits


@pytest.mark.parametrize("memory_gb", [6, 8, 12, 16, 24])
def test_without_int8_a_card_still_has_a_plan(memory_gb):
    found = plan("cuda", memory_gb, replace(XL, planner=SMALL), int8_available=False)
    assert found.fits
    assert found.precision == "bf16"
    assert ("torchao" in found.reason) == (found.offload == "blocks") == (memory_gb < 12)


def test_more_memory_never_makes_a_plan_less_exact_or_unfit():
    best, fitted = ("int8", "bf16"), False
    for memory_gb in range(2, 81):
        found = plan("cuda", memory_gb, replace(XL, planner=MIDDLE))
        assert found.precision in best
        assert found.fits or not fitted
        best, fitted = best[best.index(found.precision) :], found.fits
    assert (best, found.offload, found.planner_in_turn) == (("bf16",), "none", False)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_is_asked_for_is_kept_even_where_it_does_not_fit(precision, offload):
    for memory_gb in (4, 80):
        found = plan("cuda", memory_gb, XL, precision=precision, offload=offload)
        assert (found.precision, found.offload) == (precision, offload)
    assert found.fits


def test_tiles_shrink_before_anything_is_offloaded():
    whole = plan("cuda", 80, XL)
    tight = plan("cuda", (whole.needed_gb - 0.2) / memory_plan.USABLE_GPU, XL)
    assert (whole.tile, tight.tile) == (256, 128)
    assert (tight.precision, tight.offload) == (whole.precision, whole.offload)


def test_float32_is_counted_by_its_own_size():
    wide = plan("mps", 128, XL).needed_gb
    assert wide > 2 * plan("cuda", 128, XL, precision="bf16").needed_gb - 2


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="int4"):
        plan("cuda", 8, XL, precision="int4")
