"""Interface texts: one help text per parameter, ranges from the parameters, honest time left."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import tooltips
from core.music import LANGUAGES, TIME_SIGNATURES
from core.params import Param
from core.requests import EXPORTS, HELPERS, MODES, SONGS, Generate, Lyrics
from core.results import Progress
from web import summaries

REQUESTS = SONGS | HELPERS | EXPORTS | {Lyrics.mode: Lyrics}
PARAMS = {(mode, k.name): k for mode, request in REQUESTS.items() for k in request.params()}


def test_every_parameter_has_one_help_text():
    for mode, name in PARAMS:
        assert tooltips.HELP.keys() & {name, f"{mode}.{name}"}, f"no help for {name}"
    names = {name for _, name in PARAMS} | {f"{mode}.{name}" for mode, name in PARAMS}
    assert tooltips.HELP.keys() <= names, "help for a parameter that does not exist"


def test_every_mode_has_its_texts():
    assert tooltips.MODES.keys() == tooltips.GETTING_STARTED.keys()
    assert tooltips.MODES.keys() == MODES.keys() | {Lyrics.mode}
    assert tooltips.HELPERS.keys() == tooltips.HELPER_HELP.keys() == HELPERS.keys()


@pytest.mark.parametrize("name", tooltips.HELP)
def test_help_texts_are_short_sentences_without_numbers(name: str):
    text = tooltips.HELP[name]
    assert not any(c.isdigit() for c in text), "ranges come from the parameter"
    assert text[0].isupper()
    assert text.endswith(".")
    assert "!" not in text
    assert len(text) <= 100


@pytest.mark.parametrize("table", [tooltips.LABELS, tooltips.PLACEHOLDERS, tooltips.CHOICES])
def test_every_text_belongs_to_a_parameter(table: dict[str, object]):
    assert table.keys() <= {name for _, name in PARAMS}


def test_choice_labels_belong_to_existing_choices():
    by_name = {name: k for (_, name), k in PARAMS.items()}
    for name, called in tooltips.CHOICES.items():
        allowed = by_name[name].choices or (False, True)
        assert called.keys() <= set(allowed)


def test_languages_are_displayed_by_name_and_code():
    for code in LANGUAGES:
        shown = tooltips.choice_label("vocal_language", code)
        assert shown == tooltips.AUTO if code == "unknown" else shown.endswith(f" ({code})")
        assert len(shown) > len(code) + 3 or code == "unknown"


def test_time_signatures_are_displayed_as_fractions():
    assert [tooltips.choice_label("timesignature", m) for m in TIME_SIGNATURES] == [
        "2/4",
        "3/4",
        "4/4",
        "6/8",
    ]


def test_every_stage_has_a_displayed_text():
    files = [*ROOT.glob("*.py"), *(ROOT / "models").glob("*.py"), *(ROOT / "runtime").glob("*.py")]
    code = "".join(path.read_text("utf-8") for path in files)
    stages = set(re.findall(r'Progress\(\s*stage="([^"]+)"', code))
    assert {"Reading the words", "Waiting", "Writing"} <= stages
    assert stages <= tooltips.STAGES.keys()


def test_help_text_ends_with_range_and_default():
    text = tooltips.help_text("generate", PARAMS["generate", "duration_s"])
    assert "5 to 600 s, default 30." in text
    assert "default automatic" in tooltips.help_text("generate", PARAMS["generate", "seed"])


@given(st.floats(0, 5000), st.floats(0, 5000))
def test_time_left_contains_the_expected_range(a: float, b: float):
    soonest, latest = sorted((a, b))
    text = tooltips.time_left((soonest, latest))
    unit = 60 if " min " in text else 1
    numbers = [int(part) * unit for part in text.split() if part.isdigit()]
    low, high = (0, numbers[0]) if text.startswith("up to") else (numbers[0], numbers[-1])
    assert low <= soonest
    assert latest <= high


def test_time_left_without_an_estimate():
    assert tooltips.time_left(None) == tooltips.MEASURING
    assert tooltips.time_left((20.0, 35.0)) == "about 20 to 35 s left"
    assert tooltips.time_left((0.2, 3.0)) == "up to 3 s left"


def test_progress_line_has_stage_count_and_times():
    event = Progress(stage="Denoising", step=3, steps=27, elapsed_s=7.9, left_s=(20, 35))
    assert tooltips.progress_line(event) == (
        "Generating audio · step 3 of 27 · 0:07 · about 20 to 35 s left"
    )
    waiting = Progress(stage="Waiting", step=2)
    assert "2 ahead of you" in tooltips.progress_line(waiting)
    fetching = Progress(stage="Fetching vae/model.safetensors", step=120, steps=2000)
    assert "120 of 2,000 MB" in tooltips.progress_line(fetching)


def test_values_are_displayed_with_units_and_labels():
    params: dict[str, Param] = {k.name: k for k in Generate.params()}
    assert summaries.display_value(params["bpm"], 92) == "92 bpm"
    assert summaries.display_value(params["duration_s"], 12.5) == "12.5 s"
    assert summaries.display_value(params["use_adg"], True) == "on"
    assert summaries.display_value(params["instrumental"], True) == "Instrumental"
    assert summaries.display_value(params["vocal_language"], "de") == "German (de)"


def test_every_text_is_used():
    files = [ROOT / f"{name}.py" for name in ("theme", "tooltips", "cli")]
    files += (ROOT / "web").glob("*.py")
    code = "".join(path.read_text("utf-8") for path in files)
    for name in vars(tooltips):
        if name.isupper() and name != "TYPE_CHECKING":
            assert len(re.findall(rf"\b{name}\b", code)) > 1, f"{name} is used nowhere"
