"""Checkpoints in the layout of ACE-Step's authors: loaded exactly, every tensor accounted for."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile

import authors_writer
import pytest
import torch
from conftest import drain, run_app, song
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file

from core.errors import StudioError
from models import acestep, adapter_layers, authors_layout, catalog, checkpoints

MINI = catalog.MODELS["mini"].folder


@pytest.fixture(scope="session")
def original(engine, tmp_path_factory):
    """The embedded model in the authors' layout, with the shared parts in the folder above."""
    home = tmp_path_factory.mktemp("authors")
    authors_writer.copy_shared_parts(MINI, home)
    return authors_writer.write(engine.pipe, home / "acestep-mini")


@pytest.fixture
def copy(original, tmp_path):
    """The same to break."""
    shutil.copytree(original.parent, tmp_path / "home")
    return tmp_path / "home" / original.name


def load(name, dtype="float32"):
    model = catalog.choose(str(name))
    return drain(acestep.Engine.load(model, model.folder, "cpu", dtype))


def refused(folder, *words):
    with pytest.raises(StudioError) as raised:
        load(folder)
    assert raised.value.code == "model-broken"
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert str(folder.parent) not in str(raised.value)


def edit(folder, change):
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def everything(pipe):
    """All parameters and buffers of a pipeline, those included that no file stores."""
    return {
        f"{part}.{name}": tensor
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def test_mini_in_the_authors_layout_is_bit_equal(engine, original):
    loaded = load(original)
    ours, theirs = everything(loaded.pipe), everything(engine.pipe)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    request = song(inference_steps=2)
    latents = []
    with torch.inference_mode():
        for each in (engine, loaded):
            conditions, _ = each.conditions(request)
            latents.append(drain(each.denoise(conditions, request)))
    assert torch.equal(*latents)


def test_bfloat16_has_the_number_types_of_the_diffusers_layout(original):
    ours, theirs = load(original, "bfloat16"), load(MINI, "bfloat16")
    expected = {name: tensor.dtype for name, tensor in everything(theirs.pipe).items()}
    assert {name: tensor.dtype for name, tensor in everything(ours.pipe).items()} == expected


def test_shards_and_a_file_of_any_name_are_read(engine, copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for number, half in enumerate(halves):
        save_file({name: tensors[name] for name in half}, copy / f"model-{number}.safetensors")
    index = {name: f"model-{number}.safetensors" for number in (0, 1) for name in halves[number]}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert everything(load(copy).pipe).keys() == everything(engine.pipe).keys()
    (copy / "model-1.safetensors").unlink()
    refused(copy, "model-1.safetensors")
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model-0.safetensors").unlink()
    save_file(tensors, copy / "my tune.safetensors")
    assert load(copy).model.title == copy.name
    assert load(copy / "my tune.safetensors").model.title == "my tune.safetensors"


def test_one_of_several_checkpoints_has_to_be_named(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    for name in ("bright", "dark"):
        tensors["null_condition_emb"] = torch.full_like(tensors["null_condition_emb"], len(name))
        save_file(tensors, copy / f"{name}.safetensors")
    refused(copy, "bright.safetensors, dark.safetensors", "choose one")
    dark = load(copy / "dark.safetensors").pipe.condition_encoder
    assert float(dark.null_condition_emb.max()) == len("dark")


def test_every_tensor_is_accounted_for_by_name(copy):
    kept = (copy / "model.safetensors").read_bytes()
    changes = {
        "norm_out.weight": lambda t: t.pop("decoder.norm_out.weight"),
        "audio_head.weight": lambda t: t.update({"audio_head.weight": torch.zeros(2)}),
        "extra.bias": lambda t: t.update({"decoder.extra.bias": torch.zeros(2)}),
        "null_condition_emb in the shape": lambda t: t.update(
            {"null_condition_emb": torch.zeros(1, 1, 8)}
        ),
    }
    for words, change in changes.items():
        edit(copy, change)
        refused(copy, words)
        (copy / "model.safetensors").write_bytes(kept)
    (copy / "model.safetensors").write_bytes(kept[:-1])
    refused(copy, "model.safetensors")
    (copy / "model.safetensors").write_bytes(kept)
    config = json.loads((copy / "config.json").read_text())
    del config["fsq_input_levels"], config["num_attention_heads"]
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "config.json", "num_attention_heads")


def test_numbers_that_are_not_finite_are_refused(copy):
    edit(copy, lambda t: t["decoder.norm_out.weight"].fill_(float("nan")))
    refused(copy, "norm_out.weight")


def test_the_silence_latent_is_read_in_either_order_and_type(tmp_path):
    model, silence = catalog.MODELS["2b-sft"], torch.randn(1, 40, 64)
    for stored in (silence, silence.transpose(1, 2), silence.transpose(1, 2).contiguous()):
        torch.save(stored, tmp_path / "silence.pt")
        found = authors_layout.read_silence(model, tmp_path / "silence.pt", 64)
        assert torch.equal(found, silence)
    torch.save(silence.bfloat16(), tmp_path / "silence.pt")
    found = authors_layout.read_silence(model, tmp_path / "silence.pt", 64)
    assert torch.equal(found, silence.bfloat16().float())


class _Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_nothing_is_unpickled(copy, tmp_path):
    mark = tmp_path / "executed"
    silence = copy / "silence_latent.pt"
    torch.save({"silence": torch.ones(1, 64, 40), "payload": _Payload(mark)}, silence)
    load(copy)
    for content in (pickle.dumps(_Payload(mark)), b"", b"PK"):
        silence.write_bytes(content)
        refused(copy, "silence_latent.pt")
    with zipfile.ZipFile(silence, "w") as archive:
        archive.writestr("silence/data.pkl", pickle.dumps([1, 2, 3]))
        archive.writestr("silence/data/0", bytes(16))
    refused(copy, "silence_latent.pt")
    assert not mark.exists()


def test_settings_of_xl_belong_to_the_right_parts():
    config = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
        "sliding_window": 128,
        "encoder_hidden_size": 2048,
        "encoder_intermediate_size": 6144,
        "encoder_num_attention_heads": 16,
        "encoder_num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "in_channels": 192,
        "audio_acoustic_hidden_dim": 64,
        "patch_size": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 16,
        "text_hidden_dim": 1024,
        "timbre_hidden_dim": 64,
        "model_version": "turbo",
        "num_lyric_encoder_hidden_layers": 8,
        "num_timbre_encoder_hidden_layers": 4,
    }
    parts = authors_layout.component_configs(config)
    assert parts["transformer"]["hidden_size"] == 2560
    assert parts["transformer"]["encoder_hidden_size"] == 2048
    assert parts["transformer"]["is_turbo"]
    for part in ("condition_encoder", "audio_tokenizer", "audio_token_detokenizer"):
        assert parts[part]["hidden_size"] == 2048
        assert parts[part]["num_attention_heads"] == 16
    assert parts["audio_tokenizer"]["fsq_dim"] == 2048
    assert parts["audio_tokenizer"]["layer_types"] == ["sliding_attention", "full_attention"]


def test_both_layouts_describe_the_same_model(original):
    assert checkpoints.codebook(original) == checkpoints.codebook(MINI)
    shapes = [adapter_layers.shapes(checkpoints.transformer_config(f)) for f in (original, MINI)]
    assert shapes[0] == shapes[1]


def test_turbo_is_recognised_by_its_own_configuration(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_version": "turbo"}))
    model = catalog.choose(str(copy))
    assert (model.steps, model.guidance, model.shift) == (8, 1.0, 3.0)


def test_hub_ids_of_the_table_have_the_tables_defaults():
    for name in ("2b-sft", "2b-base", "2b-turbo"):
        assert catalog.choose(catalog.MODELS[name].repo) == catalog.MODELS[name]


@pytest.fixture
def hub(original, tmp_path):
    """A model hub with a fine-tune, and the authors' repository of shared parts."""
    root = tmp_path / "hub"
    shutil.copytree(original, root / "somebody" / "tune")
    umbrella = root / "ACE-Step" / "Ace-Step1.5"
    authors_writer.copy_shared_parts(MINI, umbrella)
    shutil.copytree(original, umbrella / "acestep-v15-turbo")
    (root / "somebody" / "tune" / "modeling.py").write_text("raise SystemExit")
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


def test_a_hub_id_brings_its_shared_parts_and_plays(hub, tmp_path):
    out = tmp_path / "song.wav"
    run = run_app(
        *("generate", "--model", "somebody/tune", "--planner", "none", "--prompt", "lofi"),
        *("--duration-s", "5", "--inference-steps", "1", "--seed", "1", "--out", str(out)),
        *("--json", "--device", "cpu"),
        **online(hub, tmp_path),
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["model"]["revision"] == hub.commit("somebody/tune")
    assert not [request for request in hub.log if request.path.endswith(".py")]
    assert out.stat().st_size > 100_000


def test_a_2b_row_brings_its_folder_and_the_shared_parts(hub, tmp_path):
    run = run_app("fetch", "2b-turbo", **online(hub, tmp_path))
    assert run.returncode == 0, run.stderr
    (snapshot,) = (tmp_path / "hf").glob("hub/*/snapshots/*")
    folder = snapshot / "acestep-v15-turbo"
    assert catalog.MODELS["2b-turbo"].missing(folder) is None
    assert authors_layout.has_shared_parts(folder)
