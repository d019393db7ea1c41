"""Models on disk: finding, checking and downloading them, and errors that name the damage."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from conftest import drain, run_app
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file

from core.errors import StudioError
from models import acestep, catalog, checkpoints

MINI = catalog.MODELS["mini"].folder


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded model to damage."""
    folder = tmp_path / "founders-model"
    shutil.copytree(MINI, folder)
    return folder


def load(folder):
    model = catalog.choose(str(folder))
    return drain(acestep.Engine.load(model, folder, "cpu", "float32"))


def refused(folder, code):
    with pytest.raises(StudioError) as caught:
        load(folder)
    assert caught.value.code == code, caught.value
    assert str(folder.parent) not in str(caught.value), "no local path in the message"
    return str(caught.value)


def test_every_catalog_model_has_a_licence_size_and_sound_defaults():
    for model in catalog.MODELS.values():
        assert model.licence
        assert model.may_sell is not None
        assert model.size_bytes > 10**6
        assert model.longest_s == (240 if model.name == "mini" else 600)
    assert {m.name for m in catalog.MODELS.values() if m.edits_tracks} == {"xl-base", "2b-base"}
    sft, turbo = catalog.MODELS["xl-sft"], catalog.MODELS["xl-turbo"]
    assert (sft.steps, sft.guidance, sft.shift) == (27, 7.0, 1.0)
    assert (turbo.steps, turbo.guidance, turbo.shift) == (8, 1.0, 3.0)


@pytest.mark.parametrize(("version", "trained"), [("base", True), ("sft", False)])
def test_a_folder_with_a_base_model_edits_tracks(tmp_path, version, trained):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps({"model_version": version}))
    assert catalog.choose(str(tmp_path)).edits_tracks is trained


def test_each_device_has_its_default_model():
    assert catalog.default_name("cpu") == "mini"
    assert catalog.default_name("cuda") == catalog.default_name("mps") == "xl-sft"


def test_the_embedded_model_is_small_and_its_listed_size_is_right():
    files = [f for f in MINI.glob("**/*") if f.is_file()]
    assert max(f.stat().st_size for f in files) < 24_000_000
    assert sum(f.stat().st_size for f in files) < 62_000_000
    listed = catalog.MODELS["mini"].size_bytes
    assert abs(sum(f.stat().st_size for f in files) - listed) < 0.1 * listed


@pytest.mark.parametrize("name", ["nobody", "../etc", "a/b/c", "x/../y", ""])
def test_an_unknown_model_name_lists_the_known_ones(name):
    with pytest.raises(StudioError) as caught:
        catalog.choose(name)
    assert caught.value.code == "model-unknown"
    assert "mini, xl-sft, xl-turbo" in caught.value.action


def test_a_folder_and_a_hub_id_are_models_with_unknown_licence(copy):
    local = catalog.choose(str(copy))
    assert local.folder == copy
    assert local.licence == "unknown"
    assert local.may_sell is None
    assert catalog.choose("somebody/something").repo == "somebody/something"


def test_a_turbo_folder_gets_turbo_defaults(copy):
    config = copy / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"is_turbo": false', '"is_turbo": true'))
    model = catalog.choose(str(copy))
    assert (model.steps, model.guidance, model.shift) == (8, 1.0, 3.0)


def weights(folder, part):
    return sorted((folder / part).glob("*.safetensors"))[0]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "condition_encoder"])
def test_truncated_weights_are_refused_before_loading(copy, part):
    path = weights(copy, part)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{part}/{path.name}" in refused(copy, "model-broken")


def test_other_damage_names_the_file(copy):
    path = weights(copy, "transformer")
    intact = path.read_bytes()
    for damage in (b"", intact[:5], struct.pack("<Q", 2**60) + intact[8:], b"\x08" + b"\0" * 99):
        path.write_bytes(damage)
        assert f"transformer/{path.name}" in refused(copy, "model-broken")
    path.write_bytes(intact)
    config = copy / "vae" / "config.json"
    config.write_text("{half")
    assert "vae/config.json" in refused(copy, "model-broken")


