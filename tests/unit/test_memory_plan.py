"""Which cards play what: every row of the table, and the estimates behind it."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from core.errors import StudioError
from models import catalog
from models.fast_transformer import FastTransformer
from runtime import device, memory_choice, memory_plan
from runtime.memory_plan import OFFLOADS, PRECISIONS, TWO_B, XL, ModelSizes, plan

SMALL, MIDDLE, LARGE = (size.size_bytes // 2 for size in catalog.PLANNERS)

ROWS = [
    # device, GB, model, planner: precision, offload, planner in turn, fits
    (("cuda", 80, XL, LARGE), ("bf16", "none", False, True)),
    (("cuda", 24, XL, LARGE), ("bf16", "none", False, True)),
    (("cuda", 16, XL, MIDDLE), ("bf16", "none", True, True)),
    (("cuda", 12, XL, MIDDLE), ("bf16", "encoders", True, True)),
    (("cuda", 8, XL, SMALL), ("int8", "encoders", True, True)),
    (("cuda", 6, XL, SMALL), ("int8", "blocks", True, True)),
    (("cuda", 8, TWO_B, SMALL), ("bf16", "none", True, True)),
    (("cuda", 6, TWO_B, SMALL), ("bf16", "encoders", True, True)),
    (("xpu", 16, XL, MIDDLE), ("bf16", "none", True, True)),
    (("mps", 16, TWO_B, SMALL), ("float32", "encoders", True, True)),
    (("mps", 16, TWO_B, 0), ("float32", "encoders", False, True)),
    (("mps", 24, TWO_B, SMALL), ("float32", "none", False, True)),
    (("mps", 16, XL, SMALL), ("float32", "encoders", True, False)),
    (("mps", 32, XL, MIDDLE), ("float32", "none", True, True)),
    (("mps", 64, XL, MIDDLE), ("float32", "none", False, True)),
    (("cpu", 64, XL, SMALL), ("float32", "none", False, True)),
    (("cpu", 32, XL, MIDDLE), ("float32", "none", True, True)),
    (("cpu", 16, XL, SMALL), ("int8", "none", True, True)),
    (("cpu", 8, XL, SMALL), ("int8", "encoders", True, False)),
]
MINI = memory_choice.sizes_of(catalog.MODELS["mini"])


@pytest.mark.parametrize(("given", "expected"), ROWS)
def test_the_plan_of_every_card(given, expected):
    device, memory_gb, sizes, planner = given
    found = plan(device, memory_gb, replace(sizes, planner=planner))
    chosen = (found.precision, found.offload, found.planner_in_turn, found.fits)
    assert chosen == expected, found
    assert f"{found.needed_gb:.1f}" in found.reason
    assert ("smaller model" in found.reason) != found.fits


@pytest.mark.parametrize("memory_gb", [6, 8, 12, 16, 24])
def test_without_int8_a_card_still_has_a_plan(memory_gb):
    found = plan("cuda", memory_gb, replace(XL, planner=SMALL), int8_available=False)
    assert found.fits
    assert found.precision == "bf16"
    assert ("torchao" in found.reason) == (found.offload == "blocks") == (memory_gb < 12)


def test_more_memory_never_makes_a_plan_less_exact_or_unfit():
    best, fitted = ("int8", "bf16"), False
    for memory_gb in range(2, 81):
        found = plan("cuda", memory_gb, replace(XL, planner=MIDDLE))
        assert found.precision in best
        assert found.fits or not fitted
        best, fitted = best[best.index(found.precision) :], found.fits
    assert (best, found.offload, found.planner_in_turn) == (("bf16",), "none", False)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_is_asked_for_is_kept_even_where_it_does_not_fit(precision, offload):
    for memory_gb in (4, 80):
        found = plan("cuda", memory_gb, XL, precision=precision, offload=offload)
        assert (found.precision, found.offload) == (precision, offload)
    assert found.fits


def test_tiles_shrink_before_anything_is_offloaded():
    whole = plan("cuda", 80, XL)
    tight = plan("cuda", (whole.needed_gb - 0.2) / memory_plan.USABLE_GPU, XL)
    assert (whole.tile, tight.tile) == (256, 128)
    assert (tight.precision, tight.offload) == (whole.precision, whole.offload)


def test_float32_is_counted_by_its_own_size():
    wide = plan("mps", 128, XL).needed_gb
    assert wide > 2 * plan("cuda", 128, XL, precision="bf16").needed_gb - 2


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="int4"):
        plan("cuda", 8, XL, precision="int4")


def test_int8_without_torchao_falls_back_by_name():
    found = plan("cuda", 24, XL, precision="int8", int8_available=False)
    assert (found.precision, found.fits) == ("bf16", True)
    assert "int8 needs torchao: pip install" in found.reason


def test_layers_stay_where_there_is_one_memory():
    found = plan("mps", 64, XL, offload="blocks")
    assert found.offload == "none"
    assert "Layers stay" in found.reason


def test_a_gpu_without_bfloat16_computes_in_float32():
    found = plan("cuda", 24, replace(XL, planner=SMALL), native="float32")
    assert (found.precision, found.dtype, found.offload) == ("float32", "float32", "encoders")
    found = plan("cuda", 12, replace(XL, planner=SMALL), native="float32")
    assert (found.precision, found.dtype) == ("int8", "float32")


@pytest.mark.parametrize("native", ["float32", "bf16"])
def test_the_embedded_model_is_loaded_as_it_is_on_every_machine(native):
    for kind, memory_gb in (("cpu", 1), ("cpu", 64), ("mps", 8), ("cuda", 2)):
        found = plan(kind, memory_gb, MINI, native=native)
        assert (found.precision, found.offload, found.tile) == (native, "none", 256)
        assert found.fits
        assert found.fallback is None, "there is nothing to gain"


def test_the_next_smaller_plan_is_part_of_the_plan():
    found = plan("cuda", 12, replace(XL, planner=MIDDLE))
    assert found.fallback.needed_gb <= found.needed_gb - memory_plan.STEP_GB
    assert found.fallback.precision in ("bf16", "int8")
    assert found.fallback.fallback is None
    asked = plan("cuda", 6, XL, precision="bf16")
    assert asked.fallback is None or asked.fallback.precision == "bf16"


def test_a_word_from_the_environment_counts_and_a_wrong_one_is_named(monkeypatch):
    cpu, mini = device.find_device("cpu"), catalog.MODELS["mini"]
    monkeypatch.setenv("ACE_PRECISION", "BF16")
    assert memory_choice.choose(mini, cpu).dtype == "bfloat16"
    assert memory_choice.choose(mini, cpu, precision="float32").dtype == "float32"
    monkeypatch.setenv("ACE_OFFLOAD", "disk")
    with pytest.raises(StudioError, match="ACE_OFFLOAD must be one of auto, none"):
        memory_choice.choose(mini, cpu)


# The estimates behind the table, counted on the meta device from the published configurations.

DIT_XL = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 32,
    "sliding_window": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "in_channels": 192,
    "encoder_hidden_size": 2048,
    "audio_acoustic_hidden_dim": 64,
    "patch_size": 2,
}
DIT_2B = DIT_XL | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
VAE = {
    "encoder_hidden_size": 128,
    "decoder_channels": 128,
    "decoder_input_channels": 64,
    "downsampling_ratios": [2, 4, 4, 6, 10],
    "channel_multiples": [1, 2, 4, 8, 16],
}
TEXT = {
    "vocab_size": 151669,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def count(*models) -> int:
    return sum(tensor.numel() for model in models for tensor in model.state_dict().values())


@pytest.mark.parametrize(("sizes", "config"), [(XL, DIT_XL), (TWO_B, DIT_2B)])
def test_sizes_are_those_of_the_configurations(sizes, config):
    from diffusers import AceStepTransformer1DModel, AutoencoderOobleck
    from diffusers.pipelines.ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        counted = ModelSizes(
            transformer=count(AceStepTransformer1DModel(**config)),
            encoders=count(AceStepConditionEncoder(), Qwen3Model(Qwen3Config(**TEXT))),
            vae=count(AutoencoderOobleck(**VAE)),
            audio_codes=count(AceStepAudioTokenizer(), AceStepAudioTokenDetokenizer()),
            blocks=config["num_hidden_layers"],
        )
    assert counted == sizes


class Peak(TorchDispatchMode):
    """The largest sum of bytes in storages made within the block."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)):
            if id(storage) not in given and storage not in self.known:
                self.known[storage] = True
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage.nbytes())
        return out

    def forget(self, size):
        self.now -= size


