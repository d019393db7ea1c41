"""How the planner chooses a token from logits, the same on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen: the most likely one at `temperature` 0, otherwise among the `top_k`
    most likely (0: all) that together reach the probability `top_p` (1: all of what is left)."""

    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def of(cls, request: Any) -> SamplingParams:
        """Those of a song request's planner parameters."""
        return cls(request.lm_temperature, request.lm_top_p, request.lm_top_k)


GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0)


def sample_token(
    logits: torch.Tensor, draw: torch.Tensor, sampling: SamplingParams
) -> torch.Tensor:
    """The index that `draw` selects, as a tensor without axes on the device of `logits`.

    Nothing is read back to the host.

    Args:
        logits: float32 [n], guided and masked already.
        draw: uniform in [0, 1), without axes; drawn beforehand, so that a seed means the same on
            every device.

    In the order of the authors' PyTorch backend: top-k, top-p at temperature 1, then temperature.
    """
    import torch

    if sampling.temperature <= 0:
        return logits.argmax()
    if sampling.top_k > 0:
        values, order = logits.topk(min(sampling.top_k, len(logits)))
    elif sampling.top_p < 1:
        values, order = logits.sort(descending=True)
    else:
        values, order = logits, None
    if sampling.top_p < 1:
        probabilities = values.softmax(0)
        before = _cumulative(probabilities) - probabilities
        values = values.masked_fill(before > sampling.top_p, -torch.inf)
    sums = _cumulative((values / sampling.temperature).softmax(0))
    # The first index whose sum exceeds the draw. A draw is below 1 by more than the product
    # rounds, so that index never has probability 0.
    index = (sums <= draw * sums[-1]).sum()
    # `order[index]` would read the index back to the host.
    return index if order is None else order.gather(0, index.view(1)).view(())


def _cumulative(probabilities: torch.Tensor) -> torch.Tensor:
    """Running sums, in float64 where the device has it: a GPU adds in no fixed order, which must
    not lead to another token."""
    import torch

    dtype = torch.float32 if probabilities.device.type == "mps" else torch.float64
    return probabilities.cumsum(0, dtype=dtype)


def uniform_draws(seed: int, count: int, device: str) -> torch.Tensor:
    """Uniform draws in [0, 1), float32 [count]: from the CPU's generator, equal on every device."""
    import torch

    draws = torch.rand(count, generator=torch.Generator("cpu").manual_seed(seed))
    return draws.to(device)
