"""Qwen2 through transformers or through MLX: both read tokens and say what may follow.

The only room that knows mlx.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import StudioError
from models import checkpoints, weights
from models.weights import Weights

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer


TURN, END, EOS = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
"""Marks of the chat format (ChatML) that Qwen 2.5 was tuned on."""


class Reader(Protocol):
    """A language model that reads tokens. `longest` is how many it can count, `device` for words."""

    longest: int
    device: str

    def begin(self) -> None:
        """Forget what was read."""

    def read(self, ids: list[int]) -> np.ndarray:
        """Read on, and return what may follow: logits, float32 [vocabulary]."""

    def close(self) -> None:
        """Give the memory back."""


class OnTorch:
    """A Qwen2 through transformers."""

    def __init__(self, writer: Weights, folder: Path, config: dict[str, Any], device: str) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import Qwen2ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.longest, self.device = config["max_position_embeddings"], device
        try:
            self.model, said = Qwen2ForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16 if device == "cuda" else torch.float32,
                device_map={"": device},
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if _is_memory(error):
                raise
            raise _unloadable(writer, error) from error
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        wrong = sorted(map(str, [*said["mismatched_keys"], *said["unexpected_keys"]]))
        if lacking := sorted(set(said["missing_keys"]) - tied):
            raise weights.broken(writer, "model.safetensors", f"lacks the tensor {lacking[0]}")
        if wrong:
            raise weights.broken(
                writer, "model.safetensors", f"holds {wrong[0]}, which does not belong"
            )
        self.model.eval().requires_grad_(False)
        self.begin()

    def begin(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)

    def read(self, ids: list[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            told = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return told.logits[0, -1].float().cpu().numpy()

    def close(self) -> None:
        del self.model, self._cache


class OnMlx:
    """A Qwen2 through mlx-lm.

    Everything happens in one thread of its own: MLX (0.32) evaluates an array only on streams
    of the thread that made it, and our jobs come from a thread each.
    """

    def __init__(self, writer: Weights, folder: Path, config: dict[str, Any], device: str) -> None:
        self.longest, self.device = config["max_position_embeddings"], device
        self._thread = ThreadPoolExecutor(1, "mlx")
        try:
            self._there(self._load, writer, folder)
            self.begin()
        except BaseException:
            self._thread.shutdown()
            raise

    def _there(self, work: Callable[..., Any], *given: Any) -> Any:
        return self._thread.submit(work, *given).result()

    def _load(self, writer: Weights, folder: Path) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self._stream = mx.new_stream(mx.default_device())
        with mx.stream(self._stream):
            try:
                self.model, _ = load_model(folder)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                if _is_memory(error):
                    raise
                raise _unloadable(writer, error) from error

    def begin(self) -> None:
        self._there(self._begin)

    def _begin(self) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._cache = make_prompt_cache(self.model)

    def read(self, ids: list[int]) -> np.ndarray:
        return self._there(self._read, ids)

    def _read(self, ids: list[int]) -> np.ndarray:
        import mlx.core as mx
        import numpy as np

        with mx.stream(self._stream):
            if len(ids) > 1:  # only what is evaluated is computed: no logits for the rest
                self.model(mx.array([ids[:-1]]), cache=self._cache)
                mx.eval([layer.state for layer in self._cache])
            logits = self.model(mx.array([ids[-1:]]), cache=self._cache)[0, -1]
            return np.array(logits.astype(mx.float32))

    def close(self) -> None:
        self._there(self._drop)
        self._thread.shutdown()

    def _drop(self) -> None:
        import mlx.core as mx

        del self.model, self._cache
        mx.clear_cache()


def judged(writer: Weights, folder: Path) -> tuple[dict[str, Any], Tokenizer]:
    """Its configuration and tokenizer, once the files are those of a whole Qwen2."""
    from tokenizers import Tokenizer

    if lacking := writer.missing(folder):
        raise weights.broken(writer, lacking, "is missing")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        longest = config["max_position_embeddings"]
        qwen = config["model_type"] == "qwen2" and "model_file" not in config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise weights.broken(writer, "config.json", "cannot be read") from error
    if not qwen or not isinstance(longest, int):
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


def _unloadable(writer: Weights, error: Exception) -> StudioError:
    """Without the library's own words, which hold paths."""
    problem = f"does not load ({type(error).__name__})"
    return weights.broken(writer, "model.safetensors", problem)


@contextmanager
def memory(writer: Weights, device: str) -> Iterator[None]:
    """Say in words that the memory was not enough."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise StudioError(
            "writer-memory", model=writer.title, size=writer.size, device=device
        ) from error


def _is_memory(error: BaseException) -> bool:
    """CUDA says "out of memory", torch on a CPU and MLX name what they could not allocate."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in told or "alloc" in told
