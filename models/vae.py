"""The VAE: encode audio to latents and decode latents to audio, in tiles with exact overlap.

Latents are [1, frames, channels] at 25 frames a second; audio is [2, samples] at the VAE's rate.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from core.results import Progress

if TYPE_CHECKING:
    import torch


FRAME_RATE = 25
"""Latent frames a second."""


TILE_FRAMES = 256
"""Latent frames decoded at a time, about 10 s of audio. Bounds the memory of a decode: for XL's
decoder 0.8 GB in bfloat16, twice that in float32."""

SMALL_CARDS_GB = {9: 4, 13: 2}
"""By how much tiles are divided on GPUs of up to so many GB: 0.4 and 0.5 GB in bfloat16."""


TILE_OVERLAP = 12
"""Latent frames decoded on either side of a tile and discarded; more if the VAE's receptive field
is wider."""


def decode(
    vae: torch.nn.Module, latents: torch.Tensor, tile: int | None = None
) -> Generator[Progress, None, torch.Tensor]:
    """Decode latents to audio, float32 [2, samples] on the CPU (the generator's return value).

    The tiles overlap by the decoder's receptive field, so the result equals an untiled decode up
    to rounding, while memory does not grow with the song.

    Args:
        tile: frames decoded at a time; `tile_frames` if None.
    """
    import torch

    decoder, hop = vae.decoder, math.prod(vae.config.downsampling_ratios)
    overlap = max(TILE_OVERLAP, receptive_frames(vae.config))
    z = latents.transpose(1, 2).to(next(decoder.parameters()).dtype)
    frames = z.shape[2]
    size = min(tile, TILE_FRAMES) if tile else tile_frames(z.device)
    audio = torch.empty(2, frames * hop)
    tiles = range(0, frames, size)
    yield Progress(stage="Decoding", step=0, steps=len(tiles))
    for i, start in enumerate(tiles):
        end = min(start + size, frames)
        left = min(start, overlap)
        wave = decoder(z[:, :, start - left : end + overlap])[0]
        keep = wave[:, left * hop : (left + end - start) * hop]
        audio[:, start * hop : end * hop] = keep.float().cpu()
        yield Progress(stage="Decoding", step=i + 1, steps=len(tiles))
    return audio


def encode(
    vae: torch.nn.Module, audio: torch.Tensor, tile: int | None = None
) -> Generator[Progress, None, torch.Tensor]:
    """Encode audio [2, samples] at the VAE's rate to latents, float32 [1, frames, channels].

    Takes the mean of the posterior instead of a sample, so that the same audio always gives the
    same latents. The last frame is padded with zeros. Tiled like `decode`. The latents are the
    generator's return value.
    """
    import torch

    first = next(vae.encoder.parameters())
    hop = math.prod(vae.config.downsampling_ratios)
    overlap = max(TILE_OVERLAP, receptive_frames(vae.config))
    frames = math.ceil(audio.shape[1] / hop)
    audio = torch.nn.functional.pad(audio, (0, frames * hop - audio.shape[1]))
    size = min(tile, TILE_FRAMES) if tile else tile_frames(first.device)
    tiles = range(0, frames, size)
    parts = []
    yield Progress(stage="Encoding", step=0, steps=len(tiles))
    for i, start in enumerate(tiles):
        end = min(start + size, frames)
        left = min(start, overlap)
        piece = audio[None, :, (start - left) * hop : (end + overlap) * hop]
        mean = vae.encode(piece.to(first.device, first.dtype)).latent_dist.mean
        parts.append(mean[:, :, left : left + end - start].float())
        yield Progress(stage="Encoding", step=i + 1, steps=len(tiles))
    return torch.cat(parts, dim=2).transpose(1, 2)


def tile_frames(device: torch.device) -> int:
    """Latent frames of a tile on `device`: by its whole memory, so that a machine keeps its samples."""
    import torch

    if device.type not in ("cuda", "xpu"):
        return TILE_FRAMES
    properties = torch.get_device_module(device).get_device_properties(device)
    total = properties.total_memory / 1e9
    return TILE_FRAMES // next((by for gb, by in SMALL_CARDS_GB.items() if total <= gb), 1)


def receptive_frames(config: Any) -> int:
    """Latent frames to either side that one decoded sample depends on.

    Computed from an Oobleck decoder's shape: convolutions of 7 before and after, in each block a
    transposed convolution over twice its stride and residual units dilated by 1, 3 and 9.
    """
    reach, rate = 3.0, 1.0
    for stride in reversed(config.downsampling_ratios):
        reach += 1 / rate
        rate *= stride
        reach += 3 * (1 + 3 + 9) / rate
    return math.ceil(reach + 3 / rate)


def skip_zeros(vae: torch.nn.Module) -> None:
    """Remove, in place, the parts of a VAE whose weights are zero at its full sample rate.

    In the embedded model's VAE the outermost residual units return their input, and all but two of
    the outermost channels are always zero: its learned part runs at a sixtieth of the sample rate.
    Decodes about ten times faster; XL's VAE has no such zeros and stays as it is.
    """
    import torch

    for block in [*vae.encoder.block, *vae.decoder.block]:
        for name in ("res_unit1", "res_unit2", "res_unit3"):
            last = getattr(block, name).conv2
            if not last.weight_g.any() and (last.bias is None or not last.bias.any()):
                setattr(block, name, torch.nn.Identity())
    _prune_encoder(vae.encoder)
    _prune_decoder(vae.decoder)


def _can_prune(used: torch.Tensor, block: torch.nn.Module) -> bool:
    """Whether a block at the full sample rate only passes on its input, and few channels of it.

    Args:
        used: bool [channels], whether a channel is ever other than zero.
    """
    import torch

    units = (block.res_unit1, block.res_unit2, block.res_unit3)
    passes_on = all(isinstance(unit, torch.nn.Identity) for unit in units)
    return passes_on and int(used.sum()) <= len(used) // 8


def _prune_encoder(encoder: torch.nn.Module) -> None:
    """Drop the all-zero channels of the first convolution, up to and including the filterbank."""
    import torch

    outer = encoder.block[0]
    first = torch.nn.utils.remove_weight_norm(encoder.conv1)
    used = (first.weight != 0).any(2).any(1) | (first.bias != 0)
    if not _can_prune(used, outer):
        return
    first.weight.data, first.bias.data = first.weight.data[used], first.bias.data[used]
    first.out_channels = int(used.sum())
    for table in (outer.snake1.alpha, outer.snake1.beta):
        table.data = table.data[:, used]
    bank = torch.nn.utils.remove_weight_norm(outer.conv1)
    bank.weight.data = bank.weight.data[:, used]
    bank.in_channels = int(used.sum())


def _prune_decoder(decoder: torch.nn.Module) -> None:
    """Compute only those channels of the last filterbank that are not all zero."""
    import torch

    outer = decoder.block[-1]
    bank = torch.nn.utils.remove_weight_norm(outer.conv_t1)
    used = (bank.weight != 0).any(2).any(0) | (bank.bias != 0)
    if not _can_prune(used, outer):
        return
    outer.conv_t1 = _filterbank(bank, used)
    for table in (decoder.snake1.alpha, decoder.snake1.beta):
        table.data = table.data[:, used]
    last = torch.nn.utils.remove_weight_norm(decoder.conv2)
    last.weight.data = last.weight.data[:, used]
    last.in_channels = int(used.sum())


def _filterbank(conv: torch.nn.ConvTranspose1d, used: torch.Tensor) -> torch.nn.Module:
    """The `used` channels of a transposed convolution, as one matrix product and overlap-add."""
    import torch

    width, stride, left = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    kernels = conv.weight.data[:, used]

    class Filterbank(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", kernels.flatten(1).T.contiguous())
            self.register_buffer("bias", conv.bias.data[used].unsqueeze(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """[1, channels, frames] to [1, used, frames * stride]."""
            frames = x.shape[2]
            summed = torch.nn.functional.fold(
                self.matrix @ x,
                output_size=(1, (frames - 1) * stride + width),
                kernel_size=(1, width),
                stride=(1, stride),
            )
            return summed[:, :, 0, left : left + frames * stride] + self.bias

    return Filterbank()
