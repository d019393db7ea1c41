"""Qwen3 with a static key-value cache: the mathematics of transformers without its overhead.

For the embedded planner, where a token takes a millisecond, most of the time in transformers is
Python.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3ForCausalLM

log = logging.getLogger(__name__)


def supports(config: Any) -> bool:
    """Whether `Qwen3` can run a model with this configuration: all that were published."""
    return (
        set(config.layer_types) == {"full_attention"}
        and config.hidden_act == "silu"
        and not config.attention_bias
    )


class Layer(NamedTuple):
    """The weights of one layer; projections of the same input are joined."""

    input_norm: torch.Tensor
    query_key_value: torch.Tensor
    head_norms: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Qwen3:
    """A Qwen3 that `supports` accepts.

    Joins the weights of `model` and leaves views of them in it: it still works, in the same memory.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.config = model.config
        self.device, self.dtype = model.device, model.dtype
        self.rotary = model.model.rotary_emb
        self.embeddings = model.get_input_embeddings().weight.detach()
        self.final_norm = model.model.norm.weight.detach()
        self.layers = [self._layer(layer) for layer in model.model.layers]
        self._token_layer = self._one_token

    def compile(self, backend: Any = "inductor") -> None:
        """Compile the layer of `step` when it is next called: once for all layers and lengths."""
        import torch

        compiled = torch.compile(self._one_token, fullgraph=True, backend=backend)

        def with_fallback(*arguments: Any) -> torch.Tensor:
            from torch._dynamo import mark_dynamic
            from torch._dynamo.exc import TorchDynamoException

            _, _, keys, values, _, _, mask = arguments
            for tensor, axis in ((keys, 2), (values, 2), (mask, 3)):
                mark_dynamic(tensor, axis)
            try:
                return compiled(*arguments)
            except TorchDynamoException as error:
                log.warning("The planner does not compile here, it runs uncompiled: %s", error)
                self._token_layer = self._one_token
                return self._one_token(*arguments)

        self._token_layer = with_fallback

    def _layer(self, layer: torch.nn.Module) -> Layer:
        import torch

        attention, mlp = layer.self_attn, layer.mlp
        head_norms = [
            *[attention.q_norm.weight] * self.config.num_attention_heads,
            *[attention.k_norm.weight] * self.config.num_key_value_heads,
        ]
        return Layer(
            input_norm=layer.input_layernorm.weight.detach(),
            query_key_value=_join(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=torch.stack(head_norms).detach(),
            output=attention.o_proj.weight.detach(),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=_join(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj.weight.detach(),
        )

    def forward(
        self, ids: torch.Tensor, cache: KeyValueCache, last_only: bool = True
    ) -> torch.Tensor:
        """Read ids [rows, new] after what `cache` holds, and add them to it.

        Returns:
            The final hidden states of the last of them, [rows, width], or of all of them,
            [rows, new, width].
        """
        import torch
        from torch.nn.functional import linear, silu

        eps = self.config.rms_norm_eps
        with torch.inference_mode():
            begin, end = cache.length, cache.length + ids.shape[1]
            mask = cache.mask(begin, end)
            rotation = cache.cos[:, begin:end], cache.sin[:, begin:end]
            x = self.embeddings[ids]
            for i, layer in enumerate(self.layers):
                normed = rms_norm(x, layer.input_norm, eps)
                x = x + self._attention(normed, layer, cache, i, rotation, mask)
                gate, up = linear(rms_norm(x, layer.mlp_norm, eps), layer.gate_up).chunk(2, -1)
                x = x + linear(silu(gate) * up, layer.down)
            cache.length = end
            return rms_norm(x[:, -1] if last_only else x, self.final_norm, eps)

    def step(
        self, ids: torch.Tensor, cache: KeyValueCache, slot: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """`forward` for one token a row, without a size or an index that comes from the host.

        Every tensor keeps its place and its shape, so that the step can be captured as a CUDA
        graph. Attends over the whole cache under `mask`, which rounds otherwise than `forward`.
        `cache.length` stays as it is.

        Args:
            ids: [rows].
            slot: int64 [1], on the device: where in the cache the token goes.
            mask: [rows, 1, 1, size], in the model's dtype: 0 for what is attended to, `slot`
                included, else -inf.

        Returns:
            The final hidden states [rows, width].
        """
        rotation = cache.cos.index_select(1, slot), cache.sin.index_select(1, slot)
        x = self.embeddings.index_select(0, ids).view(len(ids), 1, -1)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = self._token_layer(x, layer, keys, values, rotation, slot, mask)
        return rms_norm(x[:, -1], self.final_norm, self.config.rms_norm_eps)

    def _one_token(
        self,
        x: torch.Tensor,
        layer: Layer,
        keys: torch.Tensor,
        values: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        slot: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """One layer for one token a row, [rows, 1, width] to the same; see `step`."""
        from torch.nn.functional import linear, scaled_dot_product_attention, silu

        config, rows = self.config, len(x)
        eps, width = config.rms_norm_eps, config.head_dim
        query_heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        heads = linear(rms_norm(x, layer.input_norm, eps), layer.query_key_value)
        heads = heads.view(rows, 1, -1, width)
        normed = rms_norm(heads[:, :, : query_heads + key_heads], layer.head_norms, eps)
        rotated = rotate(normed, *rotation).transpose(1, 2)
        keys.index_copy_(2, slot, rotated[:, query_heads:])
        values.index_copy_(2, slot, heads[:, :, -key_heads:].transpose(1, 2))
        # Query heads of the same keys are laid out as positions: no copies of the keys.
        query = rotated[:, :query_heads].reshape(rows, key_heads, -1, width)
        mixed = scaled_dot_product_attention(query, keys, values, mask)
        x = x + linear(mixed.reshape(rows, 1, -1), layer.output)
        gate, up = linear(rms_norm(x, layer.mlp_norm, eps), layer.gate_up).chunk(2, -1)
        return x + linear(silu(gate) * up, layer.down)

    def _attention(
        self,
        x: torch.Tensor,
        layer: Layer,
        cache: KeyValueCache,
        i: int,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of layer `i` over the cache and then over x [rows, new, width]."""
        from torch.nn.functional import linear, scaled_dot_product_attention

        config = self.config
        (rows, new, _), width = x.shape, config.head_dim
        query_heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        end, groups = cache.length + new, query_heads // key_heads
        heads = linear(x, layer.query_key_value).view(rows, new, -1, width)
        normed = rms_norm(
            heads[:, :, : query_heads + key_heads], layer.head_norms, config.rms_norm_eps
        )
        rotated = rotate(normed, *rotation).transpose(1, 2)
        cache.keys[i][:, :, cache.length : end] = rotated[:, query_heads:]
        cache.values[i][:, :, cache.length : end] = heads[:, :, -key_heads:].transpose(1, 2)
        query, keys = rotated[:, :query_heads], cache.keys[i][:, :, :end]
        values = cache.values[i][:, :, :end]
        if new == 1:  # query heads of the same keys are laid out as positions
            query = query.reshape(rows, key_heads, groups, width)
        else:
            keys, values = (z.repeat_interleave(groups, 1) for z in (keys, values))
        mixed = scaled_dot_product_attention(query, keys, values, mask)
        return linear(
            (mixed if new == 1 else mixed.transpose(1, 2)).reshape(rows, new, -1), layer.output
        )


class KeyValueCache:
    """The keys and values of the tokens read so far, for one sequence or several side by side.

    Allocated once and written in place. Setting `length` back drops the tokens after it.

    Args:
        prompts: token ids, to be read first, at once or in pieces. Padded on the left to the same
            length, as `prompts` [rows, longest].
        capacity: how many tokens may follow.
    """

    def __init__(self, qwen: Qwen3, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        import torch

        config, device, dtype = qwen.config, qwen.device, qwen.dtype
        longest = max(map(len, prompts))
        self.size = longest + capacity
        shape = (len(prompts), config.num_key_value_heads, self.size, config.head_dim)
        self.length = 0
        with torch.inference_mode():
            padding = [longest - len(ids) for ids in prompts]
            padded = [[0] * n + [*ids] for n, ids in zip(padding, prompts, strict=True)]
            self.prompts = torch.tensor(padded, device=device)
            self.slots = torch.arange(self.size, device=device)
            positions = self.slots - torch.tensor(padding, device=device)[:, None]
            self.is_token = (positions >= 0)[:, None, None]
            self._padding_bias = None
            if any(padding):
                self._padding_bias = torch.zeros(self.is_token.shape, dtype=dtype, device=device)
                self._padding_bias.masked_fill_(~self.is_token, -torch.inf)
            like = torch.empty(0, dtype=dtype, device=device)
            cos, sin = qwen.rotary(like, positions.clamp_min(0))
            half = config.head_dim // 2
            # Negative in the first half: `rotate` adds a rolled copy times `sin`.
            sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
            self.cos, self.sin = cos.unsqueeze(2), sin.unsqueeze(2)
            self.keys, self.values = (
                [torch.zeros(shape, dtype=dtype, device=device) for _ in qwen.layers]
                for _ in range(2)
            )

    def mask(self, begin: int, end: int) -> torch.Tensor | None:
        """What the tokens from `begin` to `end` attend to: causal, without padding."""
        if end - begin == 1:
            return None if self._padding_bias is None else self._padding_bias[..., :end]
        # Padding attends to itself: in some kernels a row without any key is NaN.
        seen, here = self.slots[:end], self.slots[begin:end, None]
        return (seen <= here) & (self.is_token[..., :end] | (seen == here))


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of heads [rows, new, heads, width]; pairs lie half a head apart."""
    return (heads * cos).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sin)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last axis, in float32.

    Written out on a CPU: for a single token torch's own takes three times as long there.
    """
    import torch

    if x.device.type != "cpu":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], None, eps) * weight
    wide = x.float()
    square = wide.square().sum(-1, keepdim=True)
    return (wide * square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype) * weight


def _join(*projections: torch.nn.Linear) -> torch.Tensor:
    """The weights of projections as one tensor, of which theirs become views."""
    import torch

    whole = torch.cat([each.weight.detach() for each in projections])
    sizes = [len(each.weight) for each in projections]
    for each, view in zip(projections, whole.split(sizes), strict=True):
        each.weight.data = view
    return whole
