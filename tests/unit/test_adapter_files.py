"""Adapter files: checks by the header alone, and refusal of hostile files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trained import forge, pair, write

from core.errors import StudioError
from core.params import AdapterRef
from models import adapter_files

MODULE = "layers.0.self_attn.q_proj"


def refused(path, code: str, *words: str, config=None) -> StudioError:
    with pytest.raises(StudioError) as raised:
        adapter_files.inspect(path, config)
    error = raised.value
    assert error.code == code, str(error)
    assert all(word in str(error) for word in words), str(error)
    assert str(path.parent) not in str(error)
    assert str(error).isprintable()
    return error


def announce(**shapes):
    """A safetensors file of zeros with float32 tensors of these shapes, in order."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, bytes(end)


def test_inspect_reports_name_hash_and_deltas(tmp_path):
    path = write(
        tmp_path / "night bus.safetensors",
        {
            **pair("diffusion_model.decoder.layers.0.self_attn.q_proj", rank=4),
            **pair("layers.11.mlp.down_proj", rank=16, into=704),
            "layers.11.mlp.down_proj.alpha": torch.tensor(8),
        },
    )
    adapter = adapter_files.inspect(path)
    assert adapter.name == "night bus.safetensors"
    assert adapter.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {name: (d.shape, d.rank, d.scale) for name, d in adapter.deltas.items()} == {
        "layers.0.self_attn.to_q": ((256, 256), 4, 1.0),
        "layers.11.mlp.down_proj": ((256, 704), 16, 0.5),
    }
    assert adapter.rank == 16
    assert pickle.loads(pickle.dumps(adapter)) == adapter


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, 3.0), (torch.bfloat16, 3.0), (torch.float16, 3.0), (torch.int64, 3)],
)
def test_alpha_of_any_number_type_is_read(tmp_path, dtype, value):
    alpha = {f"{MODULE}.alpha": torch.tensor(value, dtype=dtype)}
    adapter = adapter_files.inspect(write(tmp_path / "a.safetensors", {**pair(rank=4), **alpha}))
    assert adapter.deltas["layers.0.self_attn.to_q"].scale == 0.75


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"elf_attn.q_proj": 2, "layers.1.self_attn.q_proj": 3}}, 2.0),
        ({"alpha_pattern": {"self_attn.q_proj": 2, "q_proj": 3}}, 0.5),
        ({"r": 99, "rank_pattern": {"self_attn.q_proj": 4}}, 2.0),
    ],
)
def test_peft_settings_decide_the_scale(tmp_path, changes, scale):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = pair(f"base_model.model.{MODULE}")
    write(tmp_path / "adapter_model.safetensors", tensors)
    assert adapter_files.inspect(tmp_path).deltas["layers.0.self_attn.to_q"].scale == scale


