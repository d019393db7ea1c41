"""Studio.run end to end: events, stop, the queue, kept takes, and failures by error code."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import read_sound, song

import backend
from audio import encode, settings
from core.errors import StudioError
from core.files import atomic_write, private_folder
from core.requests import Generate
from core.results import Cancelled, Failed, Progress, Take
from models import acestep
from runtime import device, device_queue, estimates, takes
from runtime.job import Job, JobFolder
from runtime.tasks import TASKS

SONG_STAGES = ["Reading the words", "Denoising", "Decoding", "Writing"]
"""Stages of a song without planner, on a loaded engine."""


def end(studio, request, visitor="v"):
    return list(studio.run(request, visitor))[-1]


def with_model(studio, **changes) -> None:
    """Change fields of the studio's model description."""
    model = replace(studio.setup.model, **changes)
    studio.setup = replace(studio.setup, model=model)


def files() -> set[str]:
    return {p.name for p in private_folder().iterdir()}


@pytest.fixture(autouse=True)
def nothing_is_left_behind(studio):
    """After every test: no partial file, no stop file, no running job."""
    before = files()
    yield
    ids = {t.id for results in studio._results.values() for t in results if isinstance(t, Take)}
    leftover = files() - before - ids
    assert not leftover
    assert not studio._running


def test_song_yields_progress_then_one_take(studio):
    events = list(studio.run(song(duration_s=12.34), "v"))
    assert all(isinstance(e, Progress) for e in events[:-1])
    take = events[-1]
    assert isinstance(take, Take)
    sound, rate = soundfile.read(take.path, always_2d=True)
    assert (rate, sound.shape) == (48000, (592320, 2))
    assert soundfile.info(take.path).subtype == "PCM_24"
    assert take.samples == 592320
    assert take.peak_dbfs == -1.0
    assert 20 * np.log10(np.abs(sound).max()) == pytest.approx(-1.0, abs=0.01)
    assert stat.S_IMODE(os.stat(Path(take.path).parent).st_mode) == 0o700
    stages = [e.stage for e in events[:-1]]
    assert sorted(set(stages), key=stages.index)[-4:] == SONG_STAGES
    elapsed = [e.elapsed_s for e in events[:-1]]
    assert elapsed == sorted(elapsed)


def test_take_records_request_and_model_but_no_path(studio):
    take = end(studio, song(prompt="lofi", seed=None, shift=None, inference_steps=1))
    assert take.request["seed"] is not None
    assert take.request["guidance_scale"] == studio.setup.model.guidance
    assert take.request["shift"] == studio.setup.model.shift
    assert len(take.model.sha256) == 64
    assert take.device.threads == studio.setup.device.threads
    assert set(take.timings_s) == {"Loading", *SONG_STAGES}
    sidecar = json.loads(Path(take.path).with_suffix(".json").read_text())
    name = f"lofi-{take.request['seed']}"
    assert sorted(os.listdir(Path(take.path).parent)) == [f"{name}.json", f"{name}.wav"]
    assert str(private_folder()) not in json.dumps(sidecar)
    assert settings.request_of(sidecar) == Generate.of(take.request)
    assert settings.settings_of(take) | {"timings_s": {}} == sidecar | {"timings_s": {}}
    assert take.to_request() == Generate.of(take.request)
    assert take.to_request(seed=5).seed == 5


