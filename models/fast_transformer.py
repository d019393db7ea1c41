"""ACE-Step's transformer, faster: what no step changes is computed once a song.

- Cross-attention: keys and values of the condition are the same in every step. The unconditional
  row attends to copies of one learned vector, so whatever its query, the result is that vector's
  value: one constant a layer.
- Sliding-window layers attend in bands. diffusers masks a dense [length, length] matrix, and below
  Hopper no fused kernel takes a mask together with grouped heads: torch then computes the whole
  matrix, 5 GB at 240 s of XL.
- RMS norms are torch's own, one kernel instead of six with copies in float32.

Equal to diffusers' transformer up to rounding, but not bit for bit. The layers can be compiled too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.cuda_graph import GraphedStep

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CrossConstants:
    """What the cross-attention of one layer keeps for a song.

    Attributes:
        keys, values: [1, key heads, tokens, head width].
        null: output for the unconditional row, [1, 1, hidden width].
    """

    keys: torch.Tensor
    values: torch.Tensor
    null: torch.Tensor


@dataclass(frozen=True)
class SongConstants:
    """What the transformer keeps for a song.

    Attributes:
        layers: the constants of each layer's cross-attention.
        band_mask: see `banded`.
        placeholder: [1, 1, width], to pass where the condition goes; not used.
    """

    layers: Sequence[CrossConstants]
    band_mask: torch.Tensor
    placeholder: torch.Tensor


class FastTransformer:
    """One `AceStepTransformer1DModel` with this attention. Not thread-safe.

    Attributes:
        compiled: whether the layers are compiled.
        captured: whether steps are CUDA graphs; None before the first was captured.
    """

    def __init__(self, transformer: torch.nn.Module) -> None:
        """Replace the attention and the norms of `transformer` in place."""
        self.compiled = False
        self.captured: bool | None = None
        self._transformer = transformer
        self._bound: SongConstants | None = None
        self.resident: Callable[[torch.nn.Module], AbstractContextManager[None]] = nullcontext
        """Has a layer on the device within the block, where layers wait in main memory."""
        _fuse_norms(transformer)
        self._self, self._cross = [], []
        for layer in transformer.layers:
            self._self.append(_SelfAttention())
            self._cross.append(_CrossAttention())
            layer.self_attn.set_processor(self._self[-1])
            layer.cross_attn.set_processor(self._cross[-1])

    @property
    def implementation(self) -> str:
        """What a take calls this way of computing."""
        compiled = self.compiled and not _has_hooks(self._transformer)
        ways = (("fast", True), ("compiled", compiled), ("captured", self.captured))
        return ", ".join(way for way, taken in ways if taken)

    def __call__(self, **arguments: Any) -> tuple[torch.Tensor, ...]:
        """The transformer's forward pass under the song that is bound."""
        if not self.compiled:
            return self._transformer(**arguments)
        import torch
        from torch._dynamo.exc import TorchDynamoException

        # Compiled layers ignore hooks that were added later: with adapters they run uncompiled.
        if _has_hooks(self._transformer):
            with torch.compiler.set_stance("force_eager"):
                return self._transformer(**arguments)
        try:
            return self._transformer(**arguments)
        except TorchDynamoException as error:
            logger.warning("The transformer does not compile here, it runs uncompiled: %s", error)
            torch.compiler.set_stance("force_eager")
            self.compiled = False
            return self._transformer(**arguments)

    def compile(self, backend: Any = "inductor") -> None:
        """Compile the layers when they are next called: about half a minute, once for all lengths."""
        for layer in self._transformer.layers:
            layer.compile(fullgraph=True, dynamic=True, backend=backend)
        self.compiled = True

    def step(self, evaluate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`evaluate` for the steps of one song, captured as a CUDA graph where that is possible.

        Args:
            evaluate: binds the song and evaluates the transformer, always for tensors of the same
                shapes.
        """
        if self.captured is False or not self._on_cuda():
            return evaluate
        return GraphedStep(evaluate, "The transformer's step", self._note_captured)

    def _note_captured(self, succeeded: bool) -> None:
        self.captured = succeeded

    def _on_cuda(self) -> bool:
        """Whether every weight stays on a CUDA device: offloaded ones are copied in every step."""
        return all(weight.device.type == "cuda" for weight in self._transformer.parameters())

    def prepare(self, cond: torch.Tensor, null: torch.Tensor, frames: int) -> SongConstants:
        """Compute the constants of a song, through the layers' own hooks: adapters first, then this.

        Args:
            cond: [1, tokens, width] from the condition encoder.
            null: [1, any, width], copies of the learned unconditional vector.
            frames: latent frames of the song.
        """
        dit = self._transformer
        placeholder = cond.new_zeros(1, 1, cond.shape[-1])
        cond, null = dit.condition_embedder(cond), dit.condition_embedder(null[:, :1])
        attention = dit.layers[0].self_attn
        for processor in (*self._self, *self._cross):
            processor.grouped = _takes_grouped_heads(cond)
        return SongConstants(
            layers=[self._constants(layer, cond, null) for layer in dit.layers],
            band_mask=band_mask(
                math.ceil(frames / dit.patch_size),
                dit.config.sliding_window,
                attention.heads // attention.kv_heads,
                cond,
            ),
            placeholder=placeholder,
        )

    def _constants(
        self, layer: torch.nn.Module, cond: torch.Tensor, null: torch.Tensor
    ) -> CrossConstants:
        with self.resident(layer):
            return _cross_constants(layer.cross_attn, cond, null)

    def bind(self, song: SongConstants) -> None:
        """Let the next evaluations of the transformer use the constants of `song`."""
        if self._bound is song:
            return
        self._bound = song
        for self_attention, cross_attention, constants in zip(
            self._self, self._cross, song.layers, strict=True
        ):
            self_attention.band_mask = song.band_mask
            cross_attention.constants = constants


class _Attention:
    """What both processors have in common."""

    _attention_backend = "flash"
    """The model reads this, and builds no dense mask for a flash backend. Nothing else uses it."""

    _parallel_config = None

    grouped = True
    """Whether the kernels take fewer key heads than query heads; else keys are repeated."""

    def attend(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention of every position to all, [rows, heads, length, width]."""
        from torch.nn.functional import scaled_dot_product_attention

        groups = attn.heads // attn.kv_heads
        grouped = groups > 1 and self.grouped
        if not grouped:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return scaled_dot_product_attention(
            query, key, value, scale=attn.scaling, enable_gqa=grouped
        )


class _SelfAttention(_Attention):
    """Self-attention, in bands where the layer has a window."""

    band_mask: torch.Tensor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        """[rows, length, hidden width] to the same."""
        width = attn.head_dim
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, width)))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, (attn.kv_heads, width)))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.kv_heads, width)).transpose(1, 2)
        query = _rotate(query, *image_rotary_emb).transpose(1, 2)
        key = _rotate(key, *image_rotary_emb).transpose(1, 2)
        if attn.sliding_window:
            mask = self.band_mask
            mixed = banded(query, key, value, attn.sliding_window, attn.scaling, mask)
        else:
            mixed = self.attend(attn, query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


class _CrossAttention(_Attention):
    """Cross-attention of the conditional row; the unconditional row has a constant."""

    constants: CrossConstants

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """[rows, length, hidden width] to the same; row 1, if there is one, is unconditional."""
        import torch

        kept = self.constants
        query = attn.to_q(hidden_states[:1]).unflatten(-1, (attn.heads, attn.head_dim))
        query = attn.norm_q(query).transpose(1, 2)
        mixed = self.attend(attn, query, kept.keys, kept.values)
        out = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        if hidden_states.shape[0] == 1:
            return out
        return torch.cat([out, kept.null.expand_as(out)])


def banded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scale: float,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Attention of each position to those at most `window` away.

    Blocks of `window` queries see three blocks of keys, which are views of the padded keys, not
    copies. Query heads that share a key head become more queries of one block, so that the kernel
    sees no grouped heads.

    Args:
        query: [rows, heads, length, width].
        key, value: [rows, key heads, length, width].
        mask: by `band_mask`.
    """
    from torch.nn.functional import pad, scaled_dot_product_attention

    rows, heads, length, width = query.shape
    shared, blocks = key.shape[1], mask.shape[0]
    missing = blocks * window - length
    query = pad(query, (0, 0, 0, missing))
    query = query.reshape(rows * shared, heads // shared, blocks, window, width)
    query = query.permute(2, 0, 1, 3, 4).reshape(blocks, rows * shared, -1, width)
    key, value = (
        pad(x, (0, 0, window, window + missing))
        .reshape(rows * shared, -1, width)
        .unfold(1, 3 * window, window)  # [rows * shared, blocks, width, 3 * window]
        .permute(1, 0, 3, 2)
        for x in (key, value)
    )
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    mixed = mixed.view(blocks, rows * shared, heads // shared, window, width)
    mixed = mixed.permute(1, 2, 0, 3, 4).reshape(rows, heads, blocks * window, width)
    return mixed[:, :, :length]


def band_mask(length: int, window: int, groups: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask [blocks, 1, groups * window, 3 * window] for `banded`, typed as `like`.

    0 where a key exists and is at most `window` away, minus infinity elsewhere. Queries past the
    end see one key, so that their softmax stays finite. There are two blocks at least: to a
    compiler a size of one is a case of its own.
    """
    import torch

    blocks = max(2, math.ceil(length / window))
    block = torch.arange(blocks)[:, None, None] * window
    query = torch.arange(window)[:, None] + block
    key = torch.arange(3 * window)[None] - window + block
    allowed = ((query - key).abs() <= window) & (key >= 0) & (key < length)
    allowed[..., window] |= ~allowed.any(-1)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    return mask.repeat(1, groups, 1)[:, None].to(like)


def _fuse_norms(transformer: torch.nn.Module) -> None:
    """Put torch's RMS norm in place of diffusers', over the same weights."""
    import torch

    rms_norm = type(transformer.norm_out)
    for module in list(transformer.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, rms_norm):
                fused = torch.nn.RMSNorm(norm.weight.shape, norm.eps, device="meta")
                fused.weight = norm.weight
                setattr(module, name, fused)


def _has_hooks(transformer: torch.nn.Module) -> bool:
    """Whether something, such as an adapter, hooks into a layer."""
    return any(vars(module)["_forward_hooks"] for module in transformer.layers.modules())


def _cross_constants(attn: Any, cond: torch.Tensor, null: torch.Tensor) -> CrossConstants:
    heads = (attn.kv_heads, attn.head_dim)
    value = attn.to_v(null).unflatten(-1, heads)
    value = value.repeat_interleave(attn.heads // attn.kv_heads, dim=2)
    return CrossConstants(
        keys=attn.norm_k(attn.to_k(cond).unflatten(-1, heads)).transpose(1, 2).contiguous(),
        values=attn.to_v(cond).unflatten(-1, heads).transpose(1, 2).contiguous(),
        null=attn.to_out[0](value.flatten(2)),
    )


def _takes_grouped_heads(x: torch.Tensor) -> bool:
    """Whether a fused kernel takes grouped heads, for tensors like `x` and no mask.

    On CUDA only flash attention does: 16-bit numbers, from Ampere on. AMD's kernels differ by card.
    Without such a kernel torch would compute the whole matrix of attention weights.
    """
    import torch

    if x.device.type != "cuda":
        return True
    if torch.version.hip:
        return False
    return x.element_size() == 2 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [rows, length, heads, width], halves rotated against each other.

    Args:
        cos, sin: [length, width].
    """
    import torch

    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return torch.addcmul(wide * cos[:, None], turned, sin[:, None].float()).to(x.dtype)
