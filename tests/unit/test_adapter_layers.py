"""Adapter layers: every layout equals PEFT's own output, and removal leaves no trace."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil

import pytest
import torch
import trained
from conftest import drain, song
from peft import LoKrConfig, LoraConfig, get_peft_model
from pydantic import ValidationError
from trained import ATTENTION, first_names, hear, pair, saved, write

from core import results
from core.errors import StudioError
from models import adapter_files, adapter_layers

CLOSE = 1e-5
"""Tolerance relative to the adapter's largest difference. Summing in another order costs 4e-6."""

TRAININGS = {
    "the official trainer's": LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION),
    "rank-stabilised": LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, use_rslora=True),
    "only the feed-forward": LoraConfig(
        r=4, lora_alpha=2, target_modules=["gate_proj", "up_proj", "down_proj"]
    ),
    "every layer, ranks of their own": LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        rank_pattern={"to_q": 2, "time_proj": 3},
        alpha_pattern={"layers.1.self_attn.to_q": 7, "to_q": 5},
    ),
    "the patches": LoraConfig(r=4, lora_alpha=8, target_modules=["proj_in_conv"]),
    "LoKr": LoKrConfig(r=4, alpha=8, target_modules=[*ATTENTION, "gate_proj", "down_proj"]),
    "LoKr of full matrices": LoKrConfig(r=100, alpha=50, target_modules=ATTENTION),
    "LoKr, both sides in two": LoKrConfig(
        r=2, alpha=1, target_modules=ATTENTION, decompose_both=True, decompose_factor=16
    ),
}


@pytest.fixture(scope="module")
def dit(engine):
    return engine.pipe.transformer


@pytest.fixture(scope="module")
def plain(dit):
    return hear(dit)


@pytest.fixture
def stack(dit):
    made = adapter_layers.AdapterStack(dit, "ACE-Step mini")
    yield made
    made.clear()


@pytest.fixture(scope="module")
def official(dit, tmp_path_factory):
    """A folder as the official trainer saves it, and PEFT's output with it."""
    folder = tmp_path_factory.mktemp("official")
    return folder, trained.train(dit, TRAININGS["the official trainer's"], folder)


def weights_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def assert_like(ours, theirs, plain):
    """Assert an equal, and not small, difference from the plain model."""
    difference = (theirs - plain).abs().max()
    assert difference > 0.02
    assert (ours - theirs).abs().max() < CLOSE * max(1, float(difference))


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_peft_adapter_equals_peft(dit, plain, stack, tmp_path, kind):
    theirs = trained.train(dit, TRAININGS[kind], tmp_path)
    adapter = adapter_files.inspect(tmp_path)
    (used,) = drain(stack.apply([(adapter, 1.0)]))
    assert_like(hear(dit), theirs, plain)
    modules = {name.rsplit(".", 1)[0] for name in saved(tmp_path)[0]}
    assert set(adapter.deltas) == modules
    assert used.modules == len(modules)
    assert stack.unused == ()
    assert not adapter.notes


def _peft(tensors, config, folder, infix="", end=".weight"):
    write(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{infix}{first_names(n)}{end}": t for n, t in tensors.items()},
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _alone(tensors, config, folder, *, to="{}", down="lora_A", up="lora_B", flat=False, old=True):
    """A single file that contains alpha."""
    found = {}
    for name, tensor in tensors.items():
        module, part = (first_names(name) if old else name).rsplit(".", 1)
        module = to.format(module.replace(".", "_") if flat else module)
        found[f"{module}.{down if part == 'lora_A' else up}.weight"] = tensor
        found[f"{module}.alpha"] = torch.tensor(float(config["lora_alpha"]))
    return write(folder / "single.safetensors", found)


def _config_beside(tensors, config, folder):
    _peft(tensors, config, folder)
    return (folder / "adapter_model.safetensors").rename(folder / "my song.safetensors")


def _with_metadata(tensors, config, folder):
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    return write(
        folder / "pytorch_lora_weights.safetensors",
        {f"transformer.{name}.weight": tensor for name, tensor in tensors.items()},
        {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)},
    )


