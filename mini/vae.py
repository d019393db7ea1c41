"""Autoencoder: 24 kHz stereo to 64 latents at 25 Hz, trained fast and exported as Oobleck.

`AutoencoderOobleck` spends nearly all its time in residual units at the full sample rate. The
`Codec` here leaves them out and begins and ends with a learned filterbank of 120 taps; `export`
writes it exactly into a plain `AutoencoderOobleck`, whose full-rate units become identities.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderOobleck
from torch import Tensor, nn

from mini.synth import HOP, SAMPLE_RATE

LATENTS = 64
STRIDES = (60, 4, 4)  # 960 samples a latent frame
MULTIPLES = (1, 2, 4)
WIDTH = 2 * LATENTS  # the Oobleck encoder ends in as many channels as it begins with
IDENTITY_BETA = 20.0  # Snake adds sin^2 / e^beta: 2e-9, nothing
assert math.prod(STRIDES) == HOP


class Snake(nn.Module):
    """x + sin(a x)^2 / b for each channel, a and b in logarithms, as in Oobleck."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha.exp().to(x.dtype)
        weight = (self.beta.exp() + 1e-9).reciprocal().to(x.dtype)
        return torch.addcmul(x, weight.expand_as(x), torch.sin(alpha * x).square())


class Residual(nn.Module):
    """Snake, wide convolution, Snake, pointwise convolution, and the input added again."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.snake1, self.snake2 = Snake(channels), Snake(channels)
        self.conv1 = nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation)
        self.conv2 = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


def _down(source: int, target: int, stride: int) -> nn.Conv1d:
    return nn.Conv1d(source, target, 2 * stride, stride, math.ceil(stride / 2))


def _up(source: int, target: int, stride: int, bias: bool = True) -> nn.ConvTranspose1d:
    return nn.ConvTranspose1d(source, target, 2 * stride, stride, math.ceil(stride / 2), bias=bias)


class Codec(nn.Module):
    """Encoder and decoder without full-rate units; audio (B, 2, 960 T), latents (B, 64, T)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * m for m in MULTIPLES]
        self.analysis = _down(2, widths[0], STRIDES[0])
        self.encoder = nn.ModuleList(
            nn.Sequential(
                *(Residual(widths[i], dilation) for dilation in (1, 3, 9)),
                Snake(widths[i]),
                _down(widths[i], widths[i + 1], STRIDES[i + 1]),
            )
            for i in range(len(STRIDES) - 1)
        )
        self.encoder_snake = Snake(widths[-1])
        self.to_latents = nn.Conv1d(widths[-1], LATENTS, 3, padding=1)
        self.from_latents = nn.Conv1d(LATENTS, widths[-1], 7, padding=3)
        self.decoder = nn.ModuleList(
            nn.Sequential(
                Snake(widths[i]),
                _up(widths[i], widths[i - 1], STRIDES[i]),
                *(Residual(widths[i - 1], dilation) for dilation in (1, 3, 9)),
            )
            for i in range(len(STRIDES) - 1, 0, -1)
        )
        self.decoder_snake = Snake(widths[0])
        self.synthesis = _up(widths[0], 2, STRIDES[0], bias=False)

    def encode(self, audio: Tensor) -> Tensor:
        x = self.analysis(audio)
        for block in self.encoder:
            x = block(x)
        return self.to_latents(self.encoder_snake(x)).float()

    def decode(self, latents: Tensor) -> Tensor:
        x = self.from_latents(latents)
        for block in self.decoder:
            x = block(x)
        return self.synthesis(self.decoder_snake(x))