def test_missing_files_are_named(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer/tokenizer.json" in refused(copy, "model-broken")
    shutil.rmtree(copy / "transformer")
    assert "transformer/config.json" in refused(copy, "model-broken")


def change(folder, part, edit):
    """Edit the tensors of a part in place, each in its own file."""
    for path in sorted((folder / part).glob("*.safetensors")):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_tensor_is_refused(copy):
    change(copy, "transformer", lambda t: t.pop("proj_out_conv.bias", None))
    assert "proj_out_conv.bias" in refused(copy, "model-broken")


def test_nan_in_the_weights_is_refused(copy):
    def spoil(tensors):
        if "null_condition_emb" in tensors:
            tensors["null_condition_emb"].view(-1)[3] = float("nan")

    change(copy, "condition_encoder", spoil)
    assert "null_condition_emb" in refused(copy, "model-broken")


def test_an_empty_silence_latent_is_refused(copy):
    def silence(tensors):
        if "silence_latent" in tensors:
            tensors["silence_latent"] = torch.zeros_like(tensors["silence_latent"])

    change(copy, "condition_encoder", silence)
    assert "silence latent" in refused(copy, "model-broken")


def test_parts_of_different_models_are_refused(copy):
    config = copy / "vae" / "config.json"
    settings = json.loads(config.read_text())
    settings["sampling_rate"] *= 2
    config.write_text(json.dumps(settings))
    assert "latent frames a second 50 against 25" in refused(copy, "model-mismatch")


def test_the_fingerprint_changes_with_the_weights(copy):
    before = checkpoints.fingerprint(copy)
    assert before == checkpoints.fingerprint(MINI)
    path = weights(copy, "transformer")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoints.fingerprint(copy) != before


@pytest.fixture
def hub(copy):
    """A local model hub that serves the copy as founders/model."""
    root = copy.parent / "hub"
    (root / "founders").mkdir(parents=True)
    shutil.move(copy, root / "founders" / "model")
    (root / "founders" / "model" / "evil.py").write_text("raise SystemExit")
    (root / "founders" / "model" / "vae" / "old.bin").write_bytes(b"pickle")
    with FakeHub(root, lfs_threshold=100_000) as hub:
        yield hub


def online(hub, tmp_path):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HTTP_PROXY": "",
        "HTTPS_PROXY": "",
    }


def test_a_model_is_downloaded_on_first_use_only(hub, tmp_path):
    out = tmp_path / "song.wav"
    args = (
        *("generate", "--model", "founders/model", "--planner", "none", "--prompt", "lofi"),
        *("--duration-s", "5", "--inference-steps", "1", "--seed", "1", "--out", str(out)),
        "--json",
    )
    first = run_app(*args, **online(hub, tmp_path))
    assert first.returncode == 0, first.stderr
    take = json.loads(first.stdout)
    assert take["model"]["revision"] == hub.commit("founders/model")
    assert take["model"]["sha256"] == checkpoints.fingerprint(MINI)
    for name in ("transformer", "vae", "tokenizer"):
        assert f"Fetching {name}/" in first.stderr
    assert not [r for r in hub.log if r.path.endswith((".py", ".bin"))]
    bodies = len(hub.log)
    second = run_app(*args, **online(hub, tmp_path))
    assert second.returncode == 0, second.stderr
    assert len(hub.log) == bodies, "no request for a model already downloaded"


def test_offline_error_names_the_model_its_size_and_the_command(tmp_path):
    failed = run_app(
        *("generate", "--model", "xl-sft", "--device", "cpu", "--prompt", "x"),
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
    assert failed.returncode == 1
    for text in ("ACE-Step 1.5 XL SFT", "11.5 GB", "python app.py fetch xl-sft"):
        assert text in failed.stderr
    assert "Traceback" not in failed.stderr


def test_unreachable_hub_and_unknown_repository_are_distinguished(hub, tmp_path):
    wrong = run_app("fetch", "founders/nothing", **online(hub, tmp_path))
    assert wrong.returncode == 2
    assert "hub-unknown" in wrong.stderr
    hub.stop()
    offline = run_app("fetch", "founders/model", **online(hub, tmp_path))
    assert offline.returncode == 2
    assert "model-missing" in offline.stderr
    assert "Traceback" not in offline.stderr