LAYOUTS = {
    "PEFT, first names": _peft,
    "PEFT, .default.": lambda t, c, f: _peft(t, c, f, end=".default.weight"),
    "PEFT, decoder.": lambda t, c, f: _peft(t, c, f, infix="decoder."),
    "a file and its config": _config_beside,
    "diffusers": _with_metadata,
    "ComfyUI": lambda t, c, f: _alone(t, c, f, to="diffusion_model.{}"),
    "ComfyUI, decoder.": lambda t, c, f: _alone(t, c, f, to="diffusion_model.decoder.{}"),
    "ComfyUI, down and up": lambda t, c, f: _alone(
        t, c, f, to="diffusion_model.{}", down="lora_down", up="lora_up"
    ),
    "no prefix": _alone,
    "no prefix, diffusers' names": lambda t, c, f: _alone(t, c, f, old=False),
    "kohya": lambda t, c, f: _alone(
        t, c, f, to="lora_unet_{}", down="lora_down", up="lora_up", flat=True
    ),
    "kohya, diffusers' names": lambda t, c, f: _alone(
        t, c, f, to="lora_transformer_{}", down="lora.down", up="lora.up", flat=True, old=False
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_adapter(dit, plain, stack, official, tmp_path, layout):
    folder, theirs = official
    tensors, config = saved(folder)
    adapter = adapter_files.inspect(LAYOUTS[layout](tensors, config, tmp_path))
    (used,) = drain(stack.apply([(adapter, 1.0)]))
    assert_like(hear(dit), theirs, plain)
    assert used.modules == len(tensors) // 2 == 48
    assert not adapter.notes


@pytest.mark.slow
def test_an_adapter_that_diffusers_saved(engine, dit, plain, stack, official, tmp_path):
    from peft.utils import get_peft_model_state_dict

    wrapped = get_peft_model(
        copy.deepcopy(dit), LoraConfig(r=8, lora_alpha=24, target_modules=ATTENTION)
    )
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(1)
            )
    theirs = hear(wrapped)
    metadata = wrapped.peft_config["default"].to_dict()
    layers = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in get_peft_model_state_dict(wrapped).items()
    }
    type(engine.pipe).save_lora_weights(
        tmp_path, layers, transformer_lora_adapter_metadata=metadata
    )
    drain(stack.apply([(adapter_files.inspect(tmp_path), 1.0)]))
    assert_like(hear(dit), theirs, plain)


def test_settings_from_elsewhere_are_used_and_their_absence_is_noted(
    dit, plain, stack, official, tmp_path
):
    folder, theirs = official
    alone = tmp_path / "upload.safetensors"
    shutil.copy(folder / "adapter_model.safetensors", alone)
    configured = adapter_files.inspect(alone, folder / "adapter_config.json")
    drain(stack.apply([(configured, 1.0)]))
    assert_like(hear(dit), theirs, plain)
    bare = adapter_files.inspect(alone)
    assert "adapter_config.json" in bare.notes[0]
    assert bare.sha256 == hashlib.sha256(alone.read_bytes()).hexdigest() != configured.sha256
    drain(stack.apply([(bare, 1.0)]))
    assert (hear(dit) - theirs).abs().max() > 0.02