@pytest.mark.parametrize(
    ("config", "code", "word"),
    [
        ({"use_dora": True}, "adapter-refused", "use_dora"),
        ({"peft_type": "LOHA"}, "adapter-refused", "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "adapter-refused", "pissa_niter_4"),
        ({"r": 8}, "adapter-unreadable", "describes other matrices"),
        ({"peft_type": "LOKR", "alpha": 8}, "adapter-unreadable", "describes other"),
        ({"lora_alpha": "8"}, "adapter-unreadable", "settings"),
        ({"lora_alpha": True}, "adapter-unreadable", "settings"),
        ({"lora_alpha": float("nan")}, "adapter-unreadable", "settings"),
        ({"r": 0}, "adapter-unreadable", "settings"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "adapter-unreadable", "settings"),
        ({"alpha_pattern": [1]}, "adapter-unreadable", "settings"),
        (b"", "adapter-unreadable", "settings"),
        (b"[]", "adapter-unreadable", "settings"),
        (b"\xff\xfe", "adapter-unreadable", "settings"),
        (b'{"hidden_size": 2560}', "adapter-unreadable", "settings"),
        (b"[" * 100_000, "adapter-unreadable", "settings"),
        (b" " * (2 << 20) + b"{}", "adapter-unreadable", "settings"),
    ],
)
def test_implausible_settings_are_refused(tmp_path, config, code, word):
    if isinstance(config, dict):
        honest = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
        config = json.dumps({**honest, **config}).encode()
    (tmp_path / "adapter_config.json").write_bytes(config)
    write(tmp_path / "adapter_model.safetensors", pair(f"base_model.model.{MODULE}"))
    refused(tmp_path, code, word)


def test_settings_beside_a_file_are_used_only_if_unambiguous(tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    one = write(tmp_path / "one.safetensors", pair())
    assert adapter_files.inspect(one).config
    write(tmp_path / "two.safetensors", pair())
    assert not adapter_files.inspect(one).config
    refused(tmp_path, "adapter-unreadable", "2 safetensors files")
    write(tmp_path / "adapter_model.safetensors", pair())
    assert (
        adapter_files.inspect(tmp_path).config
        == adapter_files.inspect(tmp_path / "adapter_model.safetensors").config
    )
    refused(one, "adapter-missing", config=tmp_path / "elsewhere.json")


@pytest.mark.parametrize(
    ("key", "word"),
    [
        (f"lycoris_{MODULE.replace('.', '_')}.dora_scale", "DoRA"),
        (f"{MODULE}.hada_w1_a", "LoHa"),
        (f"{MODULE}.oft_blocks", "OFT"),
        (f"{MODULE}.lokr_t2", "Tucker"),
        ("transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks.0.attn.to_q"),
        ("lora_te_text_model_encoder.lora_down.weight", "lora_te_text_model_encoder"),
        ("encoder.lyric_encoder.layers.0.self_attn.q_proj.lora_A.weight", "lyric_encoder"),
        ("layers.0.self_attn.q_norm.diff", "q_norm"),
        ("layers.0.self_attn.q_proj.lora_B.bias", "lora_B.bias"),
        ("layers.00.self_attn.q_proj.lora_A.weight", "layers.00"),
        ("../../etc/passwd.lora_A.weight", "passwd"),
        ("x" * 100_000 + ".lora_A.weight", "xxx"),
        ("layers.0.self_attn.to_out.1.lora_A.weight", "to_out.1"),
        ("\x1b[31mlayers", "?[31mlayers"),
    ],
)
def test_unsupported_parts_are_refused_not_ignored(tmp_path, key, word):
    header, data = announce(
        **{f"{MODULE}.lora_A.weight": [4, 8], f"{MODULE}.lora_B.weight": [8, 4]}
    )
    extra, more = announce(**{key: [4, 8]})
    extra[key]["data_offsets"] = [len(data), len(data) + len(more)]
    path = forge(tmp_path / "a.safetensors", {**header, **extra}, data + more)
    refused(path, "adapter-refused", word)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"lora_A.weight": [4, 8]}, "missing"),
        ({"alpha": [1]}, "missing"),
        ({"lora_A.weight": [4, 8], "lora_B.weight": [8, 3]}, "do not fit together"),
        ({"lora_A.weight": [4], "lora_B.weight": [8, 4]}, "do not fit together"),
        ({"lora_A.weight": [], "lora_B.weight": [8, 1]}, "do not fit together"),
        ({"lora_A.weight": [4, 8], "lora_B.weight": [8, 4], "alpha": [2]}, "not one number"),
        ({"lora_A.weight": [4, 8], "lora_down.weight": [4, 8]}, "two tensors for the same part"),
        (
            {"lora_A.one.weight": [4, 8], "lora_A.two.weight": [4, 8]},
            "two tensors for the same part",
        ),
        ({"lokr_w1": [2, 2]}, "missing"),
        ({"lokr_w1": [2, 2], "lokr_w2_a": [4, 64], "lokr_w2_b": [64, 4]}, "do not fit together"),
    ],
)
def test_matrices_that_do_not_chain_are_refused(tmp_path, shapes, words):
    header, data = announce(**{f"{MODULE}.{part}": shape for part, shape in shapes.items()})
    refused(forge(tmp_path / "a.safetensors", header, data), "adapter-unreadable", words)


