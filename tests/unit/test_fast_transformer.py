"""The fast transformer against diffusers' own, tiny and with random weights."""

from __future__ import annotations

import copy

import pytest
import recorded_graph
import tiny_transformer
import torch
from tiny_transformer import by_fast, by_stock, inputs
from torch.nn import functional

from models import fast_transformer
from models.fast_transformer import FastTransformer


@pytest.fixture(scope="module")
def stock():
    return tiny_transformer.make()


@pytest.fixture
def fast(stock):
    return FastTransformer(copy.deepcopy(stock))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("frames", [2, 15, 16, 17, 32, 33, 101, 250])
def test_velocities_equal_diffusers_up_to_rounding(stock, fast, frames, rows):
    shared, cond, null = inputs(frames, rows)
    with torch.inference_mode():
        want = by_stock(stock, shared, cond, null)
        got = by_fast(fast, shared, fast.prepare(cond, null, frames))
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) < 5e-6


def test_two_songs_can_alternate_step_by_step(stock, fast):
    songs = [inputs(40, 2, seed, tokens) for seed, tokens in ((1, 9), (2, 30))]
    with torch.inference_mode():
        kept = [fast.prepare(cond, null, 40) for _, cond, null in songs]
        for i in (0, 1, 0):
            want, got = by_stock(stock, *songs[i]), by_fast(fast, songs[i][0], kept[i])
            assert torch.allclose(got, want, atol=1e-5)


def test_the_condition_is_projected_once_a_song_and_no_dense_mask_is_built(fast, monkeypatch):
    from diffusers.models.transformers import ace_step_transformer as library

    def refuse(**_):
        raise AssertionError("a dense mask")

    monkeypatch.setattr(library, "_create_4d_mask", refuse)
    transformer = fast._transformer
    projected = []
    for layer in transformer.layers:
        for projection in (layer.cross_attn.to_k, layer.cross_attn.to_v):
            projection.register_forward_hook(lambda *_: projected.append(1))
    shared, cond, null = inputs(60, 2)
    with torch.inference_mode():
        constants = fast.prepare(cond, null, 60)
        once = len(projected)
        for _ in range(3):
            by_fast(fast, shared, constants)
    assert len(projected) == once == 3 * len(transformer.layers)


def test_no_kernel_is_given_a_mask_with_grouped_heads_or_a_dense_one(fast, monkeypatch):
    """torch has no fused kernel for either on most cards and computes the whole matrix instead."""
    calls = []
    real = functional.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, enable_gqa=False, **rest):
        calls.append((attn_mask, enable_gqa))
        return real(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **rest)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    shared, cond, null = inputs(6000, 2)
    with torch.inference_mode():
        by_fast(fast, shared, fast.prepare(cond, null, 6000))
    assert len(calls) == 2 * len(fast._transformer.layers)
    masks = [mask for mask, grouped in calls if mask is not None and not grouped]
    assert len(masks) == len(fast._transformer.layers) / 2
    assert all(mask.shape == (375, 1, 2 * 8, 3 * 8) for mask in masks)
    assert all(mask is None for mask, grouped in calls if grouped)


def test_keys_are_repeated_where_no_kernel_takes_grouped_heads(stock, fast, monkeypatch):
    """As with float32 on CUDA, or on a card before Ampere."""
    calls = []
    real = functional.scaled_dot_product_attention

    def record(*tensors, enable_gqa=False, **rest):
        calls.append(enable_gqa)
        return real(*tensors, enable_gqa=enable_gqa, **rest)

    monkeypatch.setattr(fast_transformer, "_takes_grouped_heads", lambda _: False)
    shared, cond, null = inputs(50, 2)
    with torch.inference_mode():
        want = by_stock(stock, shared, cond, null)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
        got = by_fast(fast, shared, fast.prepare(cond, null, 50))
    assert torch.allclose(got, want, atol=1e-5)
    assert calls
    assert not any(calls)


@pytest.mark.parametrize(
    ("dtype", "capability", "takes"),
    [
        (torch.bfloat16, (8, 9), True),
        (torch.float16, (7, 5), False),
        (torch.float32, (9, 0), False),
    ],
)
def test_grouped_heads_need_flash_attention_on_cuda(monkeypatch, dtype, capability, takes):
    class OnCuda(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    x = torch.zeros(1, dtype=dtype)
    assert fast_transformer._takes_grouped_heads(x)
    assert fast_transformer._takes_grouped_heads(x.as_subclass(OnCuda)) == takes


def test_adapters_reach_every_layer(stock, fast):
    """Hooks on the projections, as adapters are applied, change both ways equally."""
    shared, cond, null = inputs(50, 2)
    with torch.inference_mode():
        before = by_stock(stock, shared, cond, null)
        for transformer in (copied := copy.deepcopy(stock), fast._transformer):
            for name, module in transformer.named_modules():
                if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "condition_embedder")):
                    module.register_forward_hook(lambda _, __, out: out.mul_(1.3))
        want = by_stock(copied, shared, cond, null)
        got = by_fast(fast, shared, fast.prepare(cond, null, 50))
    assert float((want - before).abs().max()) > 0.01
    assert torch.allclose(got, want, atol=1e-5)


