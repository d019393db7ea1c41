"""A small MusicGen with random weights in the layout of transformers, whose output varies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = "warm slow lofi piano drums bass night rain a the of with and house beat".split()


def tokenizer() -> Tokenizer:
    """A word-level tokenizer that ends each text with </s>, as T5's does."""
    marks = ["<pad>", "</s>", "<unk>"]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(marks + WORDS)}, "<unk>"))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    built.add_special_tokens(marks)
    return built


def model(seed: int = 0, ratios: Sequence[int] = (8, 5, 4, 4), **decoder):
    """The model in memory: 0.2 million parameters, four codebooks of 64 words, 32 kHz.

    Its frame is as long as the product of `ratios`: 640 samples as in the published models, or
    more, for long pieces of few tokens.
    """
    import torch
    from transformers import (
        EncodecConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        T5Config,
    )

    shape = {
        "vocab_size": 64,
        "num_codebooks": 4,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 64,
        "bos_token_id": 64,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "tie_word_embeddings": False,
    }
    config = MusicgenConfig(
        text_encoder=T5Config(
            vocab_size=len(WORDS) + 3, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        ).to_dict(),
        audio_encoder=EncodecConfig(
            sampling_rate=32_000,
            audio_channels=1,
            normalize=False,
            chunk_length_s=None,
            use_causal_conv=False,
            upsampling_ratios=list(ratios),
            target_bandwidths=[1.2],
            codebook_size=64,
            codebook_dim=16,
            hidden_size=16,
            num_filters=4,
            num_lstm_layers=1,
        ).to_dict(),
        decoder=MusicgenDecoderConfig(**{**shape, **decoder}).to_dict(),
    )
    torch.manual_seed(seed)
    built = MusicgenForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in built.named_parameters():
        if name.startswith(("decoder", "text_encoder", "enc_to_dec")) and weight.ndim == 2:
            weight.normal_(0, 0.25)  # large weights, else all tokens are equally likely
        if name.startswith("audio_encoder.decoder") and "bias" in name:
            weight.zero_()  # else the biases dominate the output, not the tokens
    for layer in built.audio_encoder.quantizer.layers:
        layer.codebook.embed.normal_(0, 1.0)  # initialised to zeros: all tokens would sound alike
    built.generation_config.decoder_start_token_id = 64
    built.generation_config.pad_token_id = built.generation_config.bos_token_id = 64
    return built


def write(folder: Path, seed: int = 0, **shape) -> Path:
    """Save the model and its tokenizer; the folder."""
    model(seed, **shape).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
