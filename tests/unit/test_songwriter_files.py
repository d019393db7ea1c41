"""Finding, downloading and loading a songwriter, and what can go wrong with one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_writer
from conftest import ROOT, drain
from fake_hub import FakeHub
from tiny_writer import load

import lyrics
from core.errors import StudioError
from core.requests import Lyrics
from models import catalog, checkpoints
from models.catalog import SONGWRITERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_writer.write(tmp_path_factory.mktemp("writer") / "tiny")


def request(**changes):
    given = {"brief": "a night on the river", "structure": "verse", "seed": 7, "lines": 2}
    return Lyrics.of({**given, **changes})


def write(writer, **changes):
    return drain(writer.write(request(**changes)))


@pytest.fixture(scope="module")
def writer(folder):
    made = load("torch", folder)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("device", "memory_gb", "fitting", "offered"),
    [
        ("cpu", 4, ["qwen-0.5b"], "qwen-0.5b"),
        ("cpu", 8, ["qwen-0.5b"], "qwen-0.5b"),
        ("cpu", 16, ["qwen-1.5b", "qwen-0.5b"], "qwen-1.5b"),
        ("cpu", 64, ["qwen", "qwen-1.5b", "qwen-0.5b"], "qwen-1.5b"),
        ("cuda", 8, ["qwen-1.5b", "qwen-0.5b"], "qwen-1.5b"),
        ("cuda", 24, ["qwen", "qwen-1.5b", "qwen-0.5b"], "qwen"),
        ("mps", 8, ["qwen-mlx", "qwen-mlx-1.5b", "qwen-mlx-0.5b"], "qwen-mlx"),
        ("mps", 4, ["qwen-mlx-1.5b", "qwen-mlx-0.5b"], "qwen-mlx-1.5b"),
    ],
)
def test_the_songwriter_depends_on_device_and_memory(device, memory_gb, fitting, offered):
    assert [writer.name for writer in catalog.songwriters_for(device, memory_gb)] == fitting
    assert catalog.offered_songwriter(device, memory_gb).name == offered


def test_the_largest_songwriter_on_disk_is_used(monkeypatch, folder):
    assert checkpoints.choose_songwriter("cuda", 24).name == "qwen"
    small = replace(SONGWRITERS["qwen-0.5b"], folder=folder)
    monkeypatch.setitem(SONGWRITERS, "qwen-0.5b", small)
    assert checkpoints.choose_songwriter("cuda", 24) == small


def test_every_songwriter_may_be_used_commercially():
    assert {(w.licence, w.may_sell) for w in SONGWRITERS.values()} == {("Apache-2.0", True)}
    assert not any("3B" in writer.title for writer in SONGWRITERS.values())


@pytest.mark.parametrize("name", ["qwen", "qwen-mlx"])
def test_missing_weights_are_named_with_size_and_command(name):
    writer = SONGWRITERS[name]
    with pytest.raises(StudioError) as caught:
        checkpoints.find_songwriter(writer)
    assert caught.value.code == "writer-missing"
    assert writer.title in caught.value.message
    assert writer.size in caught.value.message
    assert caught.value.action == f"Download it with: python app.py fetch {name}"


@pytest.mark.slow
def test_a_downloaded_songwriter_is_found_offline(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hub" / "founders" / "writer")
    script = (
        "import sys, dataclasses, lyrics\n"
        "from models import catalog, checkpoints\n"
        "writer = dataclasses.replace(catalog.SONGWRITERS['qwen'], repo='founders/writer')\n"
        "steps = list(checkpoints.fetch(writer)) if sys.argv[1:] else []\n"
        "print(len(steps), checkpoints.find_songwriter(writer))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    with FakeHub(tmp_path / "hub", lfs_threshold=1024) as hub:
        env["HF_ENDPOINT"] = hub.url
        for argument, offline in (("fetch", "0"), ("", "1")):
            process = subprocess.run(
                [sys.executable, "-c", script, *filter(None, [argument])],
                cwd=ROOT,
                env={**env, "HF_HUB_OFFLINE": offline},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert process.returncode == 0, process.stderr
            count, place = process.stdout.split(maxsplit=1)
            assert (int(count) > 0) == bool(argument)
    assert (tmp_path / "home") in lyrics.Path(place).parents


def drop_config(folder):
    (folder / "config.json").unlink()


def cut_weights(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def another_kind(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_tensor(folder, spoil=None):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    tensor = weights.pop("model.norm.weight")
    if spoil is not None:
        weights["model.norm.weight"] = tensor * spoil
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def forget_marks(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|end|>"))


@pytest.mark.parametrize("engine", ["torch", "mlx"])
@pytest.mark.parametrize(
    ("spoil", "code", "problem"),
    [
        (drop_config, "model-broken", "config.json is missing"),
        (cut_weights, "model-broken", "model.safetensors is cut off"),
        (lambda f: another_kind(f, model_type="llama"), "model-broken", "not that of a Qwen 2.5"),
        (lambda f: another_kind(f, model_file="x.py"), "model-broken", "not that of a Qwen 2.5"),
        (lambda f: another_kind(f, max_position_embeddings="x"), "model-broken", "config.json"),
        (lambda f: another_kind(f, vocab_size=300), "model-mismatch", "words for 300 embeddings"),
        (lambda f: another_kind(f, hidden_size=32), "model-broken", "model.safetensors"),
        (drop_tensor, "model-broken", "model.safetensors"),
        (forget_marks, "model-broken", "marks of a conversation"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "model-broken", "tokenizer.json"),
    ],
)
def test_a_broken_songwriter_is_refused_by_name(engine, spoil, code, problem, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "x.py").write_text("raise SystemExit('it ran')")
    spoil(copy)
    with pytest.raises(StudioError) as caught:
        load(engine, copy)
    assert caught.value.code == code
    assert problem in caught.value.message
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_logits_that_are_not_finite_are_refused(engine, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    drop_tensor(tmp_path / "copy", float("nan"))
    writer = load(engine, tmp_path / "copy")
    with pytest.raises(StudioError, match="no finite numbers"):
        write(writer)
    writer.close()


def test_a_prompt_longer_than_the_context_is_refused(writer):
    with pytest.raises(StudioError) as caught:
        drain(writer.repair(request(), "[verse]\n" + "la la la\n" * 900))
    assert caught.value.code == "lyrics-too-long"
    assert caught.value.facts["limit"] == 2048


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[metal::malloc] Attempting to allocate 99 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_has_its_own_error(error, writer, monkeypatch):

    def fail(ids):
        raise error

    monkeypatch.setattr(writer.model, "forward", fail)
    with pytest.raises(StudioError) as caught:
        write(writer)
    assert caught.value.code == "writer-memory"
    monkeypatch.setattr(writer.model, "forward", lambda ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(writer)


def test_a_request_without_a_seed_is_refused(writer):
    with pytest.raises(ValueError, match="seed"):
        write(writer, seed=None)


def test_different_weights_have_different_fingerprints(folder, tmp_path):
    tiny_writer.write(tmp_path, seed=1)
    prints = {checkpoints.fingerprint(place) for place in (folder, tmp_path)}
    assert len(prints) == 2
    assert all(len(p) == 64 for p in prints)