@torch.no_grad()
def initialise(codec: Codec, audio: Tensor) -> None:
    """Starts the filterbank as an MDCT on mid and side, whitened by the bands of `audio`.

    The MDCT alone reconstructs perfectly; whitening gives every band unit variance. `audio` is a
    sample of the corpus, (B, 2, n).
    """
    bands = STRIDES[0]
    tap, band = torch.arange(2 * bands).float(), torch.arange(bands).float()
    window = torch.sin(math.pi * (tap + 0.5) / (2 * bands))
    phase = math.pi / bands * (tap[None] + 0.5 + bands / 2) * (band[:, None] + 0.5)
    basis = math.sqrt(2 / bands) * window * torch.cos(phase) * math.sqrt(0.5)
    filters = torch.zeros(WIDTH, 2, 2 * bands)
    filters[:bands, 0], filters[:bands, 1] = basis, basis
    filters[bands : 2 * bands, 0], filters[bands : 2 * bands, 1] = basis, -basis
    for layer in codec.modules():
        if not isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            continue
        channels, taps = layer.weight.shape[1], layer.weight.shape[2]
        if isinstance(layer, nn.ConvTranspose1d):
            channels, taps = layer.weight.shape[0], layer.weight.shape[2] / layer.stride[0]
        gain = 0.4 if taps == 1 else 0.9
        layer.weight.normal_(0, gain / math.sqrt(channels * taps))
        if layer.bias is not None:
            layer.bias.zero_()
    spread = F.conv1d(audio, filters, stride=bands, padding=bands // 2).std((0, 2)).clamp_min(1e-3)
    spread[2 * bands :] = 1.0
    codec.analysis.weight.copy_(filters / spread[:, None, None])
    codec.analysis.weight[2 * bands :].normal_(0, 0.05)
    codec.synthesis.weight.copy_(0.7 * filters * spread[:, None, None])


@dataclass(frozen=True)
class LatentScale:
    """Mean and spread of each latent channel over the corpus, (64,) each; folded on export."""

    mean: Tensor
    std: Tensor

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents (B, 64, T) in the codec's scale to unit variance."""
        return (latents - self.mean[:, None]) / self.std[:, None]

    def restore(self, latents: Tensor) -> Tensor:
        return latents * self.std[:, None] + self.mean[:, None]


@torch.no_grad()
def _put(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Writes a plain weight into a weight-normed convolution; rows of zeros get zero gain."""
    norm = weight.flatten(1).norm(dim=1).view(-1, 1, 1)
    direction = weight.clone()
    direction[norm.flatten() == 0] = 1.0
    layer.weight_v.copy_(direction)
    layer.weight_g.copy_(norm)
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)


@torch.no_grad()
def _put_snake(target: nn.Module, source: Snake) -> None:
    target.alpha.copy_(source.alpha)
    target.beta.copy_(source.beta)


@torch.no_grad()
def _put_identity(block: nn.Module) -> None:
    """Silences the three residual units of a full-rate block: they pass their input unchanged."""
    for number in (1, 2, 3):
        unit = getattr(block, f"res_unit{number}")
        _put(unit.conv2, torch.zeros_like(unit.conv2.weight_v))


@torch.no_grad()
def _no_snake(snake: nn.Module) -> None:
    snake.alpha.zero_()
    snake.beta.fill_(IDENTITY_BETA)


def _put_residual(target: nn.Module, source: Residual) -> None:
    _put_snake(target.snake1, source.snake1)
    _put(target.conv1, source.conv1.weight, source.conv1.bias)
    _put_snake(target.snake2, source.snake2)
    _put(target.conv2, source.conv2.weight, source.conv2.bias)


@torch.no_grad()
def export(codec: Codec, scale: LatentScale, posterior: float = 0.02) -> AutoencoderOobleck:
    """The codec as a plain Oobleck whose latents have unit variance.

    `posterior` is the constant standard deviation that the exported encoder reports.
    """
    vae = AutoencoderOobleck(
        encoder_hidden_size=WIDTH,
        downsampling_ratios=list(STRIDES),
        channel_multiples=list(MULTIPLES),
        decoder_channels=WIDTH,
        decoder_input_channels=LATENTS,
        audio_channels=2,
        sampling_rate=SAMPLE_RATE,
    )
    encoder, decoder = vae.encoder, vae.decoder

    weight = torch.zeros_like(encoder.conv1.weight_v)
    weight[0, 0, 3] = weight[1, 1, 3] = 1.0
    _put(encoder.conv1, weight)
    _put_identity(encoder.block[0])
    _no_snake(encoder.block[0].snake1)
    weight = torch.zeros_like(encoder.block[0].conv1.weight_v)
    weight[:, :2] = codec.analysis.weight
    _put(encoder.block[0].conv1, weight, codec.analysis.bias)
    for target, source in zip(encoder.block[1:], codec.encoder, strict=True):
        for number in range(3):
            _put_residual(getattr(target, f"res_unit{number + 1}"), source[number])
        _put_snake(target.snake1, source[3])
        _put(target.conv1, source[4].weight, source[4].bias)
    _put_snake(encoder.snake1, codec.encoder_snake)
    weight = torch.zeros_like(encoder.conv2.weight_v)
    weight[:LATENTS] = codec.to_latents.weight / scale.std[:, None, None]
    bias = torch.full_like(encoder.conv2.bias, math.log(math.expm1(posterior)))
    bias[:LATENTS] = (codec.to_latents.bias - scale.mean) / scale.std
    _put(encoder.conv2, weight, bias)

    weight = codec.from_latents.weight * scale.std[None, :, None]
    bias = codec.from_latents.bias + (codec.from_latents.weight * scale.mean[None, :, None]).sum(
        (1, 2)
    )
    _put(decoder.conv1, weight, bias)
    for target, source in zip(decoder.block[:-1], codec.decoder, strict=True):
        _put_snake(target.snake1, source[0])
        _put(target.conv_t1, source[1].weight, source[1].bias)
        for number in range(3):
            _put_residual(getattr(target, f"res_unit{number + 1}"), source[number + 2])
    last = decoder.block[len(codec.decoder)]
    _put_snake(last.snake1, codec.decoder_snake)
    weight = torch.zeros_like(last.conv_t1.weight_v)
    weight[:, :2] = codec.synthesis.weight
    _put(last.conv_t1, weight)
    _put_identity(last)
    _no_snake(decoder.snake1)
    weight = torch.zeros_like(decoder.conv2.weight_v)
    weight[0, 0, 3] = weight[1, 1, 3] = 1.0
    _put(decoder.conv2, weight)
    return vae.eval()
