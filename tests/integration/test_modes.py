"""Every mode with a planner: what reaches the transformer, and what the take contains.

The planner has random weights: its plans are nonsense, but valid and repeatable.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_sound
from planned_studio import STEADY

import backend
import pipeline
from core.files import private_folder
from core.requests import HELPERS, MODES, SAMPLE_RATE
from core.results import Failed, Idea, Take
from models import catalog, plan_grammar
from models.acestep import TEXT_TO_MUSIC, Engine
from runtime import device


@pytest.fixture(scope="module")
def run_and_digest(planned, files):
    """Runs a request; returns its last event and one hash of all transformer inputs."""
    assert isinstance(run(planned, "generate", prompt="x", duration_s=10), Take)
    (engine,) = [v for k, v in planned.runner.models._loaded.items() if k[0] == planned.setup.model]

    def run_and_hash(mode: str, **given):
        digest = hashlib.sha256()

        def record(_module, args, kwargs):
            for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
                if isinstance(value, torch.Tensor):
                    digest.update(str(tuple(value.shape)).encode())
                    digest.update(value.float().contiguous().numpy().tobytes())

        hook = engine.pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
        try:
            return run(planned, mode, **given), digest.hexdigest()
        finally:
            hook.remove()

    return run_and_hash


def run(studio, mode: str, **given):
    request = {**MODES, **HELPERS}[mode]
    base = STEADY if mode in MODES else {"seed": 7}
    return list(studio.run(request.of({**base, **given}), "v"))[-1]


BASES = {
    "generate": {"prompt": "warm lofi piano", "duration_s": 10},
    "cover": {},
    "extend": {"after_s": 2.0},
    "edit": {"start_s": 1.0, "end_s": 2.0, "inference_steps": 4},
}
SHARED = {
    "prompt": "bright house piano",
    "lyrics": "[verse]\nslow rain",
    "instrumental": True,
    "inference_steps": 5,
    "guidance_scale": 6.0,
    "infer_method": "sde",
    "seed": 8,
    "cfg_interval_start": 0.5,
    "cfg_interval_end": 0.5,
    "shift": 3.0,
    "use_adg": True,
    "thinking": False,
    "use_cot_caption": True,
    "use_cot_metas": False,
    "use_cot_language": False,
    "lm_temperature": 1.9,
    "lm_top_p": 0.2,
    "lm_top_k": 1,
    "lm_cfg_scale": 4.0,
    "lm_negative_prompt": "noise",
    "bpm": 140,
    "keyscale": "A minor",
    "timesignature": "6",
    "vocal_language": "de",
    "adapters": ["adapter"],
}
MODE_FIELDS = {
    "generate": {"duration_s": 11.0, "reference": "other"},
    "cover": {"source": "other", "reference": "other", "strength": 0.5, "noise": 0.5}
    | {"follow": "latents"},
    "extend": {"source": "other", "before_s": 1.0, "after_s": 3.0},
    "edit": {
        "source": "other",
        "kind": "morph",
        "start_s": 0.5,
        "end_s": 2.5,
        "repaint_mode": "conservative",
        "repaint_strength": 0.0,
    },
}
MORPH = {
    "source_prompt": "dark drone",
    "source_lyrics": "oh",
    "n_min": 0.5,
    "n_max": 0.6,
    "n_avg": 2,
}
TRACK_FIELDS = {"track", "tracks"}
"""Parameters of what only a base model can do."""
COMPOSING_ONLY = {"lm_cfg_scale", "lm_negative_prompt"}
"""Parameters of code composition; analysing a source composes nothing."""


def fields_of(mode: str, files, **changes) -> dict:
    """Fields of a mode's base request with `changes`; file names become paths."""
    given = {**({} if mode == "generate" else {"source": "song"}), **BASES[mode], **changes}
    given = {k: files[v] if k in ("source", "reference") else v for k, v in given.items()}
    return {k: [files[n] for n in v] if k == "adapters" else v for k, v in given.items()}


CHANGES = [
    (mode, name, value)
    for mode in MODES
    for name, value in {**SHARED, **MODE_FIELDS[mode]}.items()
    if mode == "generate" or name not in COMPOSING_ONLY
]


def test_changes_cover_every_parameter_of_every_mode():
    for mode, request in MODES.items():
        declared = {k.name for k in request.params()}
        morph = set(MORPH) if mode == "edit" else set()
        source_free = {"duration_s"} if mode == "cover" else set()
        lyrics = {"use_cot_lyrics"} if mode in ("cover", "edit") else set()
        tracks = TRACK_FIELDS if mode == "edit" else set()
        known = set(SHARED) | set(MODE_FIELDS[mode]) | {"fast_preview"}
        assert declared == known | morph | source_free | lyrics | tracks