def test_same_seed_gives_same_samples_and_another_seed_differs(studio):
    one, two = (read_sound(end(studio, song()).path) for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(read_sound(end(studio, song(seed=8)).path), one)


def test_rerunning_a_resolved_request_gives_the_same_samples(studio):
    first = end(studio, song(prompt="ambient pad", seed=None, inference_steps=None))
    again = end(studio, first.to_request())
    assert np.array_equal(read_sound(first.path), read_sound(again.path))


def stop_at(studio, request, stage, step, visitor="v"):
    """Run, stop when `stage` has reached `step`; the events that came after that."""
    after, stopped = [], False
    for event in studio.run(request, visitor):
        if stopped:
            after.append(event)
        elif isinstance(event, Progress) and event.stage == stage and event.step >= step:
            studio.stop(visitor)
            stopped = True
    assert stopped
    return after


@pytest.mark.parametrize(("stage", "step"), [("Denoising", 2), ("Decoding", 1)])
def test_stop_takes_effect_within_one_step_and_leaves_no_files(studio, stage, step):
    request = song(duration_s=30, inference_steps=8)
    after = stop_at(studio, request, stage, step)
    assert isinstance(after[-1], Cancelled)
    assert after[-1].stage == stage
    done = [e.step for e in after[:-1] if isinstance(e, Progress) and e.stage == stage]
    assert all(s <= step + 1 for s in done)
    assert not studio.takes("v")
    began = time.monotonic()
    running = studio.run(song(inference_steps=1), "v")
    first = next(e for e in running if e.stage != "Waiting")
    assert time.monotonic() - began < 2.0
    assert first.stage == "Reading the words"
    assert isinstance(list(running)[-1], Take)


def test_closing_the_event_generator_stops_the_job(studio):
    running = studio.run(song(duration_s=60, inference_steps=50), "v")
    for event in running:
        if event.stage == "Denoising":
            break
    running.close()
    began = time.monotonic()
    assert isinstance(end(studio, song(inference_steps=1), "other"), Take)
    assert time.monotonic() - began < 15


def test_song_finished_after_its_visitor_left_is_not_kept(studio, monkeypatch):
    before, write = files(), atomic_write

    def leave_then_write(*args):
        write(*args)
        studio.leave("v")
        for flag in private_folder().glob("*/stop"):
            flag.unlink()  # too late to stop: the song is finished

    monkeypatch.setattr(takes, "atomic_write", leave_then_write)
    assert isinstance(end(studio, song(inference_steps=1)), Take)
    assert studio.takes("v") == ()
    assert files() == before


def test_jobs_run_in_order_and_a_waiting_job_can_be_stopped(studio):
    order, endings = [], {}

    def work(name, seen):
        for event in studio.run(song(inference_steps=40 if name == "a" else 1), name):
            if event.kind == "progress" and event.stage == "Denoising" and event.step == 1:
                order.append(name)
            if event.kind == "progress" and event.stage == (
                "Denoising" if name == "a" else "Waiting"
            ):
                seen.set()
        endings[name] = event

    threads = []
    for name in ("a", "b", "c"):
        seen = threading.Event()
        threads.append(threading.Thread(target=work, args=[name, seen]))
        threads[-1].start()
        assert seen.wait(30)
    studio.stop("b")
    for thread in threads:
        thread.join(60)
    assert order == ["a", "c"]
    assert isinstance(endings["b"], Cancelled)
    assert isinstance(endings["a"], Take)
    assert isinstance(endings["c"], Take)


@pytest.fixture
def slow_load(engine, monkeypatch):
    """A loading that waits until it may go on; every call is counted."""
    started, may_end, calls = threading.Event(), threading.Event(), []

    def load(*_, **__):
        calls.append(threading.current_thread().name)
        started.set()
        while not may_end.wait(0.01):
            yield Progress(stage="Loading")
        return engine

    monkeypatch.setattr(acestep.Engine, "load", load)
    yield SimpleNamespace(started=started, may_end=may_end, calls=calls)
    may_end.set()


def test_a_job_that_comes_while_the_model_loads_waits_for_that_load(studio, slow_load):
    studio.load_in_background()
    assert slow_load.started.wait(10)
    running = studio.run(song(inference_steps=1), "v")
    assert any(event.stage == "Loading" for event in running)
    stopped = studio.run(song(), "other")
    next(stopped)
    studio.stop("other")
    assert isinstance([*stopped][-1], Cancelled), "the load holds up no Stop"
    slow_load.may_end.set()
    assert isinstance([*running][-1], Take)
    assert len(slow_load.calls) == 1


def test_a_failed_background_load_is_reported_by_the_job_that_needs_the_model(studio, monkeypatch):
    def fail(*_, **__):
        yield Progress(stage="Loading")
        raise StudioError("out-of-memory", device="cpu", model="m", seconds=1, shorter=1)

    monkeypatch.setattr(acestep.Engine, "load", fail)
    studio._load()
    assert end(studio, song()).code == "out-of-memory"


def test_nothing_is_loaded_in_the_background_that_is_not_on_disk(studio, slow_load):
    with_model(studio, folder=None, repo="nobody/has-this")
    studio._load()
    assert slow_load.calls == []


def test_full_queue_fails_with_queue_full(studio, monkeypatch):
    monkeypatch.setattr(device_queue, "MAX_WAITING", 0)
    running = studio.run(song(duration_s=60, inference_steps=50), "a")
    next(e for e in running if e.stage == "Denoising")
    ending = end(studio, song(), "b")
    studio.stop("a")
    assert isinstance(list(running)[-1], Cancelled)
    assert isinstance(ending, Failed)
    assert ending.code == "queue-full"


def test_each_visitor_keeps_only_their_own_latest_takes(studio, monkeypatch):
    monkeypatch.setattr(backend, "RESULTS_KEPT", 2)
    request = song(inference_steps=1)
    mine = [end(studio, request, "me") for _ in range(3)]
    theirs = end(studio, request, "they")
    assert [t.id for t in studio.takes("me")] == [mine[2].id, mine[1].id]
    assert [t.id for t in studio.takes("they")] == [theirs.id]
    assert not Path(mine[0].path).exists()
    studio.leave("me")
    assert studio.takes("me") == ()
    assert not Path(mine[2].path).exists()
    assert not Path(mine[2].path).with_suffix(".json").exists()
    assert Path(theirs.path).exists()


def failure(studio, request=None, visitor="v"):
    ending = end(studio, request or song(inference_steps=1), visitor)
    assert isinstance(ending, Failed), ending
    text = f"{ending.message} {ending.action}"
    assert "Traceback" not in text
    assert "/" not in text.replace("and/or", "")
    return ending.code


def test_full_disk_fails_and_leaves_no_file(studio, monkeypatch):
    before = files()

    def full(old, new):
        assert Path(old).stat().st_size > 48_000
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert failure(studio) == "disk-full"
    assert files() == before


def test_full_disk_at_the_sidecar_leaves_no_file(studio, monkeypatch):
    before = files()

    def full(old, new):
        if Path(new).suffix == ".json":
            raise OSError(28, "No space left on device")
        rename(old, new)

    rename = os.replace
    monkeypatch.setattr(os, "replace", full)
    assert failure(studio) == "disk-full"
    assert files() == before


def test_full_disk_at_the_job_folder_fails_with_disk_full(studio, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "mkdir", full)
        assert failure(studio) == "disk-full"


def test_nan_output_and_other_failures_have_codes_and_next_job_succeeds(studio, monkeypatch):
    assert failure(studio, song(lyrics="ą ć ę " * 600, instrumental=False)) == "lyrics-too-long"

    def broken(*_, **__):
        raise ZeroDivisionError("a bug")
        yield

    with monkeypatch.context() as m:
        m.setattr(acestep.Engine, "denoise", broken)
        assert failure(studio) == "internal"
    with monkeypatch.context() as m:
        m.setattr(acestep, "is_finite", lambda _: False)
        assert failure(studio) == "sound-not-finite"
    assert isinstance(end(studio, song(inference_steps=1)), Take)


def test_song_longer_than_the_models_limit_is_rejected(studio):
    with_model(studio, longest_s=60)
    assert failure(studio, song(duration_s=61)) == "song-too-long"


def test_guidance_is_ignored_on_distilled_models_with_a_note(studio):
    with_model(studio, guidance=1.0)
    take = end(studio, song(guidance_scale=7, inference_steps=1))
    assert take.request["guidance_scale"] == 1.0
    assert "guidance built in" in take.notes[0]


def test_stop_during_writing_cancels_a_finished_song(studio, monkeypatch):
    """Stopped while the file is written: no take and no file remain."""
    before, write = files(), encode.files.atomic_write

    def slow(*args):
        studio.stop("v")
        write(*args)

    monkeypatch.setattr(encode.files, "atomic_write", slow)
    assert isinstance(end(studio, song(inference_steps=1)), Cancelled)
    assert files() == before


def test_model_info_describes_model_device_and_hint(studio):
    info = studio.model_info()
    assert info.title == "ACE-Step mini (embedded)"
    assert studio.setup.device.dtype in info.device
    assert "python app.py --model xl-sft" in info.hint
    assert info.takes_guidance


def test_gpu_time_without_measurements_is_estimated_from_the_request():
    from models import catalog

    def gpu_seconds(model="xl-sft", **given):
        request = song(**{"guidance_scale": 7.0, **given})
        job = Job(
            request,
            JobFolder(Path()),
            device.find_device("cpu"),
            catalog.MODELS[model],
            duration_s=request.duration_s,
        )
        work = TASKS["generate"].cost(job, lambda weights: weights is None)
        return estimates.gpu_seconds(None, estimates.cautious(work, job.model))

    assert gpu_seconds(duration_s=30, inference_steps=27) == 60
    assert 60 < gpu_seconds(duration_s=240, inference_steps=27) < 120
    assert gpu_seconds(duration_s=240, inference_steps=54) > gpu_seconds(
        duration_s=240, inference_steps=27
    )
    assert gpu_seconds(duration_s=240, inference_steps=100, infer_method="heun") == 300
    assert gpu_seconds("mini", duration_s=240, inference_steps=100) == 60