def test_dora_as_peft_saves_it_is_refused_by_name(dit, tmp_path):
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["layers.0.self_attn.to_q"], use_dora=True
    )
    trained.train(dit, config, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(StudioError, match="DoRA"):
        adapter_files.inspect(tmp_path)


@pytest.mark.parametrize("kind", ["LoKr", "LoKr, both sides in two"])
def test_lycoris_names_are_the_same_lokr(dit, plain, stack, tmp_path, kind):
    theirs = trained.train(dit, TRAININGS[kind], tmp_path)
    tensors, config = saved(tmp_path)
    found = {}
    for name, tensor in tensors.items():
        module, part = first_names(name).rsplit(".", 1)
        module = "lycoris_" + module.replace(".", "_")
        found |= {f"{module}.{part}": tensor, f"{module}.alpha": torch.tensor(config["alpha"])}
    path = write(tmp_path / "lycoris" / "lokr_weights.safetensors", found, {"lokr_config": "{}"})
    drain(stack.apply([(adapter_files.inspect(path), 1.0)]))
    assert_like(hear(dit), theirs, plain)


def test_full_lycoris_matrices_ignore_alpha(dit, plain, stack, tmp_path):
    draw = torch.Generator().manual_seed(5)
    w1, w2 = 0.1 * torch.randn(8, 32, generator=draw), 0.1 * torch.randn(32, 8, generator=draw)
    patches, patch = (
        0.1 * torch.randn(16, 12, generator=draw),
        torch.randn(16, 16, 2, generator=draw),
    )
    path = write(
        tmp_path / "lokr_weights.safetensors",
        {
            "lycoris_layers_2_self_attn_q_proj.lokr_w1": w1,
            "lycoris_layers_2_self_attn_q_proj.lokr_w2": w2,
            "lycoris_layers_2_self_attn_q_proj.alpha": torch.tensor(10000.0),
            "lycoris_proj_in_1.lokr_w1": patches,
            "lycoris_proj_in_1.lokr_w2": patch,
        },
    )
    merged = copy.deepcopy(dit)
    merged.layers[2].self_attn.to_q.weight.data += torch.kron(w1, w2)
    merged.proj_in_conv.weight.data += torch.kron(patches[:, :, None], patch)
    drain(stack.apply([(adapter_files.inspect(path), 1.0)]))
    assert_like(hear(dit), hear(merged), plain)


def test_a_full_delta_is_added_as_it_is(dit, plain, stack, tmp_path):
    delta = 0.02 * torch.randn(704, 256, generator=torch.Generator().manual_seed(6))
    path = write(
        tmp_path / "full.safetensors", {"diffusion_model.layers.3.mlp.up_proj.diff": delta}
    )
    merged = copy.deepcopy(dit)
    merged.layers[3].mlp.up_proj.weight.data += delta
    drain(stack.apply([(adapter_files.inspect(path), 1.0)]))
    assert_like(hear(dit), hear(merged), plain)


def test_every_layer_can_be_adapted_and_changes_the_output(dit, plain, stack, tmp_path):
    kinds = (torch.nn.Linear, torch.nn.Conv1d)
    real = {
        name: (len(module.weight), module.weight[0].numel())
        for name, module in dit.named_modules()
        if isinstance(module, kinds)
    }
    assert adapter_layers.shapes(dit.config) == real
    for i, (name, (out, into)) in enumerate(real.items()):
        draw = torch.Generator().manual_seed(i)
        tensors = {
            f"{name}.lora_A.weight": torch.randn(2, into, generator=draw),
            f"{name}.lora_B.weight": torch.randn(out, 2, generator=draw),
        }
        adapter = adapter_files.inspect(write(tmp_path / f"{i}.safetensors", tensors))
        assert set(adapter.deltas) == {name}
        drain(stack.apply([(adapter, 1.0)]))
        assert stack.unused == (name,)
        assert not torch.equal(hear(dit), plain), name
        assert stack.unused == ()


@pytest.fixture(scope="module")
def three(dit, tmp_path_factory):
    """Three adapters of different kinds that share layers."""
    tmp_path = tmp_path_factory.mktemp("three")
    for i, kind in enumerate(("the official trainer's", "LoKr", "every layer, ranks of their own")):
        trained.train(dit, TRAININGS[kind], tmp_path / str(i), seed=i)
    return [adapter_files.inspect(tmp_path / str(i)) for i in range(3)]


def test_three_adapters_leave_the_weights_unchanged(dit, plain, stack, three):
    before, names = weights_hash(dit), set(dit.state_dict())
    modules = [name for name, _ in dit.named_modules()]
    outputs = []
    for strengths in ((1.0, 0.6, 1.5), (0.3, 1.0, 0.1), (1.0, 0, 0), (0.3, 1.0, 0.1), (0, 0, 0)):
        used = drain(stack.apply(list(zip(three, strengths, strict=True))))
        outputs.append(hear(dit))
        assert {u.sha256: u.strength for u in used} == {
            a.sha256: s for a, s in zip(three, strengths, strict=True) if s
        }
        assert weights_hash(dit) == before
        assert set(dit.state_dict()) == names
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[4], plain)
    drain(stack.apply([(adapter, 1.0) for adapter in three]))
    stack.clear()
    assert torch.equal(hear(dit), plain)
    assert [name for name, _ in dit.named_modules()] == modules
    assert not any(module._forward_hooks for module in dit.modules())


def test_two_adapters_equal_peft(dit, plain, stack, tmp_path):
    wrapped = get_peft_model(copy.deepcopy(dit), TRAININGS["the official trainer's"], "one")
    wrapped.add_adapter("two", TRAININGS["only the feed-forward"])
    wrapped.base_model.set_adapter(["one", "two"])
    draw = torch.Generator().manual_seed(8)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
    wrapped.save_pretrained(tmp_path)
    theirs = hear(wrapped)
    drain(stack.apply([(adapter_files.inspect(tmp_path / name), 1.0) for name in ("one", "two")]))
    assert_like(hear(dit), theirs, plain)