@pytest.fixture(scope="module")
def base_digests(run_and_digest, files):
    """Hash of the transformer inputs of each mode's base request."""
    return {mode: run_and_digest(mode, **fields_of(mode, files))[1] for mode in MODES}


@pytest.mark.parametrize(("mode", "name", "value"), CHANGES)
def test_changing_a_parameter_changes_transformer_inputs(
    run_and_digest, base_digests, files, mode, name, value
):
    extra = {"prompt": "chimes"} if value == "morph" else {}
    ending, digest = run_and_digest(mode, **fields_of(mode, files, **{name: value}, **extra))
    assert isinstance(ending, Take), ending
    assert digest != base_digests[mode]


@pytest.mark.parametrize("name", MORPH)
def test_changing_a_morph_parameter_changes_transformer_inputs(run_and_digest, files, name):
    base = fields_of("edit", files, kind="morph", prompt="chimes")
    assert (
        run_and_digest("edit", **base)[1]
        != run_and_digest("edit", **{**base, name: MORPH[name]})[1]
    )


@pytest.mark.parametrize("mode", ["generate", "edit"])
def test_fast_preview_changes_what_is_evaluated_and_calls_the_take_a_draft(
    run_and_digest, files, mode
):
    base = fields_of(mode, files, inference_steps=8)
    _, every = run_and_digest(mode, **base)
    take, some = run_and_digest(mode, **base, fast_preview=True)
    assert some != every
    assert take.request["fast_preview"] is True
    assert any(note.startswith("Draft: Fast preview") for note in take.notes)


@pytest.mark.parametrize(
    ("mode", "changes"),
    [("generate", {"infer_method": "heun"}), ("edit", {"kind": "morph", "prompt": "chimes"})],
)
def test_fast_preview_is_off_where_steps_cannot_be_estimated(run_and_digest, files, mode, changes):
    base = fields_of(mode, files, **changes)
    _, every = run_and_digest(mode, **base)
    take, same = run_and_digest(mode, **base, fast_preview=True)
    assert same == every
    assert take.request["fast_preview"] is False
    assert any("Fast preview was turned off" in note for note in take.notes)


@pytest.mark.parametrize("mode", ["cover", "edit"])
def test_detected_lyrics_reach_the_model_and_the_take(run_and_digest, files, mode, monkeypatch):
    monkeypatch.setattr(plan_grammar, "DETECTED_LYRIC_TOKENS", 24)
    base = fields_of(mode, files, lyrics="")
    instrumental, before = run_and_digest(mode, **base)
    take, after = run_and_digest(mode, **base, use_cot_lyrics=True)
    assert after != before
    assert take.plan["lyrics"]
    assert "lyrics" not in instrumental.plan
    assert any("No lyrics were given" in note for note in instrumental.notes)
    assert not any("No lyrics were given" in note for note in take.notes)


def test_analysis_transcribes_lyrics_only_on_request(planned, files, monkeypatch):
    monkeypatch.setattr(plan_grammar, "DETECTED_LYRIC_TOKENS", 24)
    assert run(planned, "listen", source=files["song"], transcribe=True).lyrics
    assert not run(planned, "listen", source=files["song"]).lyrics


def test_cover_without_source_has_the_requested_length(run_and_digest, files):
    for seconds in (10.0, 11.5):
        take, _ = run_and_digest("cover", reference=files["song"], duration_s=seconds)
        assert take.samples == seconds * SAMPLE_RATE


@pytest.mark.parametrize("mode", ["cover", "extend", "edit"])
def test_composing_parameter_without_effect_is_noted(run_and_digest, base_digests, files, mode):
    take, digest = run_and_digest(mode, **fields_of(mode, files, lm_cfg_scale=4.0))
    assert digest == base_digests[mode]
    assert "Planner guidance was ignored" in take.notes[0]


@pytest.mark.parametrize("mode", MODES)
def test_same_request_gives_same_samples_plan_and_codes(planned, files, mode):
    one, two = (
        run(planned, mode, **fields_of(mode, files, use_cot_caption=True)) for _ in range(2)
    )
    assert np.array_equal(read_sound(one.path), read_sound(two.path))
    assert (one.plan, one.codes) == (two.plan, two.codes)
    assert one.plan


def test_take_contains_five_planner_codes_per_second(planned):
    take = run(planned, "generate", prompt="lofi", duration_s=10.5)
    assert len(take.codes) == 52
    assert take.samples == 504_000
    assert set(take.plan) == {"bpm", "duration", "keyscale", "language", "timesignature"}
    assert take.planner.name == planned.setup.planner.name
    assert len(take.planner.sha256) == 64


