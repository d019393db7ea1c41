"""Adapters from request to sound, on the real studio: what plays, what is told, what is refused."""

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
    """A studio without a planner, so that adapters alone make the difference."""
    made = backend.Studio(catalog.choose("mini"), device.find_device("cpu"), "none")
    yield made
    made.leave("v")


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


def test_an_adapter_is_heard_and_named_and_nothing_of_it_stays(played, plain, warm, cold):
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


def test_strength_0_is_no_adapter_bit_for_bit_and_the_same_file_twice_is_one(
    played, plain, warm, tmp_path
):
    silent = run(played, adapters=[f"{warm}:0"])
    assert np.array_equal(read_sound(silent.path), plain)
    assert silent.adapters == ()
    twice = run(played, adapters=[warm, shutil.copy(warm, tmp_path / "again.safetensors")])
    assert len(twice.adapters) == 1
    assert np.array_equal(read_sound(twice.path), read_sound(run(played, adapters=[warm]).path))


def test_a_take_keeps_its_adapters_whatever_the_visitor_deletes(played, warm, tmp_path):
    mine = Path(shutil.copy(warm, tmp_path / "mine.safetensors"))
    take = run(played, adapters=[f"{mine}:0.5"])
    mine.unlink()
    again = list(played.run(take.to_request(), "v"))[-1]
    assert np.array_equal(read_sound(again.path), read_sound(take.path))
    assert again.adapters == take.adapters
    assert take.for_sharing().request["adapters"][0]["file"] == "mine.safetensors"
    assert str(files.private_folder()) not in Path(take.path).with_suffix(".json").read_text()