def test_their_order_makes_no_difference(dit, stack, three):
    outputs = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        drain(stack.apply([(three[i], 1.0) for i in order]))
        outputs.append(hear(dit))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_strength_is_a_factor_of_the_delta(dit, stack, official, tmp_path):
    folder, _ = official
    tensors, config = saved(folder)
    half = adapter_files.inspect(_peft(tensors, {**config, "lora_alpha": 8}, tmp_path))
    drain(stack.apply([(half, 1.0)]))
    softly = hear(dit)
    drain(stack.apply([(adapter_files.inspect(folder), 0.5)]))
    assert torch.allclose(hear(dit), softly, atol=CLOSE)


def test_the_same_file_twice_is_one(dit, stack, official, tmp_path):
    folder, theirs = official
    shutil.copytree(folder, tmp_path / "copy")
    one, other = adapter_files.inspect(folder), adapter_files.inspect(tmp_path / "copy")
    used = drain(stack.apply([(one, 0.5), (other, 1.0)]))
    assert [(u.sha256, u.strength) for u in used] == [(one.sha256, 1.0)]
    assert torch.allclose(hear(dit), theirs, atol=CLOSE)


def test_failing_or_cancelled_apply_changes_nothing(dit, stack, official, three, tmp_path):
    drain(stack.apply([(three[0], 1.0)]))
    playing, used = hear(dit), stack.used
    wide = adapter_files.inspect(write(tmp_path / "wide.safetensors", pair(into=2048, out=2048)))
    shutil.copytree(three[1].path.parent, tmp_path / "gone")
    gone = adapter_files.inspect(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    for chosen, code in (
        ([(three[2], 1.0), (wide, 1.0)], "adapter-wrong-base"),
        ([(three[2], 1.0), (gone, 0.0), (gone, 1.0)], "adapter-missing"),
        ([(three[2], 3.1)], "value-out-of-range"),
        ([(three[2], float("nan"))], "value-out-of-range"),
        ([(three[2], True)], "value-out-of-range"),
    ):
        with pytest.raises(StudioError) as raised:
            drain(stack.apply(chosen))
        assert raised.value.code == code
    stopped = stack.apply([(three[1], 1.0), (three[2], 1.0)])
    seen = [(p.stage, p.step, p.steps) for p in (next(stopped), next(stopped))]
    assert seen == [("Reading adapters", 0, 2), ("Reading adapters", 1, 2)]
    stopped.close()
    assert stack.used == used
    assert torch.equal(hear(dit), playing)


def test_strengths_change_without_reading_the_file_again(dit, stack, three, monkeypatch):
    drain(stack.apply([(three[0], 1.0), (three[1], 1.0)]))
    monkeypatch.setattr(adapter_files, "read", lambda adapter: pytest.fail("read again"))
    drain(stack.apply([(three[0], 0.2)]))


@pytest.mark.parametrize("spoil", ["change", "cut"])
def test_a_file_that_changed_after_it_was_chosen_is_refused(stack, tmp_path, spoil):
    path = write(tmp_path / "mine.safetensors", pair())
    adapter, intact = adapter_files.inspect(path), path.read_bytes()
    path.write_bytes(intact[:-1] + b"\1" if spoil == "change" else intact[: len(intact) // 2])
    with pytest.raises(StudioError, match="changed after it was chosen"):
        drain(stack.apply([(adapter, 1.0)]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_matrices_are_applied_as_what_they_stand_for(dit, stack, tmp_path, dtype):
    small = {name: tensor.to(dtype) for name, tensor in pair().items()}
    wide = {name: tensor.float() for name, tensor in small.items()}
    outputs = []
    for name, tensors in (("small", small), ("wide", wide)):
        adapter = adapter_files.inspect(write(tmp_path / f"{name}.safetensors", tensors))
        drain(stack.apply([(adapter, 1.0)]))
        outputs.append(hear(dit))
    assert torch.equal(*outputs)


def test_nan_and_all_zero_adapters_are_refused(stack, tmp_path):
    broken = pair()
    broken["layers.0.self_attn.q_proj.lora_A.weight"][1, 1] = float("nan")
    huge = {name: 1e3 * tensor for name, tensor in pair().items()}
    huge["layers.0.self_attn.q_proj.alpha"] = torch.tensor(1e38)
    untrained = pair()
    untrained["layers.0.self_attn.q_proj.lora_B.weight"].zero_()
    for i, (tensors, code) in enumerate(
        [
            (broken, "adapter-unreadable"),
            (huge, "adapter-unreadable"),
            (untrained, "adapter-refused"),
        ]
    ):
        adapter = adapter_files.inspect(write(tmp_path / f"{i}.safetensors", tensors))
        with pytest.raises(StudioError) as raised:
            drain(stack.apply([(adapter, 1.0)]))
        assert raised.value.code == code


XL = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "encoder_hidden_size": 2048,
    "in_channels": 192,
    "patch_size": 2,
}
"""The fields of XL's transformer config that determine shapes."""


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (pair(into=2048, out=2048), "made for width 2048, and this model has 2560"),
        (
            pair("layers.0.cross_attn.o_proj", into=2048, out=2048),
            "made for width 2048, and this model has 2560",
        ),
        (
            pair("layers.39.self_attn.q_proj", into=2560, out=4096),
            "made for 40 layers or more, and this model has 32",
        ),
        (
            pair("layers.0.mlp.up_proj", into=2560, out=9000),
            "its layers.0.mlp.up_proj is 2560 x 9000, and this model's is 2560 x 9728",
        ),
    ],
)
def test_an_adapter_for_another_base_names_the_difference(tmp_path, tensors, problem):
    adapter = adapter_files.inspect(write(tmp_path / "theirs.safetensors", tensors))
    with pytest.raises(StudioError) as raised:
        adapter_layers.check_fit(adapter, adapter_layers.shapes(XL), "ACE-Step 1.5 XL SFT")
    assert raised.value.code == "adapter-wrong-base"
    assert problem in raised.value.message
    assert str(raised.value).startswith("theirs.safetensors does not fit ACE-Step 1.5 XL SFT: ")


def test_an_adapter_for_xl_fits_xl(tmp_path):
    tensors = pair("diffusion_model.layers.31.self_attn.q_proj", into=2560, out=4096)
    tensors |= pair("diffusion_model.condition_embedder", into=2048, out=2560)
    adapter = adapter_files.inspect(write(tmp_path / "xl.safetensors", tensors))
    adapter_layers.check_fit(adapter, adapter_layers.shapes(XL), "ACE-Step 1.5 XL SFT")


def test_bfloat16_equals_float32_to_eight_bits(dit, plain, official):
    folder, theirs = official
    narrow = copy.deepcopy(dit).to(torch.bfloat16)
    before = weights_hash(narrow)
    bare = hear(narrow, torch.bfloat16).float()
    stack = adapter_layers.AdapterStack(narrow, "mini")
    drain(stack.apply([(adapter_files.inspect(folder), 1.0)]))
    ours = hear(narrow, torch.bfloat16).float()
    far = torch.stack([(ours - bare).flatten(), (theirs - plain).flatten()])
    assert torch.corrcoef(far)[0, 1] > 0.995
    stack.clear()
    assert torch.equal(hear(narrow, torch.bfloat16).float(), bare)
    assert weights_hash(narrow) == before


def test_adapters_move_with_the_model(dit, official):
    folder, theirs = official
    moved = copy.deepcopy(dit)
    stack = adapter_layers.AdapterStack(moved, "mini")
    drain(stack.apply([(adapter_files.inspect(folder), 1.0)]))
    moved.to(torch.float64)
    assert torch.allclose(hear(moved, torch.float64).float(), theirs, atol=1e-4)


@pytest.mark.slow
def test_removing_an_adapter_restores_the_song_exactly(engine, stack, official):
    def render():
        return drain(engine.text_to_music(song(inference_steps=2))).sound

    first = render()
    (used,) = drain(stack.apply([(adapter_files.inspect(official[0]), 1.2)]))
    adapted = render()
    assert stack.unused == ()
    drain(stack.apply([(adapter_files.inspect(official[0]), 0.0)]))
    assert (render() == first).all()
    assert (adapted != first).mean() > 0.9
    assert results.AdapterUsed.model_validate_json(used.model_dump_json()) == used
    assert (used.rank, used.modules, used.strength) == (8, 48, 1.2)


@pytest.mark.parametrize(
    "change",
    [{"sha256": "../x"}, {"strength": 9}, {"strength": "nan"}, {"path": "/etc"}, {"modules": 0}],
)
def test_adapter_records_from_files_are_validated(change):
    valid = {"name": "a", "sha256": "0" * 64, "strength": 1.0, "rank": 8, "modules": 48}
    results.AdapterUsed.model_validate(valid)
    with pytest.raises(ValidationError):
        results.AdapterUsed.model_validate({**valid, **change})
