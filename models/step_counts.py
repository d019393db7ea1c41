"""What a guided step of the transformer costs, counted instead of measured: launches, arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from models.fast_transformer import FastTransformer

if TYPE_CHECKING:
    import torch


VIEWS = frozenset(
    "view _unsafe_view reshape expand transpose permute t slice select split split_with_sizes"
    " unsqueeze squeeze unbind alias detach chunk as_strided _reshape_alias lift_fresh empty unfold"
    " empty_like".split()
)
"""Operators of torch that launch nothing on a GPU."""


def count_launches(
    transformer: Any, config: Any, dtype: torch.dtype, frames: int, tokens: int
) -> int:
    """Operations of one guided step of a transformer on the meta device; attention and
    torch's own norms count as one each.

    Args:
        transformer: diffusers', or a `FastTransformer` of it.
        config: the transformer's.
    """
    import torch
    from torch.nn import functional
    from torch.utils._python_dispatch import TorchDispatchMode

    launched = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal launched
            launched += operator.overloadpacket.__name__ not in VIEWS
            return operator(*args, **(kwargs or {}))

    def fused(*tensors: torch.Tensor, query: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        nonlocal launched
        launched += 1
        return torch.empty_like(tensors[0] if query is None else query)

    fast = isinstance(transformer, FastTransformer)
    like = {"device": "meta", "dtype": dtype}
    condition = torch.empty(2, tokens, config.encoder_hidden_size, **like)
    if fast:
        constants = transformer.prepare(condition[:1], condition[1:], frames)
        transformer.bind(constants)
        condition = constants.placeholder.expand(2, -1, -1)
    channels, t = config.audio_acoustic_hidden_dim, torch.empty(2, **like)
    kernels = ("scaled_dot_product_attention", "rms_norm")
    real = {name: getattr(functional, name) for name in kernels}
    for name in kernels:
        setattr(functional, name, fused)
    try:
        # In inference mode, operators that do nothing would be counted.
        with torch.inference_mode(False), torch.no_grad(), Counter():
            transformer(
                hidden_states=torch.empty(2, frames, channels, **like),
                timestep=t,
                timestep_r=t,
                encoder_hidden_states=condition,
                context_latents=torch.empty(2, frames, config.in_channels - channels, **like),
                return_dict=False,
            )
    finally:
        for name in kernels:
            setattr(functional, name, real[name])
    return launched


def step_flops(config: Any, frames: int, tokens: int) -> float:
    """Multiplications and additions of one guided step as diffusers does it."""
    patches, width, inner = (
        -(-frames // config.patch_size),
        config.hidden_size,
        config.intermediate_size,
    )
    query = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    matrices = 2 * patches * (4 * width * query + 2 * width * keys + 3 * width * inner)
    matrices += 4 * tokens * width * keys
    return 2 * config.num_hidden_layers * (matrices + 4 * patches * query * (patches + tokens))


def longest_kernel(work: Callable[[], Any], cuda: bool) -> str:
    """The name of the kernel, or on a CPU of the operation, that takes most of the time of `work`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    return max(profiler.key_averages(), key=lambda event: getattr(event, spent)).key