def test_fields_set_in_the_request_are_not_replaced_by_the_plan(planned, files):
    given = {"bpm": 77, "keyscale": "Eb minor", "timesignature": "3", "vocal_language": "fr"}
    take = run(planned, "generate", prompt="lofi", **given)
    assert take.plan["bpm"] == 77
    assert take.plan["keyscale"] == "Eb minor"
    cover = run(planned, "cover", source=files["song"], **given)
    assert not cover.plan, "every field was set, so nothing is detected"


@pytest.mark.parametrize(("name", "rate"), [("song", 48_000), ("mono", 44_100)])
@pytest.mark.parametrize(("before_s", "after_s"), [(0, 2.0), (1.25, 0), (0.5, 1.5)])
def test_extension_has_requested_length_and_keeps_source_samples(
    planned, files, name, rate, before_s, after_s
):
    take = run(planned, "extend", source=files[name], before_s=before_s, after_s=after_s)
    sound = read_sound(take.path)
    source = planned._uploads.read(files[name])
    before, after = round(before_s * SAMPLE_RATE), round(after_s * SAMPLE_RATE)
    assert sound.shape[1] == before + source.samples + after == take.samples
    fade = round(0.05 * SAMPLE_RATE)
    kept = np.load(source.sound)[:, (before and fade) : source.samples - (after and fade)]
    stayed = sound[:, before + (before and fade) :][:, : kept.shape[1]]
    tolerance = 0 if rate == 48_000 else 2**-23  # 24 bits in the file
    assert np.abs(stayed - kept).max() <= tolerance
    assert take.changed_outside == 0
    assert len(take.seams) == bool(before) + bool(after)


def test_repaint_changes_no_sample_outside_the_region(planned, files):
    take = run(planned, "edit", source=files["song"], start_s=1.0, end_s=2.0)
    before, after = read_sound(files["song"]), read_sound(take.path)
    fade = round(0.025 * SAMPLE_RATE)
    outside = np.ones(before.shape[1], bool)
    outside[SAMPLE_RATE - fade : 2 * SAMPLE_RATE + fade] = False
    assert np.array_equal(before[:, outside], after[:, outside])
    assert not np.array_equal(before, after)
    assert take.changed_outside == 0
    assert [round(s.at_s, 2) for s in take.seams] == [0.99, 2.01]


def test_take_keeps_its_source_file_and_contains_no_path(planned, files, tmp_path):
    source_file = tmp_path / "my song.wav"
    source_file.write_bytes(files["song"].read_bytes())
    take = run(planned, "cover", source=source_file)
    digest = hashlib.sha256(source_file.read_bytes()).hexdigest()
    source_file.unlink()
    assert take.files == {"source": digest}
    sidecar = json.loads(Path(take.path).with_suffix(".json").read_text())
    assert sidecar["names"] == {"source": "my song.wav"}
    assert str(private_folder()) not in json.dumps(sidecar)
    again = list(planned.run(take.to_request(), "v"))[-1]
    assert np.array_equal(read_sound(again.path), read_sound(take.path))


def test_planner_helpers_return_repeatable_ideas(planned, files):
    for mode, given in {
        "inspire": {"idea": "rain", "instrumental": True},
        "rewrite": {"prompt": "rain", "lyrics": "la"},
        "listen": {"source": files["song"]},
    }.items():
        idea = run(planned, mode, **given)
        assert isinstance(idea, Idea)
        assert idea.prompt
        assert 30 <= idea.bpm <= 300
        assert run(planned, mode, **given) == idea
    assert run(planned, "inspire", idea="rain", seed=8) != run(planned, "inspire", idea="rain")


@pytest.mark.parametrize(
    ("mode", "given", "code"),
    [
        ("extend", {"source": "song", "after_s": 235.0, "before_s": 5.0}, "extended-too-long"),
        ("edit", {"source": "song", "start_s": 5.0}, "region-outside"),
        ("edit", {"source": "song", "start_s": 3.1999, "end_s": 3.2}, None),
        ("cover", {"source": Path("/etc/passwd")}, "source-unreadable"),
        ("cover", {"source": Path("/nowhere/song.wav")}, "source-missing"),
    ],
)
def test_invalid_source_requests_fail_with_code_and_leave_no_files(
    planned, files, mode, given, code
):
    if given["source"] == "song":
        given = {**given, "source": files["song"]}
    before = set(private_folder().glob("*/"))
    ending = run(planned, mode, **given)
    if code is None:
        assert isinstance(ending, Take), "a region of a few samples is valid"
        return
    assert isinstance(ending, Failed)
    assert ending.code == code
    assert "/" not in f"{ending.message} {ending.action}".replace("Before or After", "")
    assert set(private_folder().glob("*/")) == before


