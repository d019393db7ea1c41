"""Reading tokens into a cache, decoding codes and sampling, against transformers and by hand."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import recorded_graph
import tiny_planner
import torch
from conftest import drain
from tiny_planner import CODEBOOK
from torch.utils._python_dispatch import TorchDispatchMode

from models import plan_format, qwen3
from models.code_decoder import CodeDecoder, StaticCodeDecoder, code_decoder
from models.planner import Planner
from models.token_sampling import GREEDY, SamplingParams, sample_token, uniform_draws


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tiny_planner.write(tmp_path_factory.mktemp("planner") / "tiny")
    return drain(Planner.load(folder, CODEBOOK, "cpu", "float32"))


def test_hidden_states_equal_those_of_transformers(tiny):
    """A padded pair, read in chunks, against each text alone and whole."""
    texts = [
        tiny.vocabulary.encode(plan_format.plan_prompt("piano", "la la")),
        tiny.vocabulary.encode("bpm: 92\n"),
    ]
    more = torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    for rows in ([0, 1], [1, 0], [0]):
        cache = qwen3.KeyValueCache(tiny.qwen, [texts[row] for row in rows], 6)
        seen = [tiny.qwen.forward(cache.prompts, cache)]
        seen += [tiny.qwen.forward(more[rows, i : i + 1], cache) for i in range(3)]
        seen.append(tiny.qwen.forward(more[rows, 3:], cache))
        for place, row in enumerate(rows):
            whole = torch.tensor([[*texts[row], *more[row].tolist()]])
            with torch.inference_mode():
                ours = torch.stack([hidden[place] for hidden in seen])
                theirs = tiny.model.model(whole).last_hidden_state[0]
            at = [len(texts[row]) - 1 + i for i in (0, 1, 2, 3, 6)]
            assert torch.allclose(ours, theirs[at], atol=1e-4), (rows, row)


def test_a_prompt_read_in_chunks_gives_the_same_hidden_states(tiny):
    texts = [[*range(20)], [*range(7)]]
    whole, pieces = (qwen3.KeyValueCache(tiny.qwen, texts, 0) for _ in range(2))
    expected = tiny.qwen.forward(whole.prompts, whole)
    for piece in pieces.prompts.split(3, 1):
        found = tiny.qwen.forward(piece, pieces)
    assert torch.allclose(found, expected, atol=1e-5)


def test_all_hidden_states_are_returned_on_request(tiny):
    ids = [*range(12)]
    cache = qwen3.KeyValueCache(tiny.qwen, [ids], 0)
    found = tiny.qwen.forward(cache.prompts, cache, last_only=False)
    with torch.inference_mode():
        expected = tiny.model.model(torch.tensor([ids])).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-4)


def decode(tiny, kind, prompts, count, guidance, sampling, seeds=(3,)):
    """The codes of one decoder, once for each seed."""
    cache = qwen3.KeyValueCache(tiny.qwen, prompts, count)
    hidden = tiny.qwen.forward(cache.prompts, cache)
    first = tiny.vocabulary.first_code
    decoder = kind(tiny.qwen, cache, tiny.code_head, first, count, guidance, sampling)
    songs = []
    for seed in seeds:
        decoder.start(hidden, uniform_draws(seed, count, tiny.device))
        while decoder.done < count:
            decoder.step()
        songs.append(decoder.codes.tolist())
    return songs


@pytest.mark.parametrize(
    ("rows", "sampling"),
    [
        (1, SamplingParams(0.85, 0.9, 0)),
        (2, SamplingParams(0.85, 0.9, 0)),
        (2, SamplingParams(1.2, 1.0, 0)),
        (2, SamplingParams(1.0, 0.9, 12)),
        (2, GREEDY),
    ],
)
def test_the_static_decoder_chooses_the_codes_of_the_eager_one(tiny, rows, sampling):
    prompts = [[*range(40)], [*range(9)]][:rows]
    kinds = (CodeDecoder, StaticCodeDecoder)
    eager, static = (decode(tiny, k, prompts, 60, 2.0, sampling, (3, 4)) for k in kinds)
    assert static == eager
    assert len(set(eager[0])) > 3
    assert (eager[0] != eager[1]) == (sampling != GREEDY)


class HostReads(TorchDispatchMode):
    """Counts how often a value is read from the device: indexing by a tensor is one such time."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += operator in (aten.item.default, aten._local_scalar_dense.default)
        return operator(*args, **(kwargs or {}))


def test_a_static_step_reads_nothing_back_and_moves_no_tensor(tiny):
    """What a CUDA graph demands: the same memory each time, and no value asked of the device."""
    cache = qwen3.KeyValueCache(tiny.qwen, [[*range(40)], [*range(9)]], 8)
    hidden = tiny.qwen.forward(cache.prompts, cache)
    first, sampling = tiny.vocabulary.first_code, SamplingParams(0.85, 0.9, 5)
    decoder = StaticCodeDecoder(tiny.qwen, cache, tiny.code_head, first, 8, 2.0, sampling)
    decoder.start(hidden, uniform_draws(1, 8, "cpu"))

    def places():
        mine = (value for value in vars(decoder).values() if isinstance(value, torch.Tensor))
        return [tensor.data_ptr() for tensor in (*mine, *cache.keys, *cache.values)]

    before, reads = places(), HostReads()
    with reads:
        for _ in range(7):
            decoder.step()
        assert reads.count == 0
        decoder.wait()
        assert reads.count == 1, "reading a code back is noticed"
    assert places() == before
    assert cache.length == decoder.prompt_length, "the host's counter does not move"
    assert decoder.done == 8


