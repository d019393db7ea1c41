"""CUDA graphs on a CPU: what runs under capture is recorded operation by operation and replayed.

As on CUDA, everything that the host computed is frozen, an operation finds its inputs where they
were during the recording, and reading a value back is refused. What was computed while recording
is overwritten, since CUDA computes nothing then.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.replays = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    def forget(self) -> None:
        """Overwrite what was computed, but not what was there before."""
        for _, args, kwargs, result in self.calls:
            new = [x for x in _tensors(result) if _place(x) not in _places((args, kwargs))]
            for x in new:
                if x.is_floating_point():
                    x.fill_(torch.nan)

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            for operator, args, kwargs, kept in self.calls:
                inputs = _places((args, kwargs))
                if operator.is_view and _places(kept) <= inputs:
                    continue  # shows what is there by now
                for old, new in zip(
                    _tensors(kept), _tensors(operator(*args, **kwargs)), strict=True
                ):
                    if _place(old) not in inputs:
                        old.copy_(new)


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _places(tree) -> set[int]:
    return {_place(x) for x in _tensors(tree)}


def install(monkeypatch, captures: bool = True) -> list[RecordedGraph]:
    """Let torch.cuda capture in this way, or not at all; the graphs that have been captured."""
    graphs = []

    @contextlib.contextmanager
    def graph(recorded, **_):
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        with recorded:
            yield
        recorded.forget()
        graphs.append(recorded)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return graphs
