"""Placement: weights that wait in main memory, encoders that are read again, 8-bit weights."""

from __future__ import annotations

import contextlib
import copy

import pytest
import tiny_transformer
import torch
from conftest import drain, song
from tiny_transformer import by_fast, by_stock, inputs
from trained import hear, pair, write

from models import acestep, adapter_files, adapter_layers, catalog, loading, placement
from models.fast_transformer import FastTransformer

LAYER = "layers.1.self_attn.to_q"


@pytest.fixture(scope="module")
def stock():
    return tiny_transformer.make()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    tensors = pair(LAYER, into=24, out=32)
    return adapter_files.inspect(write(tmp_path_factory.mktemp("a") / "a.safetensors", tensors))


@contextlib.contextmanager
def applied(transformer, adapter):
    stack = adapter_layers.AdapterStack(transformer, "tiny")
    drain(stack.apply([(adapter, 1.0)]))
    yield
    assert stack.unused == ()
    stack.clear()


def pointers(module):
    return [tensor.data_ptr() for _, _, tensor in placement._tensors(module)]


class Device:
    """Stands for torch's module of a GPU: notes what waits for what, and copies at once."""

    def __init__(self):
        self.log = []
        self.copies = None
        self.main = self.Queue(self, "main")

    class Queue:
        def __init__(self, device, name):
            self.device, self.name = device, name

        def wait_stream(self, other):
            self.device.log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            self.device.log.append(f"{self.name} waits for copy {event}")

    def Stream(self):  # noqa: N802
        self.copies = self.Queue(self, "copies")
        return self.copies

    def Event(self):  # noqa: N802
        return Copied(self)

    def current_stream(self):
        return self.main

    def stream(self, _):
        return contextlib.nullcontext()


class Copied:
    made = 0

    def __init__(self, device):
        self.device = device

    def record(self, stream):
        Copied.made += 1
        self.number = Copied.made
        self.device.log.append(f"copy {self.number} on {stream.name}")

    def __str__(self):
        return str(self.number)


def test_waiting_layers_compute_the_same_with_adapters_and_at_most_two_at_a_time(stock, adapter):
    shared, cond, null = inputs(64, 2)
    dit = copy.deepcopy(stock)
    units, most = list(dit.layers), []
    with torch.inference_mode():
        bare = by_stock(dit, shared, cond, null)
        with applied(dit, adapter):
            adapted = by_stock(dit, shared, cond, null)
        before = pointers(dit)
        waiting = placement.OnDemand(units, "cpu", ahead=True)
        for layer in units:
            layer.mlp.register_forward_hook(lambda *_: most.append(waiting.on_device))
        with applied(dit, adapter):
            assert torch.equal(by_stock(dit, shared, cond, null), adapted)
        assert torch.equal(by_stock(dit, shared, cond, null), bare)
        assert not torch.equal(adapted, bare)
        assert max(most) == 2
        waiting._drop(units[0])
        assert pointers(dit) == before, "the copies in main memory stay where they are"


def test_the_fast_transformer_reaches_layers_that_wait(stock):
    shared, cond, null = inputs(64, 2)
    outputs = []
    for wait in (False, True):
        dit = copy.deepcopy(stock)
        fast = FastTransformer(dit)
        if wait:
            waiting = placement.OnDemand(list(dit.layers), "cpu", ahead=True)
            seen = []

            @contextlib.contextmanager
            def resident(layer, waiting=waiting, seen=seen):
                with waiting.resident(layer):
                    seen.append(waiting.on_device)
                    yield

            fast.resident = resident
        with torch.inference_mode():
            outputs.append(by_fast(fast, shared, fast.prepare(cond, null, 64)))
    assert seen == [1, 1, 1, 1]
    assert torch.equal(*outputs)


def test_a_copy_begins_one_layer_ahead_and_is_waited_for(stock, monkeypatch):
    gpu, dit = Device(), copy.deepcopy(stock)
    monkeypatch.setattr(placement, "OWN_MEMORY", ("cpu",))
    monkeypatch.setattr(torch, "cpu", gpu)
    Copied.made = 0
    placement.OnDemand(list(dit.layers), "cpu", ahead=True)
    for number, layer in enumerate(dit.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda *_, number=number: gpu.log.append(f"layer {number}")
        )
    shared, cond, null = inputs(16, 1)
    with torch.inference_mode():
        by_stock(dit, shared, cond, null)
    begin = ["copies waits for main", "copy {} on copies"]
    expected = [line.format(n) for n in (1, 2) for line in begin]
    for number in range(4):
        if number:
            expected += [line.format(number + 2) for line in begin]
        expected += [f"main waits for copy {number + 1}", f"layer {number}"]
    assert gpu.log == expected


