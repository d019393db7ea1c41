"""Attention for training on a CPU."""

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn


class GroupedAttention:
    """Attention processor for training: plain matrix products, query heads folded by group.

    On a CPU in bfloat16 the backward pass of the fused kernel takes four to eight times as long.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        crossed = attn.is_cross_attention and encoder_hidden_states is not None
        source = encoder_hidden_states if crossed else hidden_states
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, attn.head_dim)))
        key = attn.norm_k(attn.to_k(source).unflatten(-1, (attn.kv_heads, attn.head_dim)))
        value = attn.to_v(source).unflatten(-1, (attn.kv_heads, attn.head_dim))
        if not crossed and image_rotary_emb is not None:
            rotary = {"use_real": True, "use_real_unbind_dim": -2, "sequence_dim": 1}
            query = apply_rotary_emb(query, image_rotary_emb, **rotary)
            key = apply_rotary_emb(key, image_rotary_emb, **rotary)
        query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
        groups, length = attn.heads // attn.kv_heads, query.shape[2]
        folded = query.unflatten(1, (attn.kv_heads, groups)).flatten(2, 3)
        scores = folded @ key.transpose(-1, -2) * attn.scaling
        if attention_mask is not None:
            scores = scores + attention_mask.repeat(1, 1, groups, 1).to(scores.dtype)
        mixed = (scores.softmax(-1) @ value).unflatten(2, (groups, length)).flatten(1, 2)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


def use_grouped_attention(model: nn.Module) -> None:
    """Gives every attention of an ACE-Step part the processor above; weights are untouched."""
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(GroupedAttention())
