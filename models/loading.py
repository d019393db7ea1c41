"""Loading of checkpoints with the checks that all share: complete, finite, fitting, memory."""

from __future__ import annotations

import errno
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import StudioError
from models import authors_layout, checkpoints, weights
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
        stored: names of the tensors in the files of each part, as `checkpoints.inspect` found
            them; a part that is not named was checked when it was loaded.

    Raises:
        StudioError: `model-broken`, `model-mismatch`.
    """
    import torch

    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        tensors = module.state_dict()
        if missing := sorted(set(tensors) - stored.get(part, set(tensors))):
            raise weights.broken(model, f"{part}/", f"lacks the tensor {missing[0]}")
        for name, tensor in tensors.items():
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


def load_pipeline(
    model: catalog.Model, folder: Path, transformer_dtype: torch.dtype, dtype: torch.dtype
) -> AceStepPipeline:
    """Load the components of the checkpoint in `folder`, in either layout, onto the CPU.

    Args:
        transformer_dtype: number type of the transformer.
        dtype: number type of everything else.

    Raises:
        StudioError: `model-broken`.
    """
    from diffusers import AceStepPipeline

    with load_errors(partial(weights.broken, model), folder.name):
        warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
        if authors_layout.matches(folder):
            return _load_authors_layout(model, folder, transformer_dtype, dtype)
        return AceStepPipeline.from_pretrained(
            folder,
            dtype={"transformer": transformer_dtype, "default": dtype},
            local_files_only=True,
            use_safetensors=True,
        )


def load_encoders(model: catalog.Model, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The text and the condition encoder of a checkpoint that was loaded before, on the CPU.

    Raises:
        StudioError: `model-broken`, if the files have changed.
    """
    from diffusers.pipelines.ace_step import AceStepConditionEncoder
    from transformers import Qwen3Model

    fail = partial(weights.broken, model)
    home = folder / "text_encoder"
    with load_errors(fail, folder.name):
        if authors_layout.matches(folder):
            parts = checkpoints.shared_parts(folder)
            home = parts["text_encoder"]
            condition_encoder = authors_layout.load_components(
                model,
                folder,
                parts["silence"],
                {"default": dtype},
                model.weights_file,
                only=("condition_encoder",),
            )["condition_encoder"]
        else:
            condition_encoder = AceStepConditionEncoder.from_pretrained(
                folder / "condition_encoder",
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
            )
    text_encoder = load_transformers(Qwen3Model, home, fail, surplus_allowed=True, dtype=dtype)
    return {"text_encoder": text_encoder, "condition_encoder": condition_encoder}


def _load_authors_layout(
    model: catalog.Model, folder: Path, transformer_dtype: torch.dtype, dtype: torch.dtype
) -> AceStepPipeline:
    from diffusers import AceStepPipeline, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, Qwen3Model

    parts = checkpoints.shared_parts(folder)
    for part in (*authors_layout.SHARED, "silence"):
        if part not in parts:
            raise weights.broken(model, part, "is missing")
    options = {"local_files_only": True, "use_safetensors": True}
    return AceStepPipeline(
        **authors_layout.load_components(
            model,
            folder,
            parts["silence"],
            {"transformer": transformer_dtype, "default": dtype},
            model.weights_file,
        ),
        vae=AutoencoderOobleck.from_pretrained(parts["vae"], torch_dtype=dtype, **options),
        text_encoder=load_transformers(
            Qwen3Model,
            parts["text_encoder"],
            partial(weights.broken, model),
            surplus_allowed=True,
            dtype=dtype,
        ),
        tokenizer=AutoTokenizer.from_pretrained(parts["tokenizer"], local_files_only=True),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


Fail = Callable[[str, str], StudioError]
"""Makes the error for a file and its problem, such as `weights.broken` of a model."""


def load_transformers(
    kind: Any,
    folder: Path,
    fail: Fail,
    *,
    unused: tuple[str, ...] = (),
    surplus_allowed: bool = False,
    check_finite: bool = False,
    **options: Any,
) -> Any:
    """Load a model of transformers from safetensors, with every tensor accounted for.

    Args:
        kind: the class to load, such as `Qwen3Model`.
        unused: ends of the names of tensors that may be missing.
        surplus_allowed: ignore tensors that the model does not use.
        check_finite: also refuse weights that hold NaN or infinity.
        options: for `from_pretrained`.

    Returns:
        The model, in evaluation mode and without gradients.

    Raises:
        StudioError: `model-broken` if it does not load, or if a tensor is missing, surplus or of
            another shape.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = "model.safetensors"
    with load_errors(fail, file):
        loaded, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    optional = unused
    if getattr(loaded.config, "tie_word_embeddings", False):
        optional = (*optional, "lm_head.weight")
    missing = [key for key in report["missing_keys"] if not key.endswith(optional)]
    if missing:
        raise fail(file, f"lacks the tensor {min(missing)}")
    if changed := sorted(map(str, report["mismatched_keys"])):
        raise fail(file, f"holds {changed[0]} in another shape")
    surplus = [key for key in map(str, report["unexpected_keys"]) if not key.endswith(unused)]
    if surplus and not surplus_allowed:
        raise fail(file, f"holds {min(surplus)}, which does not belong there")
    if check_finite:
        for name, tensor in loaded.state_dict().items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise fail(file, f"has no finite numbers in {name}")
    return loaded.eval().requires_grad_(False)


@contextmanager
def load_errors(fail: Fail, file: str) -> Iterator[None]:
    """Raise what a library raises for an unusable file as `fail` names it.

    Running out of memory passes through unchanged. The library's own text is left out: it holds
    paths of this computer.

    Raises:
        StudioError: `model-broken`.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise fail(file, f"does not load ({type(error).__name__})") from error


OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"  # torch on a CPU
    r"|(CUDA|HIP|XPU|MPS backend) out of memory|CUDA error: out of memory"
    r"|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|Invalid buffer size: [\d.]+ ?[KMGT]?i?B"  # torch on MPS: larger than any buffer may be
    r"|\[(metal::)?malloc\w*\] (Unable|Attempting) to allocate"  # MLX
    r"|Command buffer execution failed: Insufficient Memory"  # MLX
    r"|Cannot allocate memory \(os error 12\)"  # safetensors
)
"""Messages by which allocators report that memory is exhausted, where the type does not tell."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory is exhausted, on the CPU or on an accelerator."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def out_of_memory_as(replacement: StudioError) -> Iterator[None]:
    """Raise `replacement` in place of whatever reports that memory is exhausted."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StudioError) or not is_out_of_memory(error):
            raise
        raise replacement from error


def memory_errors(
    device: str, model: weights.Weights, seconds: float
) -> AbstractContextManager[None]:
    """Raise running out of memory as a `StudioError`.

    Args:
        device: "cpu", "cuda" or "mps".
        seconds: length of the song; the error offers half of it.

    Raises:
        StudioError: `out-of-memory`.
    """
    return out_of_memory_as(
        StudioError(
            "out-of-memory",
            device=device,
            seconds=seconds,
            model=model.title,
            shorter=max(10, int(seconds / 2)),
        )
    )


def cache_argument(model: Any) -> str:
    """The name of the argument by which a model of transformers takes its key-value cache.

    transformers 5.24 renamed it, and 5.40 is to drop the old name.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
