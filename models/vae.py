"""The VAE: sound to latents and back, in tiles that are exactly the whole.

Latents are [1, frames, channels] at 25 frames a second, sound is [2, samples] at the VAE's rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from core.results import Progress

if TYPE_CHECKING:
    import torch


FRAME_RATE = 25
"""Latent frames a second."""


TILE_FRAMES = 256
"""Latent frames decoded at a time: what bounds memory, about 10 s of sound."""


TILE_OVERLAP = 12
"""Latent frames decoded on either side of a tile and thrown away (more if the VAE sees farther)."""


def decode(vae: torch.nn.Module, latents: torch.Tensor) -> Iterator[Progress]:
    """Latents to sound, float32 on the CPU (returned).

    Works in tiles that overlap by what the decoder sees, so that the whole is the same as decoded
    in one piece to rounding, in memory that does not grow with the song.
    """
    import torch

    decoder, hop = vae.decoder, math.prod(vae.config.downsampling_ratios)
    overlap = max(TILE_OVERLAP, receptive_frames(vae.config))
    z = latents.transpose(1, 2).to(next(decoder.parameters()).dtype)
    frames = z.shape[2]
    sound = torch.empty(2, frames * hop)
    tiles = range(0, frames, TILE_FRAMES)
    yield Progress(stage="Decoding", step=0, steps=len(tiles))
    for i, start in enumerate(tiles):
        end = min(start + TILE_FRAMES, frames)
        left = min(start, overlap)
        wave = decoder(z[:, :, start - left : end + overlap])[0]
        keep = wave[:, left * hop : (left + end - start) * hop]
        sound[:, start * hop : end * hop] = keep.float().cpu()
        yield Progress(stage="Decoding", step=i + 1, steps=len(tiles))
    return sound


def encode(vae: torch.nn.Module, sound: torch.Tensor) -> Iterator[Progress]:
    """Sound [2, samples] at the VAE's rate to latents, float32 [1, frames, channels] (returned).

    The posterior's mean, not a draw from it: the same sound always gives the same latents. The
    last frame is filled up with silence. In overlapping tiles, as `decode`.
    """
    import torch

    first = next(vae.encoder.parameters())
    hop = math.prod(vae.config.downsampling_ratios)
    overlap = max(TILE_OVERLAP, receptive_frames(vae.config))
    frames = math.ceil(sound.shape[1] / hop)
    sound = torch.nn.functional.pad(sound, (0, frames * hop - sound.shape[1]))
    tiles = range(0, frames, TILE_FRAMES)
    found = []
    yield Progress(stage="Encoding", step=0, steps=len(tiles))
    for i, start in enumerate(tiles):
        end = min(start + TILE_FRAMES, frames)
        left = min(start, overlap)
        heard = sound[None, :, (start - left) * hop : (end + overlap) * hop]
        mean = vae.encode(heard.to(first.device, first.dtype)).latent_dist.mean
        found.append(mean[:, :, left : left + end - start].float())
        yield Progress(stage="Encoding", step=i + 1, steps=len(tiles))
    return torch.cat(found, dim=2).transpose(1, 2)


def receptive_frames(config: Any) -> int:
    """How many latent frames to either side one decoded sample depends on.

    Counted from an Oobleck decoder's shape: convolutions of 7 before and after, in each block a
    transposed convolution over twice its stride and residual units dilated by 1, 3 and 9.
    """
    reach, rate = 3.0, 1.0
    for stride in reversed(config.downsampling_ratios):
        reach += 1 / rate
        rate *= stride
        reach += 3 * (1 + 3 + 9) / rate
    return math.ceil(reach + 3 / rate)


def skip_zeros(vae: torch.nn.Module) -> None:
    """Leave out what a VAE computes only to multiply it by zero, at its full sample rate.

    The embedded model's learned part runs at a sixtieth of it: its outermost residual units return
    their input, and of its outermost channels all but two are silent. Ten times faster there; XL's
    VAE has no zeros and stays as it is.
    """
    import torch

    for block in [*vae.encoder.block, *vae.decoder.block]:
        for name in ("res_unit1", "res_unit2", "res_unit3"):
            last = getattr(block, name).conv2
            if not last.weight_g.any() and (last.bias is None or not last.bias.any()):
                setattr(block, name, torch.nn.Identity())
    _thin_encoder(vae.encoder)
    _thin_decoder(vae.decoder)


def _few(heard: torch.Tensor, block: torch.nn.Module) -> bool:
    """Whether a block at the full rate passes on few channels, each as it comes."""
    import torch

    units = (block.res_unit1, block.res_unit2, block.res_unit3)
    plain = all(isinstance(unit, torch.nn.Identity) for unit in units)
    return plain and int(heard.sum()) <= len(heard) // 8


def _thin_encoder(encoder: torch.nn.Module) -> None:
    """Drop the channels of the first convolution that are silent, all the way to the filterbank."""
    import torch

    outer = encoder.block[0]
    first = torch.nn.utils.remove_weight_norm(encoder.conv1)
    heard = (first.weight != 0).any(2).any(1) | (first.bias != 0)
    if not _few(heard, outer):
        return
    first.weight.data, first.bias.data = first.weight.data[heard], first.bias.data[heard]
    first.out_channels = int(heard.sum())
    for table in (outer.snake1.alpha, outer.snake1.beta):
        table.data = table.data[:, heard]
    bank = torch.nn.utils.remove_weight_norm(outer.conv1)
    bank.weight.data = bank.weight.data[:, heard]
    bank.in_channels = int(heard.sum())


def _thin_decoder(decoder: torch.nn.Module) -> None:
    """Compute only the channels of the last filterbank that are not silent."""
    import torch

    outer = decoder.block[-1]
    bank = torch.nn.utils.remove_weight_norm(outer.conv_t1)
    heard = (bank.weight != 0).any(2).any(0) | (bank.bias != 0)
    if not _few(heard, outer):
        return
    outer.conv_t1 = _filterbank(bank, heard)
    for table in (decoder.snake1.alpha, decoder.snake1.beta):
        table.data = table.data[:, heard]
    last = torch.nn.utils.remove_weight_norm(decoder.conv2)
    last.weight.data = last.weight.data[:, heard]
    last.in_channels = int(heard.sum())


def _filterbank(conv: torch.nn.ConvTranspose1d, heard: torch.Tensor) -> torch.nn.Module:
    """The `heard` channels of a transposed convolution, as one matrix product and overlap-add."""
    import torch

    width, stride, left = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    kernels = conv.weight.data[:, heard]

    class Filterbank(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", kernels.flatten(1).T.contiguous())
            self.register_buffer("bias", conv.bias.data[heard].unsqueeze(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """[1, channels, frames] to [1, heard, frames * stride]."""
            frames = x.shape[2]
            added = torch.nn.functional.fold(
                self.matrix @ x,
                output_size=(1, (frames - 1) * stride + width),
                kernel_size=(1, width),
                stride=(1, stride),
            )
            return added[:, :, 0, left : left + frames * stride] + self.bias

    return Filterbank()
