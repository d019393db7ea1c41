"""The fast transformer and the planner with compiled layers, tiny and with random weights."""

from __future__ import annotations

import copy

import pytest
import tiny_planner
import tiny_transformer
import torch
from conftest import drain
from tiny_planner import CODEBOOK
from tiny_transformer import by_fast, by_stock, inputs

from models.code_decoder import StaticCodeDecoder
from models.fast_transformer import FastTransformer
from models.planner import Planner
from models.qwen3 import KeyValueCache
from models.token_sampling import SamplingParams, uniform_draws


@pytest.fixture(scope="module")
def stock():
    return tiny_transformer.make()


@pytest.fixture
def fast(stock):
    return FastTransformer(copy.deepcopy(stock))


@pytest.fixture
def counter():
    """A compiler that counts its graphs and runs them as they are."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()
    torch.compiler.set_stance("default")


def test_compiled_layers_are_compiled_once_for_all_lengths_and_songs(stock, fast, counter):
    fast.compile(counter)
    graphs = []
    with torch.inference_mode():
        for frames in (101, 250, 32, 640, 77):
            for rows in (2, 1):
                shared, cond, null = inputs(frames, rows, frames, tokens=10 + frames // 9)
                got = by_fast(fast, shared, fast.prepare(cond, null, frames))
                assert torch.allclose(got, by_stock(stock, shared, cond, null), atol=1e-5)
            graphs.append(counter.frame_count)
    assert fast.implementation == "fast, compiled"
    assert 0 < graphs[0] == graphs[-1] <= 6


def test_adapters_added_after_compiling_are_heard(stock, fast, counter):
    fast.compile(counter)
    shared, cond, null = inputs(50, 2)
    with torch.inference_mode():
        constants = fast.prepare(cond, null, 50)
        without = by_fast(fast, shared, constants)
        adapted = fast._transformer.layers[2].mlp.up_proj
        hook = adapted.register_forward_hook(lambda _, __, out: out.mul_(2.0))
        with_adapter = by_fast(fast, shared, constants)
        hook.remove()
        again = by_fast(fast, shared, constants)
    assert float((with_adapter - without).abs().max()) > 1e-3
    assert torch.equal(again, without)


def test_a_compiler_that_fails_is_noted_and_the_song_goes_on(stock, fast, caplog):
    def broken(*_):
        raise OSError("no C compiler")

    torch._dynamo.reset()
    fast.compile(broken)
    shared, cond, null = inputs(50, 2)
    try:
        with torch.inference_mode():
            got = by_fast(fast, shared, fast.prepare(cond, null, 50))
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
    assert torch.allclose(got, by_stock(stock, shared, cond, null), atol=1e-5)
    assert fast.implementation == "fast"
    assert "no C compiler" in caplog.text


def test_the_planner_compiles_one_layer_for_all_layers_and_lengths(counter, tmp_path):
    planner = drain(Planner.load(tiny_planner.write(tmp_path), CODEBOOK, "cpu", "float32"))
    prompts, sampling = [[*range(40)], [*range(9)]], SamplingParams(0.85, 0.9, 0)

    def codes(count):
        cache = KeyValueCache(planner.qwen, prompts, count)
        hidden = planner.qwen.forward(cache.prompts, cache)
        first = planner.vocabulary.first_code
        decoder = StaticCodeDecoder(
            planner.qwen, cache, planner.code_head, first, count, 2.0, sampling
        )
        decoder.start(hidden, uniform_draws(3, count, "cpu"))
        while decoder.done < count:
            decoder.step()
        return decoder.codes.tolist()

    expected = [codes(count) for count in (6, 9, 14)]
    planner.qwen.compile(counter)
    assert [codes(count) for count in (6, 9, 14)] == expected
    assert counter.frame_count == 1


def test_a_planner_that_does_not_compile_is_noted_and_runs_as_it_is(tmp_path, caplog):
    def broken(*_):
        raise OSError("no C compiler")

    planner = drain(Planner.load(tiny_planner.write(tmp_path), CODEBOOK, "cpu", "float32"))
    cache = KeyValueCache(planner.qwen, [[1, 2, 3]], 2)
    planner.qwen.forward(cache.prompts, cache)
    arguments = torch.tensor([4]), cache, torch.tensor([3]), torch.zeros(1, 1, 1, 5)
    with torch.inference_mode():
        want = planner.qwen.step(*arguments)
        planner.qwen.compile(broken)
        assert torch.equal(planner.qwen.step(*arguments), want)
    assert caplog.text.count("no C compiler") == 1
