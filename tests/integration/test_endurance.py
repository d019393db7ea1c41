"""Memory, files and samples after many jobs, in fresh processes, and at full length."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections import Counter

import psutil
import pytest
import soundfile
from conftest import ROOT
from planned_studio import STEADY, music

from core.files import private_folder
from core.requests import MODES, SAMPLE_RATE
from core.results import Cancelled, Take
from models import vae

pytestmark = pytest.mark.long

CANCELS = int(os.environ.get("ACE_CANCELS", "200"))

LONG = {**STEADY, "inference_steps": 6}

STAGES = {
    "generate": {"Planning", "Composing codes", "Denoising", "Decoding"},
    "cover": {"Listening", "Denoising", "Decoding"},
    "extend": {"Listening", "Encoding", "Denoising", "Decoding"},
    "edit": {"Listening", "Denoising", "Decoding"},
}


@pytest.mark.timeout(60 + 10 * CANCELS)
def test_random_cancels_leave_no_files_and_no_memory_growth(planned, tmp_path, monkeypatch):
    """Cancelled in the planner, while encoding, sampling and decoding, in every mode."""
    monkeypatch.setattr(vae, "TILE_FRAMES", 64)  # more steps to cancel at
    source = tmp_path / "source.wav"
    soundfile.write(source, music(4).T, SAMPLE_RATE, "PCM_24")
    fields = {
        "generate": {"prompt": "lofi", "duration_s": 10},
        "cover": {"source": source},
        "extend": {"source": source, "after_s": 2},
        "edit": {"source": source, "start_s": 1, "end_s": 3},
    }
    requests = {mode: MODES[mode].of({**LONG, **given}) for mode, given in fields.items()}
    counts = {mode: _stages(planned, request) for mode, request in requests.items()}
    process, rng, rss, cancelled = (
        psutil.Process(),
        random.Random(50),
        [],
        {mode: set() for mode in MODES},
    )
    before = {p.name for p in private_folder().glob("*/")}
    for turn in range(CANCELS):
        mode = list(requests)[turn % 4]
        stage = rng.choice(sorted(counts[mode]))
        remaining = rng.randrange(counts[mode][stage])
        began, first = time.monotonic(), None
        for event in planned.run(requests[mode], "c"):
            first = first or time.monotonic() - began
            if event.kind == "progress" and event.stage == stage:
                remaining -= 1
                if remaining < 0:
                    planned.stop("c")
        assert isinstance(event, Cancelled), f"the stop at {stage} had no effect"
        assert first < 2.0, "the next job starts within two seconds"
        cancelled[mode].add(event.stage)
        planned.leave("c")
        rss.append(process.memory_info().rss)
    print(f"MB after each: {[r >> 20 for r in rss]}; stopped in: {cancelled}")
    assert {p.name for p in private_folder().glob("*/")} == before
    for mode, stages in STAGES.items():
        assert CANCELS < 100 or stages <= cancelled[mode], f"{mode} was never stopped in some stage"
    settled, last = rss[CANCELS // 4 : CANCELS // 2], rss[-CANCELS // 4 :]
    assert max(last) <= max(settled) * 1.02


def _stages(studio, request) -> Counter[str]:
    """Number of progress events per stage in a run with warm caches."""
    for _ in range(2):
        *events, take = studio.run(request, "v")
        assert isinstance(take, Take)
    studio.leave("v")
    return Counter(event.stage for event in events)


SAMPLES_SCRIPT = """
import hashlib, json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import numpy as np
import backend
from models import catalog
from runtime import device
from conftest import read_sound
from core.requests import MODES
from planned_studio import STEADY

studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), {planner!r})
results = {{}}
for mode, given in {fields}.items():
    take = list(studio.run(MODES[mode].of({{**STEADY, **given}}), "v"))[-1]
    results[mode] = [hashlib.sha256(read_sound(take.path).tobytes()).hexdigest(), take.plan, take.codes]
studio.leave("v")
print(json.dumps(results))
"""


def test_every_mode_makes_the_same_samples_in_a_fresh_process(planned, files):
    song = str(files["song"])
    fields = {
        "generate": {"prompt": "lofi", "duration_s": 10},
        "cover": {"source": song, "strength": 0.5, "infer_method": "sde"},
        "extend": {"source": song, "after_s": 2},
        "edit": {"source": song, "kind": "morph", "prompt": "chimes", "n_avg": 2},
    }
    script = SAMPLES_SCRIPT.format(
        root=str(ROOT),
        tests=str(ROOT / "tests"),
        fields=fields,
        planner=str(planned.setup.planner.folder),
    )
    one, two = (json.loads(_python(script)) for _ in range(2))
    assert one == two
    assert all(plan for _, plan, _ in one.values())


MEMORY_SCRIPT = """
import resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
import backend
from models import catalog
from runtime import device
from core.requests import MODES

studio = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), {planner!r})
take = list(studio.run(MODES[{mode!r}].of({given}), "v"))[-1]
studio.leave("v")
print(take.samples, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize(("mode", "seconds"), [("extend", 200), ("cover", 240)])
def test_four_minutes_fit_into_four_gigabytes(planned, tmp_path, mode, seconds):
    source = tmp_path / "long.flac"
    soundfile.write(source, music(seconds).T, SAMPLE_RATE, "PCM_24")
    given = {"source": str(source), "inference_steps": 2, "use_cot_caption": False, "seed": 1}
    given |= {"after_s": 40.0} if mode == "extend" else {}
    script = MEMORY_SCRIPT.format(
        root=str(ROOT),
        tests=str(ROOT / "tests"),
        planner=str(planned.setup.planner.folder),
        mode=mode,
        given=given,
    )
    samples, megabytes = map(int, _python(textwrap.dedent(script)).split())
    assert samples == 240 * SAMPLE_RATE
    assert megabytes < 4096


def _python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=400, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
