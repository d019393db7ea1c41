"""Goes on from a finished checkpoint: takes its parts apart into a work folder that is still empty.

The codec and the audio codes are kept as they are; text encoder, condition encoder, DiT and planner
are where their training begins.
"""

from pathlib import Path

import torch
from diffusers import AceStepPipeline, AutoencoderOobleck
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mini.model import Generator
from mini.vae import LATENTS, Codec, Residual, Snake

BEGINNING = "begin.pt"  # in a run's folder: the weights its training begins from


def _plain(layer: nn.Module) -> Tensor:
    """The weight of a weight-normed convolution."""
    norm = layer.weight_v.flatten(1).norm(dim=1).view(-1, 1, 1)
    return layer.weight_g * layer.weight_v / norm


def _take(
    layer: nn.Conv1d | nn.ConvTranspose1d, source: nn.Module, rows: int | None = None
) -> None:
    layer.weight.copy_(_plain(source)[:rows])
    if layer.bias is not None:
        layer.bias.copy_(source.bias[:rows])


def _take_snake(snake: Snake, source: nn.Module) -> None:
    snake.alpha.copy_(source.alpha)
    snake.beta.copy_(source.beta)


def _take_residual(unit: Residual, source: nn.Module) -> None:
    for name in ("snake1", "snake2"):
        _take_snake(getattr(unit, name), getattr(source, name))
    for name in ("conv1", "conv2"):
        _take(getattr(unit, name), getattr(source, name))


@torch.no_grad()
def restore_codec(vae: AutoencoderOobleck) -> Codec:
    """The codec that `mini.vae.export` wrote as an Oobleck, its scale folded in."""
    codec, encoder, decoder = Codec(), vae.encoder, vae.decoder
    first, last = encoder.block[0], decoder.block[len(codec.decoder)]
    codec.analysis.weight.copy_(_plain(first.conv1)[:, :2])
    codec.analysis.bias.copy_(first.conv1.bias)
    for block, source in zip(codec.encoder, encoder.block[1:], strict=True):
        for number in range(3):
            _take_residual(block[number], getattr(source, f"res_unit{number + 1}"))
        _take_snake(block[3], source.snake1)
        _take(block[4], source.conv1)
    _take_snake(codec.encoder_snake, encoder.snake1)
    _take(codec.to_latents, encoder.conv2, LATENTS)
    _take(codec.from_latents, decoder.conv1)
    for block, source in zip(codec.decoder, decoder.block[:-1], strict=True):
        _take_snake(block[0], source.snake1)
        _take(block[1], source.conv_t1)
        for number in range(3):
            _take_residual(block[number + 2], getattr(source, f"res_unit{number + 1}"))
    _take_snake(codec.decoder_snake, last.snake1)
    codec.synthesis.weight.copy_(_plain(last.conv_t1)[:, :2])
    return codec.eval()


def _keep(path: Path, state: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def unpack(checkpoint: Path, work: Path) -> None:
    """Writes a checkpoint's parts where the stages of a run look for theirs."""
    if (work / "generator" / BEGINNING).exists():
        return
    pipe = AceStepPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    codec = restore_codec(pipe.vae).state_dict()
    named = {f"average.module.codec.{name}": weight for name, weight in codec.items()}
    _keep(work / "codec" / "last.ckpt", {"state_dict": named})
    scale = {"mean": torch.zeros(LATENTS), "std": torch.ones(LATENTS)}
    _keep(work / "corpus" / "scale.pt", scale)
    codes = {}
    for part in ("tokenizer", "detokenizer"):
        source = pipe.audio_tokenizer if part == "tokenizer" else pipe.audio_token_detokenizer
        codes |= {f"model.{part}.{name}": value for name, value in source.state_dict().items()}
    _keep(work / "tokens" / "last.ckpt", {"state_dict": codes})
    pipe.tokenizer.save_pretrained(work / "text_tokenizer")
    if (checkpoint / "planner").exists():
        folder = checkpoint / "planner"
        planner = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        _keep(work / "planner" / BEGINNING, planner.state_dict())
        AutoTokenizer.from_pretrained(folder).save_pretrained(work / "planner_tokenizer")
    parts = {
        f"{part}.{name}": value
        for part in ("text_encoder", "condition_encoder", "transformer")
        for name, value in getattr(pipe, part).state_dict().items()
    }
    _keep(work / "generator" / BEGINNING, parts)


def begin_generator(generator: Generator, folder: Path) -> None:
    """Loads the weights a run begins from, where there are any; the silence latent stays its own."""
    if (folder / BEGINNING).exists():
        weights = torch.load(folder / BEGINNING, weights_only=True)
        weights.pop("condition_encoder.silence_latent")
        _, unknown = generator.load_state_dict(weights, strict=False)
        if unknown:
            raise ValueError(f"{folder / BEGINNING} holds other parts: {unknown[:3]}.")