def test_the_static_decoder_starts_over_without_a_trace_of_the_last_song(tiny):
    prompts, sampling = [[*range(40)], [*range(9)]], SamplingParams(1.0, 1.0, 0)
    alone = [decode(tiny, StaticCodeDecoder, prompts, 30, 2.0, sampling, (s,))[0] for s in (1, 2)]
    assert decode(tiny, StaticCodeDecoder, prompts, 30, 2.0, sampling, (1, 2)) == alone


def test_the_decoder_is_static_on_cuda_only_and_never_in_edition_1(tiny, monkeypatch):
    assert code_decoder(tiny.qwen, static=True) is CodeDecoder
    monkeypatch.setattr(tiny.qwen, "device", torch.device("cuda"))
    assert code_decoder(tiny.qwen, static=True) is StaticCodeDecoder
    assert code_decoder(tiny.qwen, static=False) is CodeDecoder


class Event:
    """Stands in for torch.cuda.Event, and counts."""

    recorded = waited = 0

    def record(self):
        Event.recorded += 1

    def synchronize(self):
        Event.waited += 1


@pytest.mark.parametrize("captures", [True, False])
def test_capturing_or_failing_to_leaves_the_codes_as_they_are(tiny, monkeypatch, captures, caplog):
    prompts, sampling = [[*range(40)], [*range(9)]], SamplingParams(0.85, 0.9, 0)
    expected = decode(tiny, CodeDecoder, prompts, 30, 2.0, sampling, (1, 2))
    graphs = recorded_graph.install(monkeypatch, captures)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "waited", 0)
    monkeypatch.setattr(StaticCodeDecoder, "on_cuda", True)
    assert decode(tiny, StaticCodeDecoder, prompts, 30, 2.0, sampling, (1, 2)) == expected
    assert [graph.replays for graph in graphs] == ([58] if captures else [])
    assert Event.recorded == (58 if captures else 0)
    assert Event.waited == (50 if captures else 0), "at most eight steps are queued"
    assert ("not captured" in caplog.text) is not captures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_captured_step_chooses_the_codes_of_the_eager_one(tmp_path):
    cuda = drain(Planner.load(tiny_planner.write(tmp_path), CODEBOOK, "cuda", "float32"))
    prompts, sampling = [[*range(40)], [*range(9)]], SamplingParams(0.85, 0.9, 0)
    kinds = (CodeDecoder, StaticCodeDecoder)
    eager, static = (decode(cuda, k, prompts, 60, 2.0, sampling, (3, 4)) for k in kinds)
    assert static == eager


def test_rms_norm_equals_that_of_torch():
    x, weight = torch.randn(2, 3, 16), torch.randn(16)
    assert torch.allclose(
        qwen3.rms_norm(x, weight, 1e-6), torch.rms_norm(x, (16,), weight, 1e-6), atol=1e-6
    )


def test_sampling_follows_the_authors_order():
    """Top-k, then top-p before the temperature, then the temperature: shares of even draws."""
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
    for sampling in (
        SamplingParams(1.0, 1.0, 0),
        SamplingParams(2.0, 0.7, 0),
        SamplingParams(0.5, 1.0, 3),
        SamplingParams(3.0, 0.6, 4),
    ):
        wanted = logits.double()
        order = wanted.argsort(descending=True)
        if sampling.top_k:
            wanted[order[sampling.top_k :]] = -torch.inf
        shares = wanted.softmax(0)
        ahead = shares[order].cumsum(0) - shares[order]
        if sampling.top_p < 1:
            wanted[order[ahead > sampling.top_p]] = -torch.inf
        wanted = (wanted / sampling.temperature).softmax(0)
        draws = (torch.arange(2000) + 0.5) / 2000
        found = torch.stack([sample_token(logits, draw, sampling) for draw in draws])
        assert torch.allclose(torch.bincount(found, minlength=5) / 2000, wanted.float(), atol=2e-3)


def test_masked_tokens_are_never_sampled():
    logits = torch.full((4000,), -torch.inf)
    logits[torch.tensor([7, 1300])] = torch.tensor([0.1, 0.3])
    almost_one = torch.tensor(1 - 2**-24)
    for sampling in (
        SamplingParams(0.7, 0.9, 0),
        SamplingParams(1.3, 1.0, 0),
        SamplingParams(1.0, 1.0, 9),
    ):
        for draw in (torch.tensor(0.0), almost_one):
            assert int(sample_token(logits, draw, sampling)) in (7, 1300)
    assert int(sample_token(logits, almost_one, GREEDY)) == 1300