def test_parts_that_do_not_wait_are_moved_for_good(monkeypatch):
    monkeypatch.setattr(placement, "OWN_MEMORY", ("meta",))
    model, wide = catalog.MODELS["mini"], torch.float32
    pipe = loading.load_pipeline(model, model.folder, wide, wide)
    monkeypatch.setattr(placement.OnDemand, "__init__", lambda *_, **__: None)
    assert placement.move(pipe, "meta", "blocks")

    def kinds(module):
        return {tensor.device.type for _, _, tensor in placement._tensors(module)}

    assert kinds(pipe.transformer.layers) == kinds(pipe.text_encoder.layers) == {"cpu"}
    assert kinds(pipe.text_encoder.embed_tokens) == {"cpu"}
    assert kinds(pipe.vae) == kinds(pipe.transformer.proj_in_conv) == {"meta"}
    assert pipe.condition_encoder.null_condition_emb.device.type == "meta"
    assert pipe.condition_encoder.silence_latent.device.type == "meta"


@pytest.mark.slow
def test_encoders_that_are_read_again_give_the_same_song(engine):
    wanted, model = song(inference_steps=1), engine.model
    plain = drain(engine.text_to_music(wanted)).sound
    freed = drain(
        acestep.Engine.load(model, model.folder, "cpu", "float32", offload="encoders", tile=64)
    )
    for _ in range(2):
        again = drain(freed.text_to_music(wanted)).sound
        assert abs(again - plain).max() < 1e-4, "tiles of another size round differently"
        assert freed.pipe.text_encoder.embed_tokens.weight.device.type == "meta"
    latents = torch.zeros(1, 100, engine.channels)
    with torch.inference_mode():
        assert [len(list(each.decode(latents))) for each in (engine, freed)] == [2, 3]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_adapters_compute_beside_8_bit_weights(engine, tmp_path, precision):
    pytest.importorskip("torchao", reason="int8 and fp8 weights need the extra int8")
    path = write(tmp_path / "a.safetensors", pair("layers.1.self_attn.to_q"))
    chosen, outputs = adapter_files.inspect(path), []
    for quantized in (False, True):
        dit = copy.deepcopy(engine.pipe.transformer)
        if quantized:
            placement.quantize(dit, precision, torch.float32)
        bare = hear(dit)
        with applied(dit, chosen):
            outputs += [bare, hear(dit)]
        assert torch.equal(hear(dit), bare)
    bare, adapted, bare8, adapted8 = outputs
    error = (bare8 - bare).norm() / bare.norm()
    assert 0 < error < {"int8": 0.02, "fp8": 0.05}[precision]
    far = torch.stack([(adapted8 - bare8).flatten(), (adapted - bare).flatten()])
    assert torch.corrcoef(far)[0, 1] > 0.99


def test_8_bit_weights_wait_like_others(stock):
    pytest.importorskip("torchao", reason="int8 and fp8 weights need the extra int8")
    shared, cond, null = inputs(32, 2)
    dit = copy.deepcopy(stock)
    placement.quantize(dit, "int8", torch.float32)
    with torch.inference_mode():
        before = by_stock(dit, shared, cond, null)
        placement.OnDemand(list(dit.layers), "cpu", ahead=True)
        assert torch.equal(by_stock(dit, shared, cond, null), before)


def test_8_bit_weights_take_the_memory_that_the_plan_counts(engine):
    """The embedded model's layers, scales included, against their share of a plan."""
    pytest.importorskip("torchao", reason="int8 and fp8 weights need the extra int8")
    from runtime import memory_plan

    layers = copy.deepcopy(engine.pipe.transformer)
    placement.quantize(layers, "int8", torch.bfloat16)
    numbers = size = 0
    for module in layers.layers.modules():
        if isinstance(module, torch.nn.Linear):
            names, _ = module.weight.__tensor_flatten__()
            inner = [getattr(module.weight, name) for name in names]
            size += sum(t.nbytes for t in inner if torch.is_tensor(t))
            numbers += module.weight.numel()
    assert numbers < size < memory_plan.BYTES["int8"] * numbers