def on_meta(kind, **config):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return kind(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_peak_of_a_step_is_that_of_the_estimate(monkeypatch):
    """Two layers of XL, 240 s, both rows of guidance, attention fused as on a GPU."""
    from diffusers import AceStepTransformer1DModel

    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *_, **__: torch.empty_like(query),
    )
    dit = on_meta(AceStepTransformer1DModel, **DIT_XL | {"num_hidden_layers": 2})
    like = {"dtype": torch.bfloat16, "device": "meta"}
    frames, peak = 6000, Peak()
    with torch.no_grad():
        fast = FastTransformer(dit)
        cond = torch.empty(1, 900, 2048, **like)
        song = fast.prepare(cond, cond[:, :1], frames)
        fast.bind(song)
        time = torch.empty(2, **like)
        with peak:
            fast(
                hidden_states=torch.empty(2, frames, 64, **like),
                timestep=time,
                timestep_r=time,
                encoder_hidden_states=song.placeholder.expand(2, -1, -1),
                context_latents=torch.empty(2, frames, 128, **like),
                return_dict=False,
            )
    assert peak.most / 1e9 == pytest.approx(memory_plan.ACTIVATIONS_GB, rel=0.15)


def test_the_peak_of_a_tile_is_that_of_the_estimate():
    from diffusers import AutoencoderOobleck

    vae = on_meta(AutoencoderOobleck, **VAE)
    for tile, gb in memory_plan.TILES_GB.items():
        peak = Peak()
        with torch.no_grad(), peak:
            vae.decoder(torch.empty(1, 64, tile + 24, dtype=torch.bfloat16, device="meta"))
        assert peak.most / 1e9 == pytest.approx(gb, rel=0.1)


def table() -> str:
    """The rows of docs/memory.md."""
    rows = []
    for label, kind, sizes in (
        ("GPU", "cuda", (6, 8, 12, 16, 24)),
        ("Mac", "mps", (16, 24, 32, 64)),
        ("CPU", "cpu", (16, 32, 64)),
    ):
        for memory_gb in sizes:
            planner = catalog.largest_planner(memory_gb) if kind != "cpu" else catalog.PLANNERS[0]
            cells = []
            for model in (XL, TWO_B):
                found = plan(kind, memory_gb, replace(model, planner=planner.size_bytes // 2))
                turns = " in turn" if found.planner_in_turn else ""
                title = found.title.replace("bfloat16", "bf16")
                text = f"{title}; planner {planner.name}{turns} ({found.needed_gb:.1f})"
                cells.append(text if found.fits else f"does not fit ({found.needed_gb:.1f})")
            rows.append(f"| {label}, {memory_gb} GB | {' | '.join(cells)} | not measured |")
    return "\n".join(rows)


def test_the_documentation_lists_which_card_plays_what():
    assert table() in (ROOT / "docs" / "memory.md").read_text("utf-8")
