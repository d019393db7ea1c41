"""CUDA graphs: work on the GPU recorded once and replayed with a single launch.

And whether layers are to be compiled, which is the other way to fewer launches.

A step of the transformer is about three thousand launches; below a minute of music a GPU is done
with them sooner than Python can issue them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

T = TypeVar("T")


def compiling() -> bool:
    """Whether `ACE_COMPILE` asks for compiled layers: a minute at the first song, then less time
    a step. Off by default, since few sessions are long enough to gain from it."""
    return os.environ.get("ACE_COMPILE", "").strip().lower() in ("1", "on", "true", "yes")


def capture(work: Callable[[], T], name: str) -> tuple[Callable[[], None], T] | None:
    """Record `work` as a CUDA graph.

    Recording computes nothing: what `work` returned has its values after the first replay. `work`
    must have run before, since libraries allocate their workspaces at first use, and must neither
    read a value back from the GPU nor use a tensor that does not outlive the graph.

    Args:
        name: what is recorded, for the log.

    Returns:
        What replays the graph, and what `work` returned; None where it cannot be recorded.
    """
    import torch

    try:
        with torch.inference_mode():
            graph = torch.cuda.CUDAGraph()
            # Threads of other jobs may allocate and free meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = work()
    except RuntimeError as error:  # running out of memory included: uncaptured, it needs less
        log.warning("%s is not captured as a CUDA graph: %s", name, error)
        return None
    return graph.replay, result


class GraphedStep:
    """A function of tensors that from its second call on is a CUDA graph.

    The first call runs as it is, which warms up the libraries and compiles what is to be compiled.
    All calls must have arguments of the same shapes and types. Holds the memory of one call.
    """

    def __init__(
        self, work: Callable[..., torch.Tensor], name: str, succeeded: Callable[[bool], None]
    ) -> None:
        """
        Args:
            work: see `capture`; its arguments are copied into memory that stays in place.
            succeeded: told once whether `work` could be captured.
        """
        self._work, self._name, self._succeeded = work, name, succeeded
        self._calls = 0
        self._inputs: list[torch.Tensor] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What `work` returns."""
        self._calls += 1
        if self._calls == 2:
            self._capture(inputs)
        if self._replay is None:
            return self._work(*inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._replay()
        return self._output.clone()

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = [each.clone() for each in inputs]
        captured = capture(lambda: self._work(*self._inputs), self._name)
        self._succeeded(captured is not None)
        if captured is None:
            self._inputs = []
        else:
            self._replay, self._output = captured
