"""The learned timbre token of XL checkpoints, which diffusers loads but does not use.

In the authors' XL code the timbre encoder puts `special_token` before the frames of the reference
and reads its output there; in their 2B code it reads the first frame. diffusers always reads the
first frame, so XL needs the token put in front. Source: the authors' `modeling_acestep_v15_xl_*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def has_token(transformer_config: Any) -> bool:
    """Whether a checkpoint was trained with the timbre token: XL was, 2B was not.

    No setting of a checkpoint names XL; what sets it apart is a condition encoder narrower than
    the transformer.
    """
    width = transformer_config.encoder_hidden_size
    return width is not None and width != transformer_config.hidden_size


@contextmanager
def prepended(encoder: torch.nn.Module) -> Iterator[None]:
    """Let an `AceStepTimbreEncoder` read each reference with `special_token` in front.

    The references become one frame longer; the encoder's output at the first position, which it
    returns, is then the token's. Nothing of the encoder is changed after the block.

    Raises:
        RuntimeError: if the library has come to prepend the token itself, or calls its layers in
            another way: the condition would be wrong without a sign of it.
    """
    import torch

    lengths: dict[str, int] = {}

    def prepend(
        _: torch.nn.Module, inputs: tuple[torch.Tensor], embedded: torch.Tensor
    ) -> torch.Tensor:
        lengths["expected"] = inputs[0].shape[1] + 1
        token = encoder.special_token.to(embedded).expand(embedded.shape[0], -1, -1)
        return torch.cat([token, embedded], dim=1)

    def check(_: torch.nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        lengths["read"] = arguments["hidden_states"].shape[1]

    hooks = (
        encoder.embed_tokens.register_forward_hook(prepend),
        encoder.layers[0].register_forward_pre_hook(check, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not lengths or lengths.get("read") != lengths.get("expected"):
        raise RuntimeError(
            f"the timbre encoder read {lengths.get('read')} frames where "
            f"{lengths.get('expected')} were expected: this version of diffusers handles the "
            "timbre token in its own way"
        )