def test_the_weights_keep_their_names_and_numbers(stock, fast):
    weights = fast._transformer.state_dict()
    assert weights.keys() == stock.state_dict().keys()
    assert all(torch.equal(weights[name], x) for name, x in stock.state_dict().items())
    norms = [m for m in fast._transformer.modules() if type(m).__name__ == "RMSNorm"]
    assert norms
    assert all(isinstance(norm, torch.nn.RMSNorm) for norm in norms)


def test_bfloat16_is_as_near_to_float32_as_diffusers_is(stock):
    narrow = copy.deepcopy(stock).to(torch.bfloat16)
    fast = FastTransformer(copy.deepcopy(narrow))
    shared, cond, null = inputs(250, 2)
    rounded = {n: x.bfloat16() if isinstance(x, torch.Tensor) else x for n, x in shared.items()}
    cond16, null16 = cond.bfloat16(), null.bfloat16()
    with torch.inference_mode():
        exact = by_stock(stock, shared, cond, null)
        ours = by_fast(fast, rounded, fast.prepare(cond16, null16, 250)).float()
        theirs = by_stock(narrow, rounded, cond16, null16).float()
    ours, theirs = (float((x - exact).norm() / exact.norm()) for x in (ours, theirs))
    assert ours < 1.1 * theirs < 0.05


@pytest.fixture
def captured(fast, monkeypatch):
    """The fast transformer as on CUDA, and the graphs it captures."""
    graphs = recorded_graph.install(monkeypatch)
    monkeypatch.setattr(FastTransformer, "_on_cuda", lambda _: True)
    return fast, graphs


def song_step(fast, seed, rows, tokens=13):
    """`fast.step` for one song, and its evaluation without a graph."""
    shared, cond, null = inputs(40, rows, seed, tokens)
    constants = fast.prepare(cond, null, 40)

    def evaluate(x, timestep):
        moved = {"hidden_states": x.expand(rows, -1, -1), "timestep": timestep}
        return by_fast(fast, {**shared, **moved, "timestep_r": timestep}, constants)

    return fast.step(evaluate), evaluate


def test_replayed_steps_equal_those_that_are_not_captured(captured):
    fast, graphs = captured
    noise = torch.Generator().manual_seed(4)
    with torch.inference_mode():
        songs = [song_step(fast, 1, 2, 9), song_step(fast, 2, 1, 30)]
        for i in range(5):
            x = torch.randn(1, 40, 8, generator=noise)
            for (step, evaluate), rows in zip(songs, (2, 1), strict=True):
                timestep = torch.full((rows,), 1 - i / 5)
                assert torch.equal(step(x, timestep), evaluate(x, timestep))
    assert [graph.replays for graph in graphs] == [4, 4]
    assert fast.implementation == "fast, captured"


def test_a_step_that_cannot_be_captured_is_noted_once_and_runs_as_it_is(captured, caplog):
    fast, graphs = captured

    def read_back(_, __, out):
        return out * float(out.abs().max())

    fast._transformer.layers[1].register_forward_hook(read_back)
    with torch.inference_mode():
        for seed in (1, 2):
            step, evaluate = song_step(fast, seed, 2)
            for _ in range(3):
                x, timestep = torch.randn(1, 40, 8), torch.ones(2)
                assert torch.equal(step(x, timestep), evaluate(x, timestep))
    assert not graphs
    assert caplog.text.count("not captured") == 1
    assert fast.implementation == "fast"


def test_an_adapter_added_after_capturing_is_part_of_the_next_songs_steps(captured):
    fast, graphs = captured
    x, timestep = torch.randn(1, 40, 8), torch.ones(2)
    with torch.inference_mode():
        (plain, _), (step, evaluate) = song_step(fast, 1, 2), song_step(fast, 1, 2)
        without = [plain(x, timestep) for _ in range(2)][1]
        fast._transformer.layers[2].mlp.up_proj.register_forward_hook(lambda *a: 2 * a[2])
        adapted = [step(x, timestep) for _ in range(3)][2]
        assert torch.equal(adapted, evaluate(x, timestep))
    assert float((adapted - without).abs().max()) > 1e-3
    assert len(graphs) == 2


def test_weights_that_are_offloaded_or_on_a_cpu_are_not_captured(fast):
    assert fast.step(len) is len