def test_settings_of_an_adapter_come_with_it_as_a_folder_or_beside_it(played, engine, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"])
    train(engine.pipe.transformer, config, tmp_path / "lora")
    apart = tmp_path / "apart.safetensors"
    shutil.copy(tmp_path / "lora" / "adapter_model.safetensors", apart)
    said = tmp_path / "lora" / "adapter_config.json"
    one = run(played, adapters=[tmp_path / "lora"])
    two = run(played, adapters=[{"file": apart, "config": said}])
    assert one.adapters[0]["sha256"] == two.adapters[0]["sha256"]
    assert np.array_equal(read_sound(one.path), read_sound(two.path))
    for take in (one, two):
        again = list(played.run(take.to_request(), "v"))[-1]
        assert np.array_equal(read_sound(again.path), read_sound(one.path)), (
            "not at half its strength"
        )
    alone = run(played, adapters=[apart])
    assert "came without its adapter_config.json" in alone.notes[0]
    assert not np.array_equal(read_sound(alone.path), read_sound(one.path))


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_file_asks_for_its_adapters_and_makes_the_same_samples_with_them(
    played, plain, warm, cold, tmp_path, kind
):
    take = run(played, adapters=[f"{warm}:0.7", f"{cold}:1.2"])
    file = Path(take.path)
    if kind != "wav":
        file = tmp_path / f"song.{kind}"
        told = settings.settings_of(take)
        tags = Tags("x", "mini", "MIT")
        drain(encode.convert(Path(take.path), file, kind, told, tags))
    told = settings.read_settings(file)
    with pytest.raises(StudioError) as raised:
        settings.request_of(told)
    assert raised.value.code == "settings-need-adapter"
    assert "warm.safetensors" in raised.value.message
    assert "cold.safetensors" in raised.value.message

    given = [
        AdapterRef.of(str(cold)),
        AdapterRef.of(str(shutil.copy(warm, tmp_path / "renamed.safetensors"))),
    ]
    request = settings.request_of(told, adapters=match_adapters(told, given))
    again = list(played.run(request, "v"))[-1]
    assert differences(told, again) == []
    assert compare(file, again) == "The samples are the same, every one."

    without = list(played.run(settings.request_of(told, adapters=()), "v"))[-1]
    assert np.array_equal(read_sound(without.path), plain)
    said = differences(told, without)
    assert len(said) == 2
    assert any("warm.safetensors was applied at 0.7 then" in line for line in said)
    with pytest.raises(StudioError, match=r"This song used warm.safetensors"):
        match_adapters(told, given[:1])
    louder = match_adapters(told, [AdapterRef.of(f"{warm}:1.5"), AdapterRef.of(str(cold))])
    other = list(played.run(settings.request_of(told, adapters=louder), "v"))[-1]
    assert differences(told, other) == [
        "The adapter warm.safetensors was applied at 0.7 then; here at 1.5."
    ]


@pytest.mark.parametrize(
    "lie",
    [{"sha256": "../x"}, {"strength": 9}, {"modules": 0}, {"path": "/etc/passwd"}, {"name": 3}],
)
def test_what_a_file_claims_of_adapters_is_checked(played, warm, lie, tmp_path):
    take = run(played, adapters=[warm])
    told = settings.settings_of(take)
    told["adapters"] = [{**take.adapters[0], **lie}]
    path = tmp_path / "song.json"
    path.write_text(json.dumps(told))
    with pytest.raises(StudioError) as raised:
        settings.read_settings(path)
    assert raised.value.code == "settings-unreadable"
    told["adapters"] = [{**take.adapters[0], "name": "../../etc/warm"}]
    told["request"]["adapters"] = [{"file": "/etc/passwd", "strength": 1}]
    path.write_text(json.dumps(told))
    found = settings.read_settings(path)
    assert found["adapters"][0]["name"] == "warm"
    assert "/etc" not in json.dumps(found)


def spoiled(kind: str, folder: Path) -> Path:
    """An adapter that cannot be played, each in its own way."""
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
    return path  # "gone" was never written


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
def test_what_cannot_play_is_told_before_the_queue_by_name_and_without_a_path(
    played, warm, tmp_path, kind, code
):
    bad = spoiled(kind, tmp_path)
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


def test_numbers_that_are_none_are_found_on_the_device_and_the_next_song_is_whole(
    played, plain, warm, tmp_path
):
    tensors = pair(Q)
    tensors[f"{Q}.lora_A.weight"][0, 0] = float("nan")
    ending = run(played, adapters=[warm, write(tmp_path / "nan.safetensors", tensors)])
    assert (ending.code, "nan.safetensors" in ending.message) == ("adapter-unreadable", True)
    assert np.array_equal(read_sound(run(played).path), plain)


def test_a_job_with_adapters_goes_to_another_process_and_is_timed(played, warm):
    request = Generate.of({**SHORT, **UNPLANNED, "adapters": [f"{warm}:0.5"]})
    task, folder = TASKS["generate"], JobFolder.create()
    job = drain(task.prepare(request, played.setup, folder, Uploads()))
    job = pickle.loads(pickle.dumps(job))
    ((adapter, strength),) = job.adapters
    assert (adapter.path.parent, strength) == (folder.path / "adapters" / "0", 0.5)
    assert task.cost(job, lambda _: True)["Reading adapters"] == 1
    folder.remove()


def test_adapters_play_in_an_edit_too_and_outside_it_nothing_changes(played, warm, plain, tmp_path):
    take = run(played)
    asked = {"source": take.path, "after_s": 1.0, "inference_steps": 2, "seed": 7, **UNPLANNED}
    made = [
        list(played.run(Extend.of({**asked, "adapters": worn}), "v"))[-1] for worn in ([], [warm])
    ]
    assert all(isinstance(each, Take) for each in made), made
    before, after = (read_sound(each.path) for each in made)
    kept = plain.shape[1] - 4800
    assert np.array_equal(before[:, :kept], after[:, :kept])
    assert not np.array_equal(before, after)
    assert made[1].changed_outside == 0


def test_the_page_is_told_rank_layers_and_size(played, warm):
    seen = played.check_adapter(AdapterRef(file=warm))
    assert (seen.name, seen.rank, seen.modules) == ("warm.safetensors", 4, 12)
    assert seen.size_bytes == warm.stat().st_size


def test_a_name_that_means_something_to_a_folder_stays_inside_the_job(played, warm, tmp_path):
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
def test_a_colon_parts_file_and_strength_where_a_number_follows(text, file, strength):
    assert AdapterRef.of(text) == AdapterRef(file=file, strength=strength)


@pytest.mark.parametrize("text", ["warm:3.1", "warm:-1"])
def test_a_strength_out_of_range_is_told(text):
    with pytest.raises(StudioError, match=r"Strength must be a number from 0 to 3"):
        Generate.of({"prompt": "x", "adapters": [text]})


def test_the_command_line_plays_and_replays_with_adapters(command, warm, tmp_path):
    song, alone = tmp_path / "song.flac", ("--planner", "none")
    asked = ("--prompt", "lofi", "--duration-s", "5", "--inference-steps", "2", "--seed", "3")
    worn = ("--adapter", f"{warm}:0.6")
    made = command("generate", *asked, *worn, *alone, "--out", str(song), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["adapters"][0]["strength"] == 0.6
    bare = command("replay", str(song), *alone)
    assert bare.returncode == 2
    assert "settings-need-adapter: This song used warm.safetensors" in bare.stderr
    out = ("--out", str(tmp_path / "again.wav"))
    again = command("replay", str(song), "--adapter", str(warm), *alone, *out)
    assert "The samples are the same, every one." in again.stderr
    without = command("replay", str(song), "--without-adapters", *alone, *out)
    assert "The adapter warm.safetensors was applied at 0.6 then" in without.stderr
    assert re.search("dB below the song|another song", without.stderr)
