"""Checks shared by everything that loads a checkpoint: whole, finite, fitting, enough memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from core.errors import StudioError
from models import weights
from models.vae import FRAME_RATE

if TYPE_CHECKING:
    import torch
    from diffusers import AceStepPipeline

    from models import catalog


def check_pipeline(
    model: catalog.Model, pipe: AceStepPipeline, stored: dict[str, set[str]]
) -> None:
    """Refuse an ACE-Step checkpoint whose parts are incomplete, broken or do not fit together.

    Args:
        stored: names of the tensors in the files of each part, as `checkpoints.inspect` found them.

    Raises:
        StudioError: `model-broken`, `model-mismatch`.
    """
    for part, names in stored.items():
        module = getattr(pipe, part, None)  # a planner may lie beside the pipeline's parts
        if module is None:
            continue
        if missing := sorted(set(module.state_dict()) - names):
            raise weights.broken(model, f"{part}/", f"lacks the tensor {missing[0]}")
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise weights.broken(model, f"{part}/", f"has no finite numbers in {name}")
    if not bool(pipe.condition_encoder.silence_latent.abs().sum() > 0):
        raise weights.broken(model, "condition_encoder/", "has an empty silence latent")
    dit, cond, vae = pipe.transformer.config, pipe.condition_encoder.config, pipe.vae.config
    text = pipe.text_encoder.config
    must_equal = {
        "latent channels": (dit.audio_acoustic_hidden_dim, vae.decoder_input_channels),
        "timbre channels": (cond.timbre_hidden_dim, vae.decoder_input_channels),
        "transformer input": (dit.in_channels, 3 * vae.decoder_input_channels),
        "condition width": (dit.encoder_hidden_size or dit.hidden_size, cond.hidden_size),
        "text width": (text.hidden_size, cond.text_hidden_dim),
        "latent frames a second": (
            vae.sampling_rate / math.prod(vae.downsampling_ratios),
            FRAME_RATE,
        ),
    }
    for what, (one, other) in must_equal.items():
        if one != other:
            raise weights.mismatch(model, f"{what} {one:g} against {other:g}")
    if len(pipe.tokenizer) > text.vocab_size:
        raise weights.mismatch(
            model, f"{len(pipe.tokenizer)} words for {text.vocab_size} embeddings"
        )


def is_finite(x: torch.Tensor) -> bool:
    """Whether `x`, of any float type, holds no NaN and no infinity.

    By the extremes, through which both propagate: one pass over the memory and no copy, 20 times
    faster than `torch.isfinite` on XL's weights.
    """
    if not x.numel():
        return True
    low, high = x.aminmax()
    return math.isfinite(low) and math.isfinite(high)


@contextmanager
def memory_errors(device: str, model: weights.Weights, seconds: float) -> Iterator[None]:
    """Raise running out of memory as a `StudioError`.

    Args:
        device: "cpu", "cuda" or "mps".
        seconds: length of the song; the error offers half of it.

    Raises:
        StudioError: `out-of-memory`.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        short = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not short and not re.search("not enough memory|out of memory", str(error)):
            raise
        raise StudioError(
            "out-of-memory",
            device=device,
            seconds=seconds,
            model=model.title,
            shorter=max(10, int(seconds / 2)),
        ) from error
