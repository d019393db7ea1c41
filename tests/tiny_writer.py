"""Songwriters with random weights, in the layouts of transformers and of mlx-lm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_planner import QWEN
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from lyrics import Songwriter

TEXTS = (
    "You write words that are sung: short lines under section tags.\n[verse]\n[chorus]\n[bridge]\n",
    "Streetlights hum a tune I know\nCarry me home, carry me slow\n\nlove and light, träum süß\n",
    "The river runs and the morning comes, 夜空の星 летняя ночь\nassistant user system\n",
) * 3


def tokenizer() -> Tokenizer:
    """Byte-level BPE with Qwen's splitting and its special tokens."""
    built = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    built.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=letters, show_progress=False)
    built.train_from_iterator(TEXTS, trainer)
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return built


def write(folder: Path, seed: int = 0, **changes) -> Path:
    """Save a Qwen2 with random weights in transformers' layout, which mlx-lm reads too."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    vocabulary = tokenizer()
    shape = {
        "vocab_size": vocabulary.get_vocab_size() + 5,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # mlx-lm's default
    }
    config = Qwen2Config(**{**shape, **changes})
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # large weights, else a tied head only repeats the last token
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.15 if "embed" in name else 0.3)
    model.save_pretrained(folder)
    vocabulary.save(str(folder / "tokenizer.json"))
    return folder


def load(engine: str, folder: Path) -> Songwriter:
    """The songwriter in `folder`, on the CPU through "torch" or "mlx"."""
    from conftest import drain

    from lyrics import Songwriter
    from models.catalog import SONGWRITERS

    return drain(Songwriter.load(replace(SONGWRITERS["qwen"], engine=engine), folder, "cpu"))


def quantise(source: Path, folder: Path) -> Path:
    """Save the model in `source` with 4-bit weights, as mlx-lm's converter does; the folder."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    with mx.stream(mx.new_stream(mx.default_device())):
        model, config = load_model(source)
        model, config = quantize_model(model, config, group_size=32, bits=4)
        folder.mkdir(parents=True)
        save_model(folder, model)
    save_config(config, folder / "config.json")
    (folder / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    assert "quantization" in json.loads((folder / "config.json").read_text())
    return folder
