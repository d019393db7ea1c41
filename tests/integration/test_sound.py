"""Musical quality of the modes, measured on pieces held out from the embedded model's training.

Where the model does not reach the required value yet, the test is an expected failure whose reason
gives the measured value; the requirement stays.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from conftest import UNPLANNED, drain, read_sound

import backend
import pipeline
from core.requests import SAMPLE_RATE, Extend, Generate
from mini import eval as evaluation
from mini import measure
from models import catalog
from pipeline import RepaintSettings
from runtime import device

pytestmark = pytest.mark.long

SECONDS, COUNT = 12, 4


@pytest.fixture(scope="module")
def pieces():
    """Held-out pieces with their samples, float32 [2, samples] at 48 kHz."""
    found = evaluation.held_out_pieces(COUNT)
    return [(piece, evaluation.as_heard(piece, SECONDS)[0]) for piece in found]


def make_request(piece, **changes) -> Generate:
    given = {
        "prompt": f"{piece.style} instrumental",
        "instrumental": True,
        "duration_s": SECONDS,
        "bpm": piece.bpm,
        "seed": 1,
        "inference_steps": 16,
        "guidance_scale": 3.0,
        "shift": 3.0,
    }
    return Generate.of({**given, **UNPLANNED, **changes})


@pytest.fixture(scope="module")
def covers(engine, pieces):
    """Covers of every piece by strength; no tempo is given, since it would align them."""
    return {
        strength: [
            drain(
                pipeline.cover(engine, make_request(p, bpm=None), source, strength=strength)
            ).sound
            for p, source in pieces
        ]
        for strength in (1.0, 0.5, 0.0)
    }


def test_cover_resembles_its_source_more_than_other_songs(covers, pieces):
    sources = [source for _, source in pieces]
    own = [evaluation.likeness(*pair) for pair in zip(covers[1.0], sources, strict=True)]
    others = [
        evaluation.likeness(*p) for p in zip(covers[1.0], sources[1:] + sources[:1], strict=True)
    ]
    print(f"likeness {np.mean(own):.2f}, to others {np.mean(others):.2f}")
    assert np.mean(own) > np.mean(others) + 3 * np.std(others) / np.sqrt(COUNT)


@pytest.mark.xfail(reason="the embedded model reaches 1.09, 1.19 and 0.48: half is most like it")
def test_cover_likeness_falls_with_source_strength(covers, pieces):
    means = []
    for sounds in covers.values():
        pairs = zip(sounds, (source for _, source in pieces), strict=True)
        means.append(np.mean([evaluation.likeness(*pair) for pair in pairs]))
    print(f"likeness at 1, 0.5 and 0: {[round(float(m), 2) for m in means]}")
    assert means == sorted(means, reverse=True)


@pytest.mark.xfail(reason="the embedded model comes nearer in 1 of 4 cases")
def test_timbre_reference_moves_descriptors_towards_it(engine, pieces):
    """Nine descriptors are nearer to the reference than without it, in most cases."""
    nearer = []
    for i, (piece, _) in enumerate(pieces):
        reference = pieces[(i + 1) % COUNT][1]
        timbre = drain(pipeline.encode_timbre(engine, reference))
        plain, referenced = (
            drain(pipeline.text_to_music(engine, make_request(piece), timbre=t)).sound
            for t in (None, timbre)
        )
        target, before, after = (
            measure.descriptors(x, SAMPLE_RATE) for x in (reference, plain, referenced)
        )
        nearer.append(np.abs(after - target).sum() < np.abs(before - target).sum())
    print(f"nearer to the reference: {np.mean(nearer):.2f} of {COUNT}")
    assert np.mean(nearer) > 0.5


def test_extension_without_given_tempo_keeps_the_tempo(own_cache, pieces, tmp_path):
    """The studio detects the tempo: within 4 % of the source's, twice or half, on most sources."""
    studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"))
    right = []
    for i, (piece, source) in enumerate(pieces):
        source_file = tmp_path / f"{i}.wav"
        soundfile.write(source_file, source.T, SAMPLE_RATE, "PCM_24")
        request = Extend.of(
            {"source": source_file, "after_s": 12, "seed": 1, "use_cot_caption": False}
        )
        take = list(studio.run(request, "v"))[-1]
        added = read_sound(take.path)[:, source.shape[1] :]
        right.append(measure.tempo_right(measure.tempo(added, SAMPLE_RATE), piece.bpm))
        assert take.changed_outside == 0
    studio.leave("v")
    print(f"tempo continued: {np.mean(right):.2f} of {COUNT}")
    assert np.mean(right) > 0.5


def test_repaint_keeps_the_tempo(engine, pieces):
    right = []
    for piece, source in pieces:
        region = (4 * SAMPLE_RATE, 9 * SAMPLE_RATE)
        settings = RepaintSettings.of("balanced", 0.5)
        repainted = drain(
            pipeline.repaint(engine, make_request(piece), source, [region], settings)
        ).sound
        inside = repainted[:, slice(*region)]
        right.append(measure.tempo_right(measure.tempo(inside, SAMPLE_RATE), piece.bpm))
    print(f"tempo inside a repaint: {np.mean(right):.2f} of {COUNT}")
    assert np.mean(right) >= 0.8


@pytest.mark.parametrize("seed", [1, 2])
def test_morph_distance_grows_with_strength(engine, pieces, seed):
    """Distance of the latents from the source's grows over five strengths, on every source."""
    for piece, source in pieces[:2]:
        with torch.inference_mode():
            clean = drain(pipeline.encode(engine, source))
        source_request = make_request(piece, seed=seed)
        target_request = make_request(
            piece, seed=seed, prompt="bright chiptune, square lead, fast arpeggio"
        )
        distances = []
        for n_max in (0.0, 0.4, 0.6, 0.8, 1.0):
            morphed = drain(
                pipeline.morph(
                    engine,
                    target_request,
                    source,
                    source_request,
                    n_min=0.0,
                    n_max=n_max,
                    n_avg=1,
                    clean=clean,
                )
            )
            with torch.inference_mode():
                coded = drain(pipeline.encode(engine, morphed.sound))
            distances.append(
                1 - float(torch.corrcoef(torch.stack([clean.ravel(), coded.ravel()]))[0, 1])
            )
        print(f"{piece.style}: {[round(a, 3) for a in distances]}")
        assert all(later >= earlier - 0.02 for earlier, later in pairwise(distances))
        assert distances[-1] > distances[0] + 0.2
