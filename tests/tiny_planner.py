"""Planners with random weights in the original layout, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CODEBOOK, SLOTS = 40, 44
"""Codes of the quantiser, and audio tokens of the tokenizer: more, as in the large model; the
surplus tokens are illegal."""

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizers split text: each digit alone, punctuation together with line ends."""

TEXTS = (
    "A calm piano piece with soft strings.\nIt is slow, warm and quiet.\n\nbpm: duration: caption:",
    "keyscale: F# minor keyscale: Bb major language: en language: unknown timesignature: 4",
    "# Caption\n# Lyric\nmorning light is on the water.\n  and the river: calling! `code` 'quoted'",
) * 3


def tokenizer() -> Tokenizer:
    """Byte-level BPE with Qwen's splitting and the special tokens and codes of a planner."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    built.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=360,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    codes = [f"<|audio_code_{code}|>" for code in range(SLOTS)]
    built.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>", *codes)])
    return built


def write(folder: Path, seed: int = 0, prefix: str = "", **changes) -> Path:
    """Save a headless Qwen3 with random weights, keys without the `model.` prefix; the folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3Model

    vocabulary = tokenizer()
    shape = {
        "vocab_size": vocabulary.get_vocab_size() + 5,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    config = Qwen3Config(**{**shape, **changes})
    torch.manual_seed(seed)
    model = Qwen3Model(config)
    with torch.no_grad():  # large weights, else a tied head only repeats the last token
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.15 if "embed" in name else 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    description = {**config.to_dict(), "architectures": ["Qwen3Model"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(description, default=str))
    vocabulary.save(str(folder / "tokenizer.json"))
    return folder
