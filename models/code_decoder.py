"""Decodes audio codes one by one after a prompt has been read, eagerly or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from models.cuda_graph import capture
from models.token_sampling import SamplingParams, sample_token

if TYPE_CHECKING:
    import torch

    from models.qwen3 import KeyValueCache, Qwen3

STEPS_AHEAD = 8
"""How many steps a GPU may have queued: progress and Stop are at most so far from its work."""


class CodeDecoder:
    """Chooses `count` codes after a prompt, once for each seed.

    Only the logits of the quantiser's codes are computed: as the number of codes is known, the end
    is never chosen.

    Args:
        cache: in which the prompts were read: one row, or a second one that guidance leads away
            from.
        code_head: rows of the output embeddings that belong to the codes, [codebook, width].
        first_code: token id of code 0.
        guidance: scale of the difference between the two rows.
    """

    def __init__(
        self,
        qwen: Qwen3,
        cache: KeyValueCache,
        code_head: torch.Tensor,
        first_code: int,
        count: int,
        guidance: float,
        sampling: SamplingParams,
    ) -> None:
        import torch

        self.qwen, self.cache = qwen, cache
        self.code_head, self.first_code = code_head, first_code
        self.guidance, self.sampling = guidance, sampling
        self.rows, self.prompt_length = len(cache.prompts), cache.length
        self.codes = torch.zeros(count, dtype=torch.long, device=qwen.device)
        self.done = 0

    def start(self, hidden: torch.Tensor, draws: torch.Tensor) -> None:
        """Choose the first code, from the hidden states [rows, width] of the prompts' last tokens.

        Args:
            draws: uniform in [0, 1), float32 [count], one for each code.
        """
        self.cache.length, self.draws = self.prompt_length, draws
        self.codes[0] = self.choose(hidden, draws[0])
        self.done = 1

    def step(self) -> None:
        """Choose one more code."""
        token = self.codes[self.done - 1] + self.first_code
        hidden = self.qwen.forward(token.expand(self.rows, 1), self.cache)
        self.codes[self.done] = self.choose(hidden, self.draws[self.done])
        self.done += 1

    def wait(self) -> None:
        """Return when the codes so far have been computed."""
        self.codes[self.done - 1].item()

    def choose(self, hidden: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        """One code, from the hidden states [rows, width]."""
        import torch

        with torch.inference_mode():
            logits = torch.nn.functional.linear(hidden, self.code_head).float()
            if self.rows == 2:
                conditional, unconditional = logits
                logits = unconditional + self.guidance * (conditional - unconditional)
            else:
                logits = logits[0]
            return sample_token(logits, draw, self.sampling)


class StaticCodeDecoder(CodeDecoder):
    """A decoder whose step is the same work on the same memory every time.

    Nothing in a step depends on the host, which therefore never waits for the device; on CUDA the
    step is captured as a graph, and Python only replays it. Attention runs over the whole cache
    under a mask: the codes are those of `CodeDecoder` up to rounding.
    """

    _allocated = False
    _replay: Callable[[], None] | None = None

    def start(self, hidden: torch.Tensor, draws: torch.Tensor) -> None:
        """As `CodeDecoder.start`; on CUDA the first call captures the step."""
        import torch

        if not self._allocated:
            with torch.inference_mode():
                self._allocate()
            self._allocated = True
            if self.on_cuda and len(self.codes) > 1:
                self._reset(hidden, draws)
                self._replay = self._capture()
        self._reset(hidden, draws)  # again: capturing ran a few steps
        self.done = 1

    def step(self) -> None:
        """As `CodeDecoder.step`, without waiting for the device."""
        import torch

        if self._replay is None:
            with torch.inference_mode():
                self._step()
        else:
            self._limit_queue()
            self._replay()
        self.done += 1

    @property
    def on_cuda(self) -> bool:
        """Whether the step can be captured."""
        return self.qwen.device.type == "cuda"

    def _allocate(self) -> None:
        """What a step reads and writes beside the cache."""
        import torch

        device = self.qwen.device
        self.draws = torch.zeros(len(self.codes), device=device)
        self.index, self.slot, self.token = (
            torch.zeros(1, dtype=torch.long, device=device) for _ in range(3)
        )
        prompt = (self.cache.slots < self.prompt_length) & self.cache.is_token
        self._prompt_mask = torch.zeros(prompt.shape, dtype=self.qwen.dtype, device=device)
        self._prompt_mask.masked_fill_(~prompt, -torch.inf)
        self.mask = self._prompt_mask.clone()
        self._queued: list[torch.cuda.Event] = []

    def _reset(self, hidden: torch.Tensor, draws: torch.Tensor) -> None:
        """Forget all codes, and choose the first one."""
        import torch

        with torch.inference_mode():
            self.draws.copy_(draws)
            self.mask.copy_(self._prompt_mask)
            self.slot.fill_(self.prompt_length)
            self.index.zero_()
            self._store(hidden)

    def _step(self) -> None:
        """Read the last code at its slot, choose the next one, and move all counters on."""
        self.mask.index_fill_(3, self.slot, 0.0)
        ids = self.token.expand(self.rows)
        hidden = self.qwen.step(ids, self.cache, self.slot, self.mask)
        self.slot.add_(1)
        self._store(hidden)

    def _store(self, hidden: torch.Tensor) -> None:
        code = self.choose(hidden, self.draws.index_select(0, self.index).view(()))
        self.codes.index_copy_(0, self.index, code.view(1))
        self.token.copy_(code.view(1) + self.first_code)
        self.index.add_(1)

    def _capture(self) -> Callable[[], None] | None:
        """What replays one step as a CUDA graph, or None where it cannot be captured.

        Warmed up on a stream of its own first: libraries allocate their workspaces there. What the
        warm-up writes into the cache is overwritten before it is read.
        """
        import torch

        with torch.inference_mode():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(min(3, len(self.codes) - 1)):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
        captured = capture(self._step, "The planner's step")
        return captured and captured[0]

    def _limit_queue(self) -> None:
        """Wait until the device is at most `STEPS_AHEAD` steps behind."""
        import torch

        event = torch.cuda.Event()
        event.record()
        self._queued.append(event)
        if len(self._queued) > STEPS_AHEAD:
            self._queued.pop(0).synchronize()


def code_decoder(qwen: Qwen3, static: bool) -> type[CodeDecoder]:
    """The decoder to use: the static one on CUDA if allowed, else the eager one.

    On CPU and on Apple's GPUs the eager one stays: it attends only to what has been read, and there
    the same seed keeps the same codes.
    """
    return StaticCodeDecoder if static and qwen.device.type == "cuda" else CodeDecoder