def test_the_rank_is_limited(tmp_path):
    for rank, fits in ((256, True), (257, False)):
        path = write(tmp_path / f"{rank}.safetensors", pair(rank=rank, into=300, out=300))
        if fits:
            assert adapter_files.inspect(path).rank == 256
        else:
            refused(path, "adapter-too-big", "rank 257", "rank 256")


def test_the_size_is_limited(tmp_path):
    path = forge(tmp_path / "vast.safetensors", {})
    os.truncate(path, 612_000_000)
    refused(path, "adapter-too-big", "612 MB", "500 MB")


def test_the_header_is_checked_before_anything_else_is_read(tmp_path, monkeypatch):
    """Hashing would read 499 MB; the refusal comes before."""
    header = {}
    for i, part in enumerate(("lora_A.weight", "dora_scale")):
        shape, size = [1, 62_000_000], 248_000_000
        offsets = [i * size, (i + 1) * size]
        header[f"{MODULE}.{part}"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    path = forge(tmp_path / "a.safetensors", header)
    os.truncate(path, path.stat().st_size + 2 * 248_000_000)
    monkeypatch.setattr(adapter_files.hashlib, "file_digest", lambda *_: pytest.fail("read"))
    refused(path, "adapter-refused", "DoRA")


def entry(**changes):
    honest = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    return {f"{MODULE}.diff": {**honest, **changes}}


HOSTILE = {
    "empty": (b"", "it is empty"),
    "short": (b"\x10\0\0", "not a safetensors"),
    "no header": (struct.pack("<Q", 0) + b"{", "not a safetensors"),
    "a header of 2^63 bytes": (struct.pack("<Q", 1 << 63) + b"{}", "not a safetensors"),
    "a header that is cut": (struct.pack("<Q", 4000) + b'{"a', "cut off"),
    "a header that is no JSON": (struct.pack("<Q", 4) + b"{abc", "no readable header"),
    "a header that is a list": (struct.pack("<Q", 2) + b"[]", "not a safetensors"),
    "nothing in it": (struct.pack("<Q", 2) + b"{}", "nothing in it"),
    "deep": (struct.pack("<Q", 200_005) + b'{"a":' + b"[" * 200_000, "no readable header"),
}
ENTRIES = {
    "offsets backwards": entry(data_offsets=[4, 0]),
    "offsets that are no numbers": entry(data_offsets=["0", "4"]),
    "three offsets": entry(data_offsets=[0, 4, 8]),
    "a hole": entry(data_offsets=[4, 8]),
    "beyond the end": entry(shape=[2, 2], data_offsets=[0, 16]),
    "negative": entry(shape=[-1, -1]),
    "zero": entry(shape=[0, 1], data_offsets=[0, 0]),
    "true": entry(shape=[True, True]),
    "a shape that is no list": entry(shape="11"),
    "a vast shape": entry(shape=[10**18] * 100_000),
    "an overflowing shape": entry(shape=[1 << 32, 1 << 32]),
    "numbers of no kind": entry(dtype="F8"),
    "a kind that is a list": entry(dtype=["F32"]),
    "no kind": {f"{MODULE}.diff": {"shape": [1, 1], "data_offsets": [0, 4]}},
    "no entry": {f"{MODULE}.diff": 7},
    "metadata that is a number": {**entry(), "__metadata__": 7},
    "two in one place": {**entry(), "layers.1.self_attn.q_proj.diff": entry()[f"{MODULE}.diff"]},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_no_adapter_is_refused(tmp_path, kind):
    raw, words = HOSTILE[kind]
    (tmp_path / "a.safetensors").write_bytes(raw)
    refused(tmp_path / "a.safetensors", "adapter-unreadable", words)


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_inconsistent_header_is_refused(tmp_path, kind):
    path = forge(tmp_path / "a.safetensors", ENTRIES[kind], bytes(4))
    refused(path, "adapter-unreadable")


@pytest.mark.parametrize("cut", [0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(tmp_path, cut):
    path = write(tmp_path / "a.safetensors", pair())
    intact = path.read_bytes()
    path.write_bytes(intact[: int(cut * len(intact))])
    refused(path, "adapter-unreadable")
    path.write_bytes(intact + b"more")
    refused(path, "adapter-unreadable", "longer than it says")


def test_pickles_are_refused_by_content_and_by_name(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    modern, old = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.zeros(2), "trap": Trap()}, modern)
    torch.save({"trap": Trap()}, old, _use_new_zipfile_serialization=False)
    for i, raw in enumerate((modern.getvalue(), old.getvalue(), pickle.dumps(Trap()))):
        for name in (f"{i}.safetensors", f"{i}.pt", f"{i}.ckpt"):
            (tmp_path / name).write_bytes(raw)
            refused(tmp_path / name, "adapter-refused", "pickle", "safetensors version")
    (tmp_path / "text.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(tmp_path / "text.pth", "adapter-refused", "pickle")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_model.bin").write_bytes(modern.getvalue())
    refused(tmp_path / "folder", "adapter-refused", "pickle")
    assert not (tmp_path / "sprung").exists()


def test_hostile_paths_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to("/etc/passwd")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.safetensors")
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "adapter_model.safetensors").mkdir()
    write(tmp_path / "colour\x1b[31m\n.safetensors", {"x": torch.zeros(1)})
    for name, code, word in (
        ("nothing.safetensors", "adapter-missing", "nothing.safetensors"),
        ("no/such/folder/a.safetensors", "adapter-missing", "a.safetensors"),
        ("empty", "adapter-unreadable", "no safetensors files"),
        ("folder.safetensors", "adapter-unreadable", "no safetensors files"),
        ("link.safetensors", "adapter-unreadable", "not a safetensors file"),
        ("loop.safetensors", "adapter-unreadable", "cannot be opened"),
        ("zero.safetensors", "adapter-unreadable", "not a file"),
        ("pipe.safetensors", "adapter-unreadable", "not a file"),
        ("nested", "adapter-unreadable", "not a file"),
        ("nul\0.safetensors", "adapter-unreadable", "cannot be opened"),
        ("n" * 5000, "adapter-unreadable", "cannot be opened"),
        ("colour\x1b[31m\n.safetensors", "adapter-refused", "colour?[31m?.safetensors"),
    ):
        refused(tmp_path / name, code, word)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_mutation_of_a_file_is_read_or_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    intact = bytearray(write(path, pair(rank=1, into=4, out=4)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(intact) - 1))
        intact[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(intact)
    try:
        adapter = adapter_files.inspect(path)
    except StudioError as error:
        assert re.fullmatch("adapter-(unreadable|refused|too-big)", error.code)  # noqa: PT017
    else:
        assert sum(len(raw) for *_, raw in adapter_files.read(adapter)) < len(intact)


FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32"])
def test_integer_matrices_are_refused_as_quantised(tmp_path, kind):
    tensors = {name: tensor.to(getattr(torch, kind)) for name, tensor in pair().items()}
    refused(write(tmp_path / "a.safetensors", tensors), "adapter-refused", "quantised", "bfloat16")


@pytest.mark.parametrize("scale", ["weight_scale", "scale_weight", "input_scale"])
def test_matrices_with_scales_of_their_own_are_refused_as_quantised(tmp_path, scale):
    tensors = {**pair(), f"{MODULE}.lora_A.{scale}": torch.ones(1)}
    refused(write(tmp_path / "a.safetensors", tensors), "adapter-refused", "quantised", scale)


@pytest.mark.parametrize("dtype", FLOAT8.values(), ids=FLOAT8)
def test_float8_matrices_are_read(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in pair().items()}
    adapter = adapter_files.inspect(write(tmp_path / "a.safetensors", tensors))
    for name, kind, shape, content in adapter_files.read(adapter):
        assert FLOAT8[kind] == dtype
        assert len(content) == tensors[name].numel() == shape[0] * shape[1]


def test_the_advice_without_a_configuration_can_be_followed(tmp_path):
    tensors = {f"base_model.model.{name}": tensor for name, tensor in pair().items()}
    adapter = adapter_files.inspect(write(tmp_path / "a.safetensors", tensors))
    (note,) = adapter.notes
    advised = float(re.search(r"strength to (\d+)", note)[1])
    assert AdapterRef(file=adapter.path, strength=advised).strength == advised == 2
