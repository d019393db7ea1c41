"""Qwen 2.5 through transformers or through MLX: both read tokens and return the next logits.

The only module that imports mlx.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import StudioError
from models import checkpoints, weights
from models.loading import cache_argument, load_errors, load_transformers, out_of_memory_as
from models.weights import Weights

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer


TURN, END, EOS = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
"""Special tokens of the chat format (ChatML) that Qwen 2.5 was tuned on."""


class LanguageModel(Protocol):
    """A language model that keeps what it has read in a cache of its own.

    Attributes:
        context_length: how many tokens it can read.
        device: its name, for error messages.
    """

    context_length: int
    device: str

    def reset(self) -> None:
        """Empty the cache."""

    def forward(self, ids: list[int]) -> np.ndarray:
        """Read tokens after those in the cache; returns the next logits, float32 [vocabulary]."""

    def close(self) -> None:
        """Free the memory."""


class TransformersModel:
    """A Qwen 2.5 through transformers."""

    def __init__(self, writer: Weights, folder: Path, config: dict[str, Any], device: str) -> None:
        import torch
        from transformers import Qwen2ForCausalLM

        self.context_length, self.device = config["max_position_embeddings"], device
        self.model = load_transformers(
            Qwen2ForCausalLM,
            folder,
            partial(weights.broken, writer),
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            device_map={"": device},
            attn_implementation="sdpa",
        )
        self.reset()

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)

    def forward(self, ids: list[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                use_cache=True,
                logits_to_keep=1,
                **{cache_argument(self.model): self._cache},
            )
            return output.logits[0, -1].float().cpu().numpy()

    def close(self) -> None:
        del self.model, self._cache


class MlxModel:
    """A Qwen 2.5 through mlx-lm.

    Runs in a thread of its own: MLX (0.32) evaluates an array only on streams of the thread that
    made it, and each of our jobs runs in another thread.
    """

    def __init__(self, writer: Weights, folder: Path, config: dict[str, Any], device: str) -> None:
        self.context_length, self.device = config["max_position_embeddings"], device
        self._thread = ThreadPoolExecutor(1, "mlx")
        try:
            self._in_thread(self._load, writer, folder)
            self.reset()
        except BaseException:
            self._thread.shutdown()
            raise

    def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return self._thread.submit(work, *args).result()

    def _load(self, writer: Weights, folder: Path) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self._stream = mx.new_stream(mx.default_device())
        fail = partial(weights.broken, writer)
        with mx.stream(self._stream), load_errors(fail, "model.safetensors"):
            self.model, _ = load_model(folder)

    def reset(self) -> None:
        self._in_thread(self._reset)

    def _reset(self) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._cache = make_prompt_cache(self.model)

    def forward(self, ids: list[int]) -> np.ndarray:
        return self._in_thread(self._forward, ids)

    def _forward(self, ids: list[int]) -> np.ndarray:
        import mlx.core as mx
        import numpy as np

        with mx.stream(self._stream):
            if len(ids) > 1:  # MLX computes what is evaluated: no logits for the rest
                self.model(mx.array([ids[:-1]]), cache=self._cache)
                mx.eval([layer.state for layer in self._cache])
            logits = self.model(mx.array([ids[-1:]]), cache=self._cache)[0, -1]
            return np.array(logits.astype(mx.float32))

    def close(self) -> None:
        self._in_thread(self._free)
        self._thread.shutdown()

    def _free(self) -> None:
        import mlx.core as mx

        del self.model, self._cache
        mx.clear_cache()


def check_files(writer: Weights, folder: Path) -> tuple[dict[str, Any], Tokenizer]:
    """Check that the files are those of a complete Qwen 2.5; returns its configuration and
    tokenizer.

    Raises:
        StudioError: `model-broken`, `model-mismatch`.
    """
    from tokenizers import Tokenizer

    if missing := writer.missing(folder):
        raise weights.broken(writer, missing, "is missing")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        context_length = config["max_position_embeddings"]
        is_qwen = config["model_type"] == "qwen2" and "model_file" not in config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise weights.broken(writer, "config.json", "cannot be read") from error
    if not is_qwen or not isinstance(context_length, int):
        raise weights.broken(writer, "config.json", "is not that of a Qwen 2.5")
    for path in sorted(folder.glob("*.safetensors")):
        checkpoints.tensor_names(path, writer, folder)
    try:  # tokenizers raises nothing narrower than Exception
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        raise weights.broken(writer, "tokenizer.json", "cannot be read") from error
    if any(tokenizer.token_to_id(mark) is None for mark in (TURN, END, EOS)):
        raise weights.broken(writer, "tokenizer.json", "lacks the marks of a conversation")
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        problem = f"{tokenizer.get_vocab_size()} words for {config['vocab_size']} embeddings"
        raise weights.mismatch(writer, problem)
    return config, tokenizer


def memory_errors(writer: Weights, device: str) -> AbstractContextManager[None]:
    """Raise running out of memory as a `StudioError`.

    Raises:
        StudioError: `writer-memory`.
    """
    return out_of_memory_as(
        StudioError("writer-memory", model=writer.title, size=writer.size, device=device)
    )
