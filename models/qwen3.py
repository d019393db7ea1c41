"""Qwen3, read token by token into a static cache: transformers' mathematics without its overhead.

At the embedded planner's size, where a token is a millisecond, most of transformers' time is Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3ForCausalLM


def reads(config: Any) -> bool:
    """Whether this room can read a Qwen3 with this configuration: all that were published."""
    return (
        set(config.layer_types) == {"full_attention"}
        and config.hidden_act == "silu"
        and not config.attention_bias
    )


class Layer(NamedTuple):
    """The weights of one layer, those that read the same input side by side."""

    before: torch.Tensor
    query_key_value: torch.Tensor
    heads: torch.Tensor
    out: torch.Tensor
    between: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Qwen:
    """A Qwen3 that `reads` allows.

    Takes the weights of `model` and lays them out anew; `model` goes on working, over the same
    memory.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.config = model.config
        self.device, self.dtype = model.device, model.dtype
        self.rotary = model.model.rotary_emb
        self.words = model.get_input_embeddings().weight.detach()
        self.last = model.model.norm.weight.detach()
        self.layers = [self._layer(layer) for layer in model.model.layers]

    def _layer(self, layer: torch.nn.Module) -> Layer:
        import torch

        attention, mlp = layer.self_attn, layer.mlp
        heads = [
            *[attention.q_norm.weight] * self.config.num_attention_heads,
            *[attention.k_norm.weight] * self.config.num_key_value_heads,
        ]
        return Layer(
            before=layer.input_layernorm.weight.detach(),
            query_key_value=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
            heads=torch.stack(heads).detach(),
            out=attention.o_proj.weight.detach(),
            between=layer.post_attention_layernorm.weight.detach(),
            gate_up=_joined(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj.weight.detach(),
        )


class KeyValueCache:
    """What a model has read: the keys and values of one sequence, or of several side by side.

    Laid out once and written in place. Setting `length` back forgets what came after. `texts`,
    [rows, longest], are to be read first, at once or in pieces.

    Args:
        texts: token ids; padded on the left to the same length.
        more: how many tokens may follow.
    """

    def __init__(self, qwen: Qwen, texts: Sequence[Sequence[int]], more: int) -> None:
        import torch

        config, device, dtype = qwen.config, qwen.device, qwen.dtype
        longest = max(map(len, texts))
        room = longest + more
        shape = (len(texts), config.num_key_value_heads, room, config.head_dim)
        self._qwen = qwen
        self.length = 0
        with torch.inference_mode():
            padding = [longest - len(text) for text in texts]
            ids = [[0] * n + [*text] for n, text in zip(padding, texts, strict=True)]
            self.texts = torch.tensor(ids, device=device)
            self._places = torch.arange(room, device=device)
            since = self._places - torch.tensor(padding, device=device)[:, None]
            self._real = (since >= 0)[:, None, None]
            self._shade = None
            if any(padding):
                self._shade = torch.zeros(self._real.shape, dtype=dtype, device=device)
                self._shade.masked_fill_(~self._real, -torch.inf)
            like = torch.empty(0, dtype=dtype, device=device)
            cos, sin = qwen.rotary(like, since.clamp_min(0))
            half = config.head_dim // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
            self._cos, self._sin = cos.unsqueeze(2), sin.unsqueeze(2)
            self._keys, self._values = (
                [torch.zeros(shape, dtype=dtype, device=device) for _ in qwen.layers]
                for _ in range(2)
            )

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read on: ids [rows, new] to the hidden states behind the last of them, [rows, width]."""
        import torch
        from torch.nn.functional import linear, silu

        qwen, eps = self._qwen, self._qwen.config.rms_norm_eps
        with torch.inference_mode():
            begin, end = self.length, self.length + ids.shape[1]
            if ids.shape[1] > 1:
                # Padding sees itself: in some kernels a row that sees nothing is NaN.
                seen, here = self._places[:end], self._places[begin:end, None]
                mask = (seen <= here) & (self._real[..., :end] | (seen == here))
            else:
                mask = None if self._shade is None else self._shade[..., :end]
            turn = self._cos[:, begin:end], self._sin[:, begin:end]
            x = qwen.words[ids]
            for i, layer in enumerate(qwen.layers):
                x = x + self._attend(i, norm(x, layer.before, eps), turn, mask)
                gate, up = linear(norm(x, layer.between, eps), layer.gate_up).chunk(2, -1)
                x = x + linear(silu(gate) * up, layer.down)
            self.length = end
            return norm(x[:, -1], qwen.last, eps)

    def _attend(
        self,
        i: int,
        x: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of layer `i` over all that was read, then x [rows, new, width]."""
        from torch.nn.functional import linear, scaled_dot_product_attention

        config, layer = self._qwen.config, self._qwen.layers[i]
        (rows, new, _), width = x.shape, config.head_dim
        asking, answering = config.num_attention_heads, config.num_key_value_heads
        end, groups = self.length + new, asking // answering
        heads = linear(x, layer.query_key_value).view(rows, new, -1, width)
        turned = norm(heads[:, :, : asking + answering], layer.heads, config.rms_norm_eps)
        # Rotary positions: pairs lie half a head apart; `sin` is negative in the first half.
        cos, sin = turn
        turned = (turned * cos).addcmul_(turned.roll(width // 2, -1), sin).transpose(1, 2)
        self._keys[i][:, :, self.length : end] = turned[:, asking:]
        self._values[i][:, :, self.length : end] = heads[:, :, -answering:].transpose(1, 2)
        query, keys, values = turned[:, :asking], self._keys[i][:, :, :end], self._values[i]
        values = values[:, :, :end]
        if new == 1:  # the heads that ask the same keys are so many places
            query = query.reshape(rows, answering, groups, width)
        else:
            keys, values = (z.repeat_interleave(groups, 1) for z in (keys, values))
        mixed = scaled_dot_product_attention(query, keys, values, mask)
        return linear(
            (mixed if new == 1 else mixed.transpose(1, 2)).reshape(rows, new, -1), layer.out
        )


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last axis, in float32.

    On a CPU by hand: torch's own takes three times as long there for a single token.
    """
    import torch

    if x.device.type != "cpu":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], None, eps) * weight
    wide = x.float()
    square = wide.square().sum(-1, keepdim=True)
    return (wide * square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype) * weight


def _joined(*parts: torch.nn.Linear) -> torch.Tensor:
    """The weights of projections as one, of which theirs become views."""
    import torch

    whole = torch.cat([part.weight.detach() for part in parts])
    for part, view in zip(parts, whole.split([len(p.weight) for p in parts]), strict=True):
        part.weight.data = view
    return whole
