"""Adapters end to end on the studio: applied, recorded, replayed, rejected."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UNPLANNED, drain, read_sound
from trained import forge, pair, train, write

import backend
from audio import encode, settings
from audio.tags import Tags
from core import files
from core.errors import StudioError
from core.params import AdapterRef
from core.requests import Extend, Generate
from core.results import Failed, Progress, Take
from models import catalog
from runtime import device
from runtime.job import JobFolder
from runtime.replay import compare, differences, match_adapters
from runtime.tasks import TASKS
from runtime.uploads import Uploads

SHORT = {"prompt": "lofi", "duration_s": 5, "inference_steps": 2, "guidance_scale": 1, "seed": 7}
Q = "layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def played(own_cache):
    """A studio without planner, so that only adapters change the samples."""
    instance = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), "none")
    yield instance
    instance.leave("v")


def run(studio, **given):
    return list(studio.run(Generate.of({**SHORT, **UNPLANNED, **given}), "v"))[-1]


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """An adapter of two layers in every block."""
    tensors = {}
    for layer in range(6):
        tensors |= pair(f"layers.{layer}.self_attn.q_proj")
        tensors |= pair(f"layers.{layer}.mlp.up_proj", out=704)
    return write(tmp_path_factory.mktemp("warm") / "warm.safetensors", tensors)


@pytest.fixture(scope="module")
def cold(tmp_path_factory) -> Path:
    tensors = pair("layers.3.cross_attn.v_proj", rank=2, out=128)
    return write(tmp_path_factory.mktemp("cold") / "cold.safetensors", tensors)


@pytest.fixture(scope="module")
def plain(played) -> np.ndarray:
    return read_sound(run(played).path)


def test_adapter_changes_samples_is_recorded_and_is_removed_afterwards(played, plain, warm, cold):
    one = run(played, adapters=[f"{warm}:0.8"])
    assert (read_sound(one.path) != plain).mean() > 0.9
    (used,) = one.adapters
    assert (used["name"], used["strength"], used["modules"]) == ("warm.safetensors", 0.8, 12)
    both = run(played, adapters=[f"{warm}:0.8", cold])
    assert [each["name"] for each in both.adapters].count("cold.safetensors") == 1
    assert not np.array_equal(read_sound(both.path), read_sound(one.path))
    after = run(played)
    assert np.array_equal(read_sound(after.path), plain)
    assert after.adapters == ()


def test_strength_0_changes_no_sample_and_duplicate_files_count_once(played, plain, warm, tmp_path):
    silent = run(played, adapters=[f"{warm}:0"])
    assert np.array_equal(read_sound(silent.path), plain)
    assert silent.adapters == ()
    twice = run(played, adapters=[warm, shutil.copy(warm, tmp_path / "again.safetensors")])
    assert len(twice.adapters) == 1
    assert np.array_equal(read_sound(twice.path), read_sound(run(played, adapters=[warm]).path))


def test_take_keeps_its_adapters_after_the_file_is_deleted(played, warm, tmp_path):
    mine = Path(shutil.copy(warm, tmp_path / "mine.safetensors"))
    take = run(played, adapters=[f"{mine}:0.5"])
    mine.unlink()
    again = list(played.run(take.to_request(), "v"))[-1]
    assert np.array_equal(read_sound(again.path), read_sound(take.path))
    assert again.adapters == take.adapters
    assert take.for_sharing().request["adapters"][0]["file"] == "mine.safetensors"
    assert str(files.private_folder()) not in Path(take.path).with_suffix(".json").read_text()


def test_adapter_config_is_read_from_folder_or_separate_file(played, engine, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"])
    train(engine.pipe.transformer, config, tmp_path / "lora")
    copied = tmp_path / "copied.safetensors"
    shutil.copy(tmp_path / "lora" / "adapter_model.safetensors", copied)
    config_file = tmp_path / "lora" / "adapter_config.json"
    one = run(played, adapters=[tmp_path / "lora"])
    two = run(played, adapters=[{"file": copied, "config": config_file}])
    assert one.adapters[0]["sha256"] == two.adapters[0]["sha256"]
    assert np.array_equal(read_sound(one.path), read_sound(two.path))
    for take in (one, two):
        again = list(played.run(take.to_request(), "v"))[-1]
        assert np.array_equal(read_sound(again.path), read_sound(one.path)), (
            "the replay applies the full strength"
        )
    alone = run(played, adapters=[copied])
    assert "came without its adapter_config.json" in alone.notes[0]
    assert not np.array_equal(read_sound(alone.path), read_sound(one.path))


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_replay_requires_its_adapters_and_gives_the_same_samples(
    played, plain, warm, cold, tmp_path, kind
):
    take = run(played, adapters=[f"{warm}:0.7", f"{cold}:1.2"])
    file = Path(take.path)
    if kind != "wav":
        file = tmp_path / f"song.{kind}"
        recorded = settings.settings_of(take)
        tags = Tags("x", "mini", "MIT")
        drain(encode.convert(Path(take.path), file, kind, recorded, tags))
    recorded = settings.read_settings(file)
    with pytest.raises(StudioError) as raised:
        settings.request_of(recorded)
    assert raised.value.code == "settings-need-adapter"
    assert "warm.safetensors" in raised.value.message
    assert "cold.safetensors" in raised.value.message

    given = [
        AdapterRef.of(str(cold)),
        AdapterRef.of(str(shutil.copy(warm, tmp_path / "renamed.safetensors"))),
    ]
    request = settings.request_of(recorded, adapters=match_adapters(recorded, given))
    again = list(played.run(request, "v"))[-1]
    assert differences(recorded, again) == []
    assert compare(file, again) == "The samples are the same, every one."

    without = list(played.run(settings.request_of(recorded, adapters=()), "v"))[-1]
    assert np.array_equal(read_sound(without.path), plain)
    notes = differences(recorded, without)
    assert len(notes) == 2
    assert any("warm.safetensors was applied at 0.7 then" in line for line in notes)
    with pytest.raises(StudioError, match=r"This song used warm.safetensors"):
        match_adapters(recorded, given[:1])
    louder = match_adapters(recorded, [AdapterRef.of(f"{warm}:1.5"), AdapterRef.of(str(cold))])
    other = list(played.run(settings.request_of(recorded, adapters=louder), "v"))[-1]
    assert differences(recorded, other) == [
        "The adapter warm.safetensors was applied at 0.7 then; here at 1.5."
    ]


@pytest.mark.parametrize(
    "claim",
    [{"sha256": "../x"}, {"strength": 9}, {"modules": 0}, {"path": "/etc/passwd"}, {"name": 3}],
)
def test_recorded_adapter_entries_are_validated(played, warm, claim, tmp_path):
    take = run(played, adapters=[warm])
    recorded = settings.settings_of(take)
    recorded["adapters"] = [{**take.adapters[0], **claim}]
    path = tmp_path / "song.json"
    path.write_text(json.dumps(recorded))
    with pytest.raises(StudioError) as raised:
        settings.read_settings(path)
    assert raised.value.code == "settings-unreadable"
    recorded["adapters"] = [{**take.adapters[0], "name": "../../etc/warm"}]
    recorded["request"]["adapters"] = [{"file": "/etc/passwd", "strength": 1}]
    path.write_text(json.dumps(recorded))
    found = settings.read_settings(path)
    assert found["adapters"][0]["name"] == "warm"
    assert "/etc" not in json.dumps(found)


def invalid_adapter(kind: str, folder: Path) -> Path:
    """Path of an invalid adapter of the given kind."""
    path = folder / f"{kind}.safetensors"
    if kind == "wide":
        return write(path, pair(Q, into=2560, out=4096))
    if kind == "deep":
        return write(path, pair("layers.31.self_attn.q_proj"))
    if kind == "rank":
        return write(path, pair(Q, rank=257))
    if kind == "dora":
        return write(path, pair(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(256)})
    if kind == "image":
        return write(path, pair("lora_unet_down_blocks_0"))
    if kind == "cut":
        whole = write(path, pair(Q)).read_bytes()
        path.write_bytes(whole[:-9])
    if kind == "pickle":
        path = path.with_suffix(".pt")
        path.write_bytes(pickle.dumps({"a": 1}))
    if kind == "long":
        forge(path, b"{}", length=1 << 60)
    if kind == "big":
        forge(path, {})
        with path.open("r+b") as file:
            file.truncate(500_000_001)
    return path  # "gone" is not written


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("wide", "adapter-wrong-base"),
        ("deep", "adapter-wrong-base"),
        ("rank", "adapter-too-big"),
        ("big", "adapter-too-big"),
        ("dora", "adapter-refused"),
        ("image", "adapter-refused"),
        ("pickle", "adapter-refused"),
        ("cut", "adapter-unreadable"),
        ("long", "adapter-unreadable"),
        ("gone", "adapter-missing"),
    ],
)
def test_invalid_adapter_fails_before_the_queue_with_name_but_no_path(
    played, warm, tmp_path, kind, code
):
    bad = invalid_adapter(kind, tmp_path)
    before = set(files.private_folder().glob("*/"))
    events = list(played.run(Generate.of({**SHORT, **UNPLANNED, "adapters": [warm, bad]}), "v"))
    ending = events[-1]
    assert isinstance(ending, Failed)
    assert ending.code == code
    assert bad.name in ending.message
    assert str(tmp_path) not in f"{ending.message} {ending.action}"
    assert not [e for e in events if isinstance(e, Progress) and e.stage != "Reading the file"]
    assert set(files.private_folder().glob("*/")) == before
    with pytest.raises(StudioError) as raised:
        played.check_adapter(AdapterRef(file=bad))
    assert raised.value.code == code


def test_nan_in_adapter_fails_and_next_job_succeeds(played, plain, warm, tmp_path):
    tensors = pair(Q)
    tensors[f"{Q}.lora_A.weight"][0, 0] = float("nan")
    ending = run(played, adapters=[warm, write(tmp_path / "nan.safetensors", tensors)])
    assert (ending.code, "nan.safetensors" in ending.message) == ("adapter-unreadable", True)
    assert np.array_equal(read_sound(run(played).path), plain)


def test_job_with_adapters_is_picklable_and_counts_reading_them(played, warm):
    request = Generate.of({**SHORT, **UNPLANNED, "adapters": [f"{warm}:0.5"]})
    task, folder = TASKS["generate"], JobFolder.create()
    job = drain(task.prepare(request, played.setup, folder, Uploads()))
    job = pickle.loads(pickle.dumps(job))
    ((adapter, strength),) = job.adapters
    assert (adapter.path.parent, strength) == (folder.path / "adapters" / "0", 0.5)
    assert task.cost(job, lambda _: True)["Reading adapters"] == 1
    folder.remove()


def test_adapters_apply_in_extend_and_change_no_source_sample(played, warm, plain, tmp_path):
    take = run(played)
    fields = {"source": take.path, "after_s": 1.0, "inference_steps": 2, "seed": 7, **UNPLANNED}
    takes = [
        list(played.run(Extend.of({**fields, "adapters": adapters}), "v"))[-1]
        for adapters in ([], [warm])
    ]
    assert all(isinstance(each, Take) for each in takes), takes
    before, after = (read_sound(each.path) for each in takes)
    kept = plain.shape[1] - 4800
    assert np.array_equal(before[:, :kept], after[:, :kept])
    assert not np.array_equal(before, after)
    assert takes[1].changed_outside == 0


def test_check_adapter_returns_rank_modules_and_size(played, warm):
    info = played.check_adapter(AdapterRef(file=warm))
    assert (info.name, info.rank, info.modules) == ("warm.safetensors", 4, 12)
    assert info.size_bytes == warm.stat().st_size


def test_adapter_named_like_a_config_file_is_copied_into_the_job(played, warm, tmp_path):
    shutil.copy(warm, tmp_path / "adapter_config.json")
    original = (tmp_path / "adapter_config.json").read_bytes()
    take = run(played, adapters=[tmp_path / "adapter_config.json"])
    kept = Path(take.request["adapters"][0]["file"])
    assert kept.parent.parent.parent == Path(take.path).parent
    assert kept.read_bytes() == original
    assert (tmp_path / "adapter_config.json").read_bytes() == original
    assert isinstance(list(played.run(take.to_request(), "v"))[-1], Take)


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("warm.safetensors:0.8", "warm.safetensors", 0.8),
        ("C:\\music\\warm.safetensors", "C:\\music\\warm.safetensors", 1),
        ("C:\\music\\warm.safetensors:.5", "C:\\music\\warm.safetensors", 0.5),
        ("a:b:1", "a:b", 1),
        ("take:two", "take:two", 1),
    ],
)
def test_colon_separates_strength_only_before_a_number(text, file, strength):
    assert AdapterRef.of(text) == AdapterRef(file=file, strength=strength)


@pytest.mark.parametrize("text", ["warm:3.1", "warm:-1"])
def test_strength_out_of_range_is_rejected(text):
    with pytest.raises(StudioError, match=r"Strength must be a number from 0 to 3"):
        Generate.of({"prompt": "x", "adapters": [text]})


def test_command_line_generates_and_replays_with_adapters(command, warm, tmp_path):
    song, no_planner = tmp_path / "song.flac", ("--planner", "none")
    fields = ("--prompt", "lofi", "--duration-s", "5", "--inference-steps", "2", "--seed", "3")
    adapter = ("--adapter", f"{warm}:0.6")
    generated = command("generate", *fields, *adapter, *no_planner, "--out", str(song), "--json")
    assert generated.returncode == 0, generated.stderr
    assert json.loads(generated.stdout)["adapters"][0]["strength"] == 0.6
    bare = command("replay", str(song), *no_planner)
    assert bare.returncode == 2
    assert "settings-need-adapter: This song used warm.safetensors" in bare.stderr
    out = ("--out", str(tmp_path / "again.wav"))
    again = command("replay", str(song), "--adapter", str(warm), *no_planner, *out)
    assert "The samples are the same, every one." in again.stderr
    without = command("replay", str(song), "--without-adapters", *no_planner, *out)
    assert "The adapter warm.safetensors was applied at 0.6 then" in without.stderr
    assert re.search("dB below the song|another song", without.stderr)