def test_without_planner_thinking_fails_and_model_info_gives_the_reason(own_cache):
    studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), "none")
    assert studio.model_info().planner == ""
    assert "--planner none" in studio.model_info().no_planner
    ending = run(studio, "generate", prompt="x")
    assert ending.code == "planner-missing"
    assert run(studio, "inspire", idea="x").code == "planner-missing"


@pytest.fixture
def base_model(planned, monkeypatch):
    """The studio as if its model were a base model, which edits tracks."""
    model = replace(planned.setup.model, edits_tracks=True)
    monkeypatch.setattr(planned, "setup", replace(planned.setup, model=model))
    return planned


@pytest.mark.parametrize(
    ("given", "instruction", "caption"),
    [
        (
            {"kind": "extract", "track": "backing_vocals"},
            "Extract the BACKING_VOCALS track from the audio:",
            "backing vocals",
        ),
        (
            {"kind": "add_track", "track": "Bass", "prompt": "a round bass"},
            "Generate the BASS track based on the audio context:",
            "a round bass",
        ),
        (
            {"kind": "accompany", "tracks": "Drums, backing vocals|drums", "prompt": "folk"},
            "Complete the input track with DRUMS | BACKING_VOCALS:",
            "folk",
        ),
        ({"kind": "accompany", "prompt": "folk"}, "Complete the input track:", "folk"),
    ],
)
def test_track_edits_reach_the_model_as_the_authors_write_them(
    base_model, files, given, instruction, caption, monkeypatch
):
    read, contexts = [], []
    conditions = Engine.conditions

    def record(self, song, text=TEXT_TO_MUSIC, **more):
        made = conditions(self, song, text, **more)
        read.append((text, song.prompt))
        contexts.append((more["context"], made[0].context))
        return made

    monkeypatch.setattr(Engine, "conditions", record)
    fields = {"start_s": 1.0, "end_s": 2.0} if given["kind"] == "add_track" else {}
    request = {"source": files["song"], "inference_steps": 2, **fields, **given}
    ending = run(base_model, "edit", **request)
    assert isinstance(ending, Take), ending
    assert read == [(instruction, caption)]
    assert ending.duration_s == pytest.approx(3.2)
    ((clean, context),) = contexts
    channels = clean.shape[2]
    assert torch.equal(context[..., :channels], clean)  # nothing of the source is hidden
    mask = context[0, :, channels]
    expected = torch.ones(80)
    if fields:
        expected = torch.zeros(80)
        expected[25:50] = 1
        sound, source = read_sound(ending.path), read_sound(files["song"])
        assert np.array_equal(sound[:, : SAMPLE_RATE // 2], source[:, : SAMPLE_RATE // 2])
        assert not np.array_equal(sound[:, SAMPLE_RATE:], source[:, SAMPLE_RATE:])
    assert torch.equal(mask, expected)


def test_extraction_does_not_ask_the_planner_what_the_song_is(base_model, files):
    ending = run(base_model, "edit", source=files["song"], kind="extract", track="drums")
    assert isinstance(ending, Take)
    assert not ending.plan
    assert ending.request["prompt"] == "drums"


@pytest.mark.parametrize("kind", ["add_track", "accompany", "extract"])
def test_track_edits_are_refused_by_a_model_that_was_not_trained_for_them(planned, files, kind):
    ending = run(planned, "edit", source=files["song"], kind=kind)
    assert isinstance(ending, Failed)
    assert ending.code == "tracks-need-base"
    assert "xl-base" in ending.action


def test_a_cover_of_the_recording_keeps_the_latents_themselves(run_and_digest, files, monkeypatch):
    contexts = []
    conditions = Engine.conditions

    def record(self, song, text=TEXT_TO_MUSIC, **more):
        contexts.append((text, more["context"]))
        return conditions(self, song, text, **more)

    monkeypatch.setattr(Engine, "conditions", record)
    for follow in ("codes", "latents"):
        ending, _ = run_and_digest("cover", **fields_of("cover", files, follow=follow))
        assert isinstance(ending, Take), ending
    (code_text, codes), (latent_text, latents) = contexts
    assert code_text == latent_text == pipeline.FROM_CODES
    assert codes.shape == latents.shape
    assert not torch.equal(codes, latents)
